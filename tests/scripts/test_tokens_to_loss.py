"""scripts/bench/tokens_to_loss.py: which runs it makes, what it keeps, and its tables."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from data import assets
from scripts.bench import tokens_to_loss as bench
from scripts.bench.tokens_to_loss import ABLATIONS, RECIPES, SEEDS, Setting
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HALF = Setting("modern", 0.5, 1.0)


def finished(loss):
    """Returns results of all runs, made in the order in which the script asks for them."""
    results = {}
    while todo := [s for s in bench.next_runs(results) if s not in results]:
        results[todo[0]] = loss(todo[0])
    return results


def falling(setting):
    """A loss that is lowest at twice the learning rates, and lower for the modern recipe."""
    loss = 3.9 if setting.recipe == "modern" else 4.0
    return {"val_loss": loss + 0.01 * abs(setting.factor - 2) + 0.001 * setting.seed + 0.02 * bool(setting.without)}


def test_each_recipe_is_repeated_at_its_best_learning_rate():
    results = finished(falling)
    assert len(results) == len(RECIPES) * (4 + len(SEEDS)) + len(ABLATIONS)
    assert {s.factor for s in results if s.seed != 1 or s.without} == {2.0}
    assert {s.factor for s in results} == {0.5, 1.0, 2.0, 4.0}, "while the best was the highest, one more was tried"
    assert len({s.name for s in results}) == len(results)


def test_the_compared_runs_come_first_and_a_rate_that_is_ever_better_ends():
    order = list(finished(lambda s: {"val_loss": s.factor}))
    assert [s.recipe == "gpt2-untied" for s in order] == sorted(s.recipe == "gpt2-untied" for s in order)
    assert min(s.factor for s in order) == 1 / 16 and max(s.factor for s in order) == 1.0


def test_adamw_instead_of_muon_runs_at_the_rate_that_is_best_for_adamw():
    results = finished(lambda s: {"val_loss": abs(s.factor - (1 if s.recipe == "gpt2" else 0.5))})
    adamw, *others = (s for s in results if s.without)
    assert "--learning_rate=0.004" in adamw.flags() and {s.factor for s in others} == {0.5}


def test_a_run_that_failed_is_reported_and_its_rate_is_not_chosen():
    failed = {"failed": "exit code 3: diverged"}
    results = finished(lambda s: failed if s.factor == 2 else falling(s))
    assert {s.factor for s in results if s.seed != 1} == {1.0}
    assert "diverged" in bench.tables(results)


def test_the_flags_are_accepted_and_undo_one_change_each():
    from cfg.config import load_config

    paths = ["--input_train_bin=x", "--input_val_bin="]
    whole = load_config([*HALF.flags(), *paths], 1).model_dump()
    assert whole["optimizer"] == "muon" and whole["num_iterations"] * bench.BATCH == HALF.tokens
    for change in ABLATIONS:
        flags = Setting("modern", 0.5, 1.0, without=change).flags()
        config = load_config([*flags, *paths], 1).model_dump()
        assert {k for k in whole if config[k] != whole[k]} - {"learning_rate"}, change


def test_the_tables_have_means_differences_and_p_values():
    text = bench.tables(finished(falling))
    mean = sum(3.9 + 0.001 * seed for seed in SEEDS) / 3
    row = next(line for line in text.splitlines() if line.startswith(f"| modern | {HALF.tokens:,} | × 2 |"))
    assert f"{mean:.4f} ± 0.0010 | 3 | -0.1000 |" in row
    assert float(row.split("|")[-2]) < 1e-5
    assert bench.welch([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert sum(line.startswith(f"| {change} |") for change in ABLATIONS for line in text.splitlines()) == len(ABLATIONS)


def test_results_are_read_back_as_they_were_written(tmp_path):
    results = finished(falling)
    bench.write_results(tmp_path / "results.json", results)
    assert bench.read_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (None, [], "--folder: missing; give FILE, the text"),
        (None, ["x.txt", "--folder=runs", "--jobs=0"], "--jobs=0: must be at least 1"),
        (None, ["missing.txt", "--folder=runs"], "missing.txt: no such file"),
        (None, ["--show"], "results.json: no results yet"),
        ("", ["--show"], "results.json"),
        ('[{"setting": {}}]', ["--show"], "results.json: not a file of this command"),
    ],
)
def test_mistakes_are_one_line(tmp_path, content, flags, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    command = [sys.executable, str(ROOT / "scripts/bench/tokens_to_loss.py"), "--output", "results.json", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_model_is_trained_and_a_stopped_run_is_not_taken_for_a_result(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_bytes(assets.fetch("tinyshakespeare.txt").read_bytes())
    bench.prepare([str(text)], tmp_path)
    monkeypatch.setattr(bench, "TOKENS", 65536)
    monkeypatch.setattr(bench, "SIZE", [*bench.SIZE, "--n_layer=1", "--n_embd=48", "--val_max_steps=1"])
    result = bench.train(HALF, tmp_path)
    assert result["tokens"] == 30720 and 0 < result["val_loss"] < math.log(4096) + 0.1
    status = tmp_path / "runs" / HALF.name / "status.json"
    assert json.loads(status.read_text())["status"] == "done"
    monkeypatch.setattr(bench, "SIZE", [*bench.SIZE, "--max_minutes=1e-9"])
    with pytest.raises(UserError, match="repeat the command to resume"):
        bench.train(Setting("gpt2", 0.5, 1.0), tmp_path)
    monkeypatch.setattr(bench, "SIZE", [*bench.SIZE, "--n_head=5"])
    with pytest.raises(UserError, match="exit code 2, see .*console.log"):
        bench.train(Setting("gpt2", 0.5, 2.0), tmp_path)
