"""Paths below ~, a user without a home directory, and systems that rawgpt does not run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import assets

ROOT = Path(__file__).resolve().parents[2]


def test_a_tilde_is_the_home_directory_in_every_command(trainer, warm_python, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(assets.cache_dirs()[0].parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").symlink_to(shards)
    files = {"doc.txt": "some words " * 2000, "prompt": "a", "mix": MIXTURE, "tiny.yaml": "seed: 1\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    data = ["--input_train_bin=~/shards/*_train_*.bin", "--input_val_bin=~/shards/*_val_*.bin", "--tokenizer=none"]
    trainer.run("~/run", "--cfg=~/tiny.yaml", "--num_iterations=2", *data)
    trainer.run("~/tuned", "--init_from=~/run", "--num_iterations=2", *data)
    warm_python.run("scripts/export.py", "--checkpoint=~/run", "--output=~/exported")
    warm_python.run("eval/perplexity.py", "--checkpoint=~/run", "--input=~/shards/*_val_*.bin", "--output=~/out.json")
    warm_python.run("data/train_tokenizer.py", "~/doc.txt", "--output=~/tokenizer", "--vocab_size=260")
    warm_python.run("data/text.py", "--mixture=~/mix", "--tokenizer=~/tokenizer", "--output_dir=~/mine", "--workers=1")
    made = "run tuned exported out.json tokenizer mine"
    assert all((tmp_path / name).exists() for name in made.split())
    missing = "~/none", str(tmp_path / "none")
    for command, *words in (
        ("eval/lambada.py", "--checkpoint=~/run", "--input=~/none"),
        ("eval/hellaswag.py", "--checkpoint=~/run", "--input=~/none"),
        ("eval/lm_eval.py", "--checkpoint=~/run", "--tasks=x", "--include_path=~/none"),
        ("eval/generate.py", "--checkpoint=~/none", "--prompt_file=~/prompt"),
        ("data/hellaswag.py", "--input=~/none", "--output_dir=~/hellaswag"),
        ("data/tiny_shakespeare.py", "--input=~/none", "--output_dir=~/shakespeare"),
    ):
        done = warm_python.run(command, *words, code=2)
        assert any(path in done.stderr for path in missing), done.stderr
    assert not (ROOT / "~").exists() and not (tmp_path / "~").exists()


MIXTURE = "tokens: 1K\nsources:\n  all: {input: ~/doc.txt, weight: 1}\n"


def run(folder, sitecustomize, *words, **env):
    """Runs a command in `folder` and in an interpreter that executes `sitecustomize` first. It has no HOME."""
    (folder / "python").mkdir(exist_ok=True)
    (folder / "python/sitecustomize.py").write_text(sitecustomize)
    removed = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")
    env = {k: v for k, v in os.environ.items() if k not in removed} | {"PYTHONPATH": str(folder / "python")} | env
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_user_without_home_and_passwd_entry_prepares_data(tmp_path):
    """As in a container with --user."""
    no_entry = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    data = str(assets.fetch("gpt2.tiktoken").parent)
    (tmp_path / "doc.txt").write_text("some words " * 100)
    flags = ["doc.txt", "--output_dir=mine", "--workers=1", "--val_tokens=0"]
    done = run(tmp_path, no_entry, "data/text.py", *flags, RAWGPT_DATA=data)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.txt", "mine", "python"]


@pytest.mark.parametrize("command", ["train_gpt.py", "data/text.py", "eval/generate.py", "scripts/plan.py"])
def test_windows_gets_one_line(tmp_path, command):
    done = run(tmp_path, "import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n", command, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rawgpt runs on Linux and macOS; on Windows use WSL\n"
