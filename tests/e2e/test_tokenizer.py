"""A trained tokenizer, from text to samples, and the error for every mismatch."""

import json
import shutil

import numpy as np
import pytest

from data.shards import write_shard
from data.tokenizers.load import load_tokenizer
from tests.conftest import TINY

TEXT = "".join(f"Speaker {i}: the cat's {i} hats, and they'll sit.\n\n" for i in range(1500))


@pytest.fixture(scope="module")
def world(command, tmp_path_factory):
    """Two tokenizers, and shards made with the first."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text(TEXT)
    for name, pattern in (("tok", "gpt4"), ("other", "gpt2")):
        flags = ["--vocab_size=300", f"--pattern={pattern}"]
        command("data/train_tokenizer.py", folder / "text.txt", "--output", folder / name, *flags)
    tokenizer = load_tokenizer(str(folder / "tok"))
    tokens = np.array([tokenizer.end_of_text, *tokenizer.encode(TEXT)])
    (folder / "data").mkdir()
    write_shard(folder / "data" / "x_train_000001.bin", tokens[2000:], 300)
    write_shard(folder / "data" / "x_val_000000.bin", tokens[:2000], 300)
    manifest = {"format": 1, "tokenizer": tokenizer.fingerprint, "vocab_size": 300}
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def data(world):
    return [f"--input_train_bin={world}/data/*_train_*.bin", f"--input_val_bin={world}/data/*_val_*.bin"]


def flags(world, tokenizer, *more):
    return [
        *data(world),
        f"--tokenizer={tokenizer}",
        "--vocab_size=300",
        "--sample_every=5",
        "--sample_tokens=8",
        *more,
    ]


@pytest.fixture(scope="module")
def run(world, trainer):
    output_dir = world / "run"
    trainer.run(output_dir, *flags(world, world / "tok", "--num_iterations=10"))
    return output_dir


def test_a_run_logs_bits_per_byte_and_samples_text(run, world, metrics):
    last = metrics(run)[-1]
    tokenizer = load_tokenizer(str(world / "tok"))
    bytes_per_token = tokenizer.byte_lengths(300)[tokenizer.encode(TEXT)[:1999]].mean()
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / np.log(2) / bytes_per_token, rel=0.02)
    assert (run / "samples" / "step_00000010.txt").read_text().strip()


def test_a_checkpoint_contains_its_tokenizer(command, run, world, tmp_path):
    """The checkpoint is copied and the tokenizer moved away: the text is equal."""
    checkpoint = run / "checkpoints" / "step_00000010"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["tokenizer"] == load_tokenizer(str(world / "tok")).fingerprint
    shutil.copytree(checkpoint, tmp_path / "step_00000010")
    config = json.loads((tmp_path / "step_00000010" / "manifest.json").read_text())["config"]
    assert config["tokenizer"] == str(world / "tok")
    sampling = ["eval/generate.py", "--device=cpu", "--max_new_tokens=20", "--prompt=Speaker", "--checkpoint"]
    (world / "tok").rename(world / "moved")
    try:
        text = command(*sampling, tmp_path / "step_00000010").stdout
        assert text == command(*sampling, run).stdout and text.startswith("Speaker")
        assert "no such tokenizer or file" in command(*sampling, run, f"--tokenizer={world}/tok", code=2).stderr
        shutil.copytree(run, tmp_path / "run")
    finally:
        (world / "moved").rename(world / "tok")


@pytest.mark.slow
def test_a_run_resumes_with_a_copy_of_its_tokenizer_but_not_with_another(run, world, trainer, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(world / "tok", tmp_path / "tok")
    done = trainer.run(tmp_path / "run", *flags(world, tmp_path / "tok", "--num_iterations=12"), ranks=2)
    assert "resuming from" in done.stdout

    (world / "data" / "manifest.json").rename(
        world / "data" / "aside"
    )  # so that only the checkpoint has the fingerprint
    try:
        for other in (world / "other", "gpt2"):
            more = flags(world, other, "--num_iterations=14")
            done = trainer.run(tmp_path / "run", *more, code=2)
            assert f"--tokenizer={other}, but" in done.stderr and f"trained with {tmp_path}/tok" in done.stderr
        trainer.run(tmp_path / "run", *flags(world, "none", "--num_iterations=13"))
    finally:
        (world / "data" / "aside").rename(world / "data" / "manifest.json")


@pytest.mark.parametrize(
    "tokenizer, more, message",
    [
        ("{world}/other", [], "made with tokenizer {world}/tok, but --tokenizer={world}/other; give --tokenizer="),
        ("gpt2", [], "made with tokenizer {world}/tok, but --tokenizer=gpt2; give --tokenizer={world}/tok"),
        ("gtp2", [], "--tokenizer=gtp2: no such tokenizer or file; did you mean gpt2?"),
        ("{world}/data", [], "tokenizer.json: No such file"),
        ("{world}/tok", ["--vocab_size=299"], "give --vocab_size=300"),
        ("none", ["--vocab_size=128256"], "has 300 ids, but the model has --vocab_size=128256; give --vocab_size=300"),
    ],
)
def test_a_mismatch_is_an_error_before_anything_is_written(world, trainer, tmp_path, tokenizer, more, message):
    given = flags(world, tokenizer.format(world=world), *more)
    done = trainer.run(tmp_path / "run", *given, code=2)
    assert done.stderr.count("\n") == 1 and message.format(world=world) in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_the_vocabulary_follows_from_the_tokenizer(command, world, tmp_path):
    given = [*TINY, *data(world), f"--tokenizer={world}/tok", "--num_iterations=1", f"--output_dir={tmp_path}/run"]
    given = [flag for flag in given if not flag.startswith("--vocab_size")]
    assert "largest token id" not in command("train_gpt.py", *given).stdout
    assert "\nvocab_size: 300\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_validation_shards_are_checked_too(world, trainer, tmp_path):
    train = tmp_path / "x_train.bin"
    shutil.copy(world / "data" / "x_train_000001.bin", train)
    done = trainer.run(tmp_path / "run", *flags(world, world / "other"), f"--input_train_bin={train}", code=2)
    assert done.stderr.startswith("error: --input_val_bin: the shards in ")


def test_tiny_shakespeare_with_a_trained_tokenizer(command, world, tmp_path):
    made = ["data/tiny_shakespeare.py", f"--tokenizer={world}/tok", "--output_dir", tmp_path / "out"]
    assert "training and" in command(*made).stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"] == load_tokenizer(str(world / "tok")).fingerprint
    assert "already there" in command(*made).stdout
    other = ["data/tiny_shakespeare.py", f"--tokenizer={world}/other", "--output_dir", tmp_path / "out"]
    assert "made from other input" in command(*other, code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["shakespeare-bytes", "modern-shakespeare"])
def test_a_preset_of_bytes_trains_on_tiny_shakespeare(command, metrics, tmp_path, preset):
    command("data/tiny_shakespeare.py", "--tokenizer=bytes", "--output_dir", tmp_path / "data")
    data = [f"--input_train_bin={tmp_path}/data", f"--input_val_bin={tmp_path}/data", f"--output_dir={tmp_path}/run"]
    short = ["--num_iterations=40", "--warmup_iters=10", "--val_max_steps=4", "--device=cpu"]
    command("train_gpt.py", f"--cfg={preset}", *data, *short)
    assert metrics(tmp_path / "run")[-1]["val_bpb"] < 4.5  # at random 8.0


def test_any_text_trains_by_bytes(command, trainer, metrics, tmp_path):
    """Goes from text without words, partly not ASCII, to an exported model with the same tokenizer."""
    (tmp_path / "dna.txt").write_text("ACGTTGCA" * 2000 + "東京\n" * 200)
    made = ["data/text.py", tmp_path / "dna.txt", "--tokenizer=bytes", "--val_tokens=900", "--output_dir"]
    command(*made, tmp_path / "data")
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["tokenizer"]["name"] == "bytes"
    data = [f"--input_train_bin={tmp_path}/data/*_train_*.bin", f"--input_val_bin={tmp_path}/data/*_val_*.bin"]
    run = ["--tokenizer=bytes", "--vocab_size=257", "--num_iterations=5", "--sample_every=5", "--sample_tokens=8"]
    trainer.run(tmp_path / "run", *data, *run)
    last = metrics(tmp_path / "run")[-1]
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / np.log(2), rel=1e-6)
    of_run = ["--device=cpu", f"--checkpoint={tmp_path}/run"]
    assert "bits per byte" in command("eval/perplexity.py", *of_run, "--input", tmp_path / "dna.txt").stdout
    assert command("eval/generate.py", *of_run, "--prompt=ACGT", "--max_new_tokens=3").stdout.startswith("ACGT")
    command("scripts/export.py", of_run[1], "--to=hf", "--output", tmp_path / "hf")
    assert load_tokenizer(str(tmp_path / "hf")).fingerprint["sha256"] == load_tokenizer("bytes").sha256
