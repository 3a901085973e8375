"""The GPU speed benchmark, rehearsed on the CPU, and the page that is generated from its report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import gpu_speed, gpu_table
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--device=cpu", "--tiny")
# The part of nanoGPT's model.py that the benchmarks use.
STAND_IN = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: ...")
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanoGPT")
    (folder / "model.py").write_text(STAND_IN)
    return folder


def command(*flags):
    return [sys.executable, str(ROOT / "scripts" / "bench" / "gpu_speed.py"), *map(str, flags)]


def run(words):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, nanogpt):
    output = tmp_path_factory.mktemp("speed") / "new" / "report.json"
    script = ["bash", str(ROOT / "scripts" / "bench" / "gpu_speed.sh")]
    done = run([*script, *TINY, f"--output={output}", f"--nanogpt={nanogpt}"])
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


@pytest.mark.slow
def test_every_part_runs_and_reports_results(rehearsal):
    report = json.loads(rehearsal[0].read_text())
    assert not report["failed"] and not report["left_out"] and len(report["figures"]) == 19
    trained = {name: part for name, part in report["figures"].items() if "tok/s" in part}
    assert len(trained) == 16 and all(part["tok/s"] > 0 for part in trained.values())
    assert {"ceilings", "attention", "loss"} == report["figures"].keys() - trained.keys()
    apart = [value for name, value in report["figures"]["loss"].items() if "difference" in name]
    assert len(apart) == 8 and max(apart) < 1e-2 and sum(apart) > 0
    assert report["profiles"].keys() == {"gpt2-124m", "gpt2-124m, all changes"}
    assert {"hardware", "driver", "torch", "cuda", "cudnn", "LD_LIBRARY_PATH", "commit", "command"} <= report.keys()


@pytest.mark.slow
def test_a_killed_benchmark_keeps_its_results(tmp_path, nanogpt):
    output = tmp_path / "report.json"
    process = subprocess.Popen(command(*TINY, f"--output={output}", f"--nanogpt={nanogpt}"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = [process.stdout.readline().decode() for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    figures = json.loads(output.read_text())["figures"]
    assert list(figures)[:2] == ["ceilings", "attention"] and "seconds of this part" in figures["attention"]
    assert sum(map(len, figures.values())) >= len([line for line in printed if " s  " in line]) > 15


@pytest.fixture
def measure(monkeypatch):
    """Runs the command in this process; returns its exit code."""

    def with_flags(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu_speed.py", *map(str, flags)])
        return gpu_speed.main()

    return with_flags


def test_a_part_without_input_is_left_out(measure, tmp_path):
    assert measure(*TINY, f"--output={tmp_path / 'report.json'}", "--only=nanoGPT;attention") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["figures"]) == ["attention"] and "--nanogpt" in report["left_out"]["nanoGPT"]


def test_a_part_that_exceeds_the_time_limit_is_left_out(tmp_path, monkeypatch):
    bench = gpu_speed.Bench(tmp_path / "report.json", seconds=40, device="cpu", tiny=False, nanogpt=None)
    monkeypatch.setattr(gpu_speed, "PARTS", {"long": (80, None), "short": (8, lambda bench: bench.note("x", 1.0))})
    for name in gpu_speed.PARTS:
        gpu_speed.run_part(bench, name)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["figures"]) == ["short"] and "s left of --seconds=40" in report["left_out"]["long"]


def test_a_failed_part_is_recorded_and_the_next_one_runs(measure, tmp_path, monkeypatch):
    def fail(bench):
        bench.note("first", 1.0)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_speed.PARTS, "ceilings", (8, fail))
    assert measure(*TINY, f"--output={tmp_path / 'report.json'}", "--only=ceilings;attention") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"]["ceilings"] == {"first": 1.0} and "attention" in report["figures"]
    assert report["failed"] == {"ceilings": "RuntimeError: no such kernel"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--device=cuda"], "--device=cuda"),
        (["--device=cpu"], "add --tiny"),
        ([*TINY, "--only=gpt3"], "--only=gpt3: no such part"),
        ([*TINY, "--seconds=0"], "--seconds=0"),
        ([*TINY, "--nanogpt=/nowhere"], "--nanogpt=/nowhere: has no model.py"),
    ],
)
def test_user_errors_write_nothing(measure, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        measure(*flags, f"--output={tmp_path / 'report.json'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_page_gets_a_section_per_report_and_keeps_the_rest(rehearsal, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    for _ in range(2):  # writing it again changes nothing
        monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(rehearsal[0]), "--output", str(page)])
        gpu_table.main()
        text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{gpu_table.END}\nafter\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| gpt2-124m")]
    assert len(rows) == 10 and all(line.count("|") == 8 for line in rows)
    assert "tiny shapes" in text and text.count("### cpu") == 1


def test_the_table_has_goals_and_ratios():
    parts = {"nanoGPT": {"tok/s": 500_000.0}, "gpt2-124m, all changes": {"tok/s": 550_000.0, "MFU": 0.5, "GiB": 20.0}}
    row = gpu_table.training_table("NVIDIA H200", parts)[-1]
    assert row == "| gpt2-124m, all changes | 550,000 | 1.100 | 50.0% | 540,000 tok/s | 20.0 |  |"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"figures": 1}', '{"figures": {}}'])
def test_a_file_that_is_not_a_report_is_a_user_error(tmp_path, monkeypatch, content):
    (tmp_path / "x.json").write_text(content)
    (tmp_path / "page.md").write_text("without marks")
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(tmp_path / "x.json"), "--output", str(tmp_path / "page.md")])
    with pytest.raises(UserError, match=r"x\.json: not a report"):
        gpu_table.main()
    assert (tmp_path / "page.md").read_text() == "without marks"


@pytest.mark.slow
def test_a_page_without_marks_is_not_changed(rehearsal, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("without marks")
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(rehearsal[0]), "--output", str(tmp_path / "page.md")])
    with pytest.raises(UserError, match="has no lines"):
        gpu_table.main()
    assert (tmp_path / "page.md").read_text() == "without marks"


@pytest.mark.slow
def test_training_is_compared_with_nanogpt(nanogpt):
    small = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=300", "--sequence_length=8", "--batch_size=2"]
    words = [sys.executable, str(ROOT / "scripts" / "bench" / "train.py"), "--rounds=1", "--steps=1", *small]
    done = run([*words, f"--nanogpt={nanogpt}"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    speeds = [result[side]["tok_per_s"] for side in ("ours", "reference", "nanogpt")]
    assert result["ratio"]["tok_per_s"] == pytest.approx(speeds[0] / speeds[1])
    assert result["ratio to nanogpt"]["tok_per_s"] == pytest.approx(speeds[0] / speeds[2])
