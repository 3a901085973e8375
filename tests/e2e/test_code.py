"""Code with fill-in-the-middle, end to end: text, shards, a model, and a filled hole."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--sequence_length=64", "--batch_size=4", "--total_batch_size=256"]
TINY += ["--num_iterations=3", "--device=cpu", "--sample_every=0", "--val_max_steps=1"]


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """A folder with shards of this project's source and a tiny model of the preset, trained for three steps."""
    folder = tmp_path_factory.mktemp("code")
    sources = sorted((ROOT / "data").glob("*.py"))
    (folder / "code.jsonl").write_text("".join(json.dumps({"content": p.read_text()}) + "\n" for p in sources))
    fim = ["--tokenizer=gpt2-fim", "--fim_rate=0.5", "--fim_spm_rate=0.5"]
    command("data/text.py", folder / "code.jsonl", "--text_key=content", *fim, "--output_dir", folder / "code")
    shards = [f"--input_{split}_bin={folder}/code/*_{split}_*.bin" for split in ("train", "val")]
    command("train_gpt.py", "--cfg=code-small", *TINY, *shards, f"--output_dir={folder}/run")
    return folder


def test_the_hole_is_filled_and_the_rest_is_unchanged(command, run):
    prompt = "def add(a, b):\n    return <FILL_ME>\n\nprint(add(1, 2))"
    args = ["--checkpoint", run / "run", "--prompt", prompt, "--max_new_tokens=5", "--temperature=0"]
    text = command("eval/generate.py", *args, "--infill").stdout
    before, after = prompt.split("<FILL_ME>")
    assert text.startswith(before) and text.removesuffix("-" * 40 + "\n").endswith(after + "\n")
    assert "fim_" not in text


def test_infill_without_a_hole_in_the_prompt_is_an_error(command, run):
    done = command("eval/generate.py", "--checkpoint", run / "run", "--prompt=x", "--infill", code=2)
    assert done.stderr.count("\n") == 1 and "<FILL_ME>" in done.stderr


def test_shards_with_sentinels_need_the_tokenizer_with_sentinels(command, run):
    flags = [f"--input_train_bin={run}/code/*_train_*.bin", f"--output_dir={run}/other"]
    done = command("train_gpt.py", *TINY, "--cfg=code-small", "--vocab_size=50257", "--tokenizer=gpt2", *flags, code=2)
    assert done.stderr.count("\n") == 1


def test_fim_with_a_tokenizer_without_sentinels_is_an_error(command, run):
    done = command("data/text.py", run / "code.jsonl", "--fim_rate=0.5", "--output_dir", run / "x", code=2)
    assert "gpt2-fim" in done.stderr and done.stderr.count("\n") == 1


def test_generation_with_another_tokenizer_than_the_checkpoint_is_an_error(command, run):
    done = command("eval/generate.py", "--checkpoint", run / "run", "--tokenizer=gpt2", code=2)
    assert "--tokenizer=gpt2, but the checkpoint was trained with gpt2-fim" in done.stderr


def test_a_run_without_tokenizer_keeps_the_fingerprint_of_the_checkpoint(command, run, tmp_path):
    shards = f"--input_train_bin={run}/code/*_train_*.bin"
    start = [*TINY, "--cfg=code-small", shards, "--input_val_bin=", f"--output_dir={tmp_path}"]
    command("train_gpt.py", *start, "--num_iterations=1")
    command("train_gpt.py", *start, "--num_iterations=2", "--tokenizer=none")
    (tmp_path / "plain").mkdir()
    for shard in (run / "code").glob("*_train_*"):
        (tmp_path / "plain" / shard.name).write_bytes(
            shard.read_bytes()
        )  # without the manifest that names the tokenizer
    bare = f"--input_train_bin={tmp_path}/plain/*_train_*.bin"
    done = command("train_gpt.py", *start, bare, "--num_iterations=3", "--tokenizer=gpt2", code=2)
    assert "trained with gpt2-fim" in done.stderr and done.stderr.count("\n") == 1
