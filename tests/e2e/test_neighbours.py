"""Token files of llm.c, modded-nanogpt and nanoGPT are read without conversion."""

import math

import numpy as np
import pytest

from cfg.config import load_config
from data.open import open_train_data, open_val_data

VOCAB = 251
TOKENS = {"train": np.arange(6000) % VOCAB, "val": np.arange(7, 1507) % VOCAB}
BATCH = ["--sequence_length=32", "--batch_size=2", "--total_batch_size=256"]


def with_header(path, tokens, magic=20240520, version=1, dtype="<u2"):
    """Writes a file like llm.c (dev/data/data_common.py) and modded-nanogpt (data/fineweb.py)."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())


def llmc_shakespeare(folder):
    for split, tokens in TOKENS.items():
        with_header(folder / f"tiny_shakespeare_{split}.bin", tokens)
    return "tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"


def llmc_fineweb(folder):
    with_header(folder / "fineweb_val_000000.bin", TOKENS["val"])
    with_header(folder / "fineweb_train_000001.bin", TOKENS["train"][:4000])
    with_header(folder / "fineweb_train_000002.bin", TOKENS["train"][4000:])
    return "fineweb_train_*.bin", "fineweb_val_*.bin"  # names and bytes of modded-nanogpt are equal


def llmc_llama3(folder):
    for name, split in (("fineweb_val_000000.bin", "val"), ("fineweb_train_000001.bin", "train")):
        with_header(folder / name, TOKENS[split], 20240801, 7, "<u4")
    return "fineweb_train_*.bin", "fineweb_val_*.bin"


def nanogpt(folder):
    """Writes files like data/openwebtext/prepare.py and data/shakespeare/prepare.py."""
    for split, tokens in TOKENS.items():
        file = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(len(tokens),))
        file[:] = tokens
        file.flush()
    return "train.bin", "val.bin"


LAYOUTS = [llmc_shakespeare, llmc_fineweb, llmc_llama3, nanogpt]


def flags_for(folder, layout):
    train, val = layout(folder)
    return [f"--input_train_bin={folder / train}", f"--input_val_bin={folder / val}"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loader_reads_the_tokens(tmp_path, layout):
    flags = [*BATCH, *flags_for(tmp_path, layout), f"--vocab_size={VOCAB}", "--tokenizer=none", "--shuffle=0"]
    config = load_config(flags, world_size=1)
    train, val = open_train_data(config, {}), open_val_data(config, {})
    for k, row in enumerate(train.batch(1).tolist() + train.batch(22).tolist()):  # batch 22 spans both shards
        start = 32 * (k if k < 8 else 21 * 8 + k - 8) % (5999 // 32 * 32)
        assert row == TOKENS["train"][start : start + 33].tolist()
    assert val.gather([0, 45]).tolist() == [TOKENS["val"][s : s + 33].tolist() for s in (0, 45 * 32)]


def test_the_command_trains_on_a_mixture_of_them(trainer, metrics, tmp_path):
    mixed = []
    for layout in LAYOUTS:
        folder = tmp_path / layout.__name__
        folder.mkdir()
        train, val = layout(folder)
        mixed.append(f"{layout.__name__}=1:{folder / train}")
    flags = [f"--input_train_bin={','.join(mixed)}", f"--input_val_bin={folder / val}", "--num_iterations=2"]
    done = trainer.run(tmp_path / "run", *flags)
    for layout in LAYOUTS:
        assert f"\n{layout.__name__}: 25.00% of the samples, 6,000 tokens" in done.stdout
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2] and records[-1]["val_loss"] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert records[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [llmc_fineweb, nanogpt])
def test_the_command_trains_on_one_alone(trainer, metrics, tmp_path, layout):
    trainer.run(tmp_path / "run", *flags_for(tmp_path, layout), "--num_iterations=2")
    assert [r["loss"] for r in metrics(tmp_path / "run")] == pytest.approx([math.log(VOCAB)] * 2, abs=0.1)
