"""The diffs of docs/how_to_change_it.md apply to the sources, and the changes work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/how_to_change_it.md").read_text()
DIFFS = dict(re.findall(r"^## (.*?)\n.*?^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SOURCES = ["train_gpt.py", "util", "cfg", "model", "data", "eval", "train"]
# The line numbers in the page may be out of date: git finds the lines by their text.
APPLY = ["git", "apply", "--unidiff-zero"]

CHECK = """
import torch
from cfg.config import load_config
from model.layers import MLP
from train.optim import learning_rate
from util.errors import UserError

config = load_config(["--mlp=silu", "--n_embd=8", "--n_head=2", "--bias=0", "--learning_rate=1", "--warmup_iters=10",
                      "--warmup_start_frac=0.5", "--schedule=inverse_sqrt", "--optimizer=radam"], 1)
mlp, x = MLP(config), torch.randn(3, 8)
torch.testing.assert_close(mlp(x), mlp.c_proj(torch.nn.functional.silu(mlp.c_fc(x))))
assert [round(learning_rate(step, config), 6) for step in (1, 10, 40)] == [0.55, 1, 0.5]
for flags in (["--warmup_start_frac=0.5"], ["--warmup_start_frac=1", "--warmup_iters=1"]):
    try:
        load_config(flags, 1)
    except UserError as error:
        assert "--warmup_start_frac" in str(error)
    else:
        raise AssertionError(flags)
"""
TRAIN = """
--n_layer=1 --n_head=2 --n_embd=32 --vocab_size=50257 --sequence_length=16 --batch_size=2 --num_iterations=4
--save_every_niter=2 --mlp=silu --schedule=inverse_sqrt --warmup_iters=2 --warmup_start_frac=0.1 --optimizer=radam
--grad_clip=0.01 --device=cpu
""".split()


def copy(folder):
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.bin", ".partial"))
        else:
            shutil.copy(source, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # git apply skips files outside its repository
    return folder


def run(folder, *command, **options):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the sources with all changes of the page."""
    folder = copy(tmp_path_factory.mktemp("changed"))
    for title, diff in DIFFS.items():
        done = run(folder, *APPLY, input=diff)
        assert done.returncode == 0, f"{title}: {done.stderr}"
    return folder


def test_each_change_applies_without_the_others(tmp_path):
    folder = copy(tmp_path)
    assert len(DIFFS) == 6
    for title, diff in DIFFS.items():
        done = run(folder, *APPLY, "--check", input=diff)
        assert done.returncode == 0, f"{title}: {done.stderr}"


def test_the_table_counts_the_added_lines():
    table = {title.capitalize(): int(n) for title, n in re.findall(r"^\| \[(.*?)\].*\| (\d+) \|$", PAGE, re.MULTILINE)}
    assert table == {title: len(re.findall(r"^\+(?!\+)", diff, re.MULTILINE)) for title, diff in DIFFS.items()}


def test_the_changed_functions_compute_what_the_page_says(changed):
    done = run(changed, sys.executable, "-c", CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_changed_sources_prepare_data_train_and_resume(changed):
    rows = "".join(f'{i},"A text with a comma, number {i}."\n' for i in range(200))
    (changed / "texts.csv").write_text(f"id,text\n{rows}")
    done = run(changed, sys.executable, "data/text.py", "texts.csv", "--output_dir", "data/mine", "--val_tokens=200")
    assert done.returncode == 0, done.stderr
    train = [sys.executable, "train_gpt.py", *TRAIN, "--input_train_bin=data/mine/*_train_*.bin"]
    done = run(changed, *train)
    assert done.returncode == 0 and "radam: " in done.stdout, done.stderr
    (output_dir,) = (changed / "outdir").iterdir()
    whole = (output_dir / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(output_dir / "checkpoints/step_00000004")
    done = run(changed, *train)
    assert done.returncode == 0 and "step_00000002" in done.stdout, done.stderr
    resumed = (output_dir / "metrics.jsonl").read_text().splitlines()
    keys = "step", "loss", "grad_norm", "clipped", "lr"
    first, second = ([{key: json.loads(line)[key] for key in keys} for line in lines] for lines in (whole, resumed))
    assert first == second and [record["clipped"] for record in first] == [1] * 4
