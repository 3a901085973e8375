"""Ctrl-C: answered at once in training, and without a traceback at any time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A first step of many micro-steps, which is never finished in these tests.
LONG_STEP = ["--n_layer=64", "--batch_size=1", "--total_batch_size=16960", "--async_save=0"]
ANSWER = (
    "SIGINT: stopping; a checkpoint is saved after this step or the next; press Ctrl-C again to stop now without one"
)


def status(output_dir):
    path = output_dir / "status.json"
    return json.loads(path.read_text())["status"] if path.exists() else ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_answered_at_once_and_a_second_one_ends_the_run(trainer, wait_for, tmp_path, ranks):
    run = tmp_path / "run"
    process = trainer.start(run, *LONG_STEP, ranks=ranks, python=trainer.warm_python)
    assert wait_for(lambda: (run / "config.yaml").exists() and handles_signals(run), process)
    process.send_signal(signal.SIGINT)
    lines = list(until(process.stderr, ANSWER))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if ranks == 1 else 1)
    lines += err.splitlines()
    assert lines.count(ANSWER) == lines.count("interrupted") == 1
    assert status(run) == "interrupted"
    assert not (run / "metrics.jsonl").read_text() and not list((run / "checkpoints").iterdir())
    logs = [(run / f"logs/rank_{rank}.log").read_text() for rank in range(ranks)]
    assert ANSWER in logs[0] and not any("Traceback" in log for log in logs)
    assert ranks > 1 or lines == [ANSWER, "interrupted"]


def until(stream, line):
    """Yields the lines of a stream up to `line`."""
    for found in stream:
        yield found.rstrip("\n")
        if found == line + "\n":
            return


def handles_signals(run):
    """Returns whether rank 0 has a handler for SIGUSR1, which is the case while it trains."""
    about = Path(f"/proc/{(run / '.lock').read_text()}/status").read_text()
    return int(about.partition("SigCgt:")[2].split()[0], 16) >> signal.SIGUSR1 - 1 & 1


def loaded(process, library):
    """Returns whether a process has loaded a library."""
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize(
    "command,library",
    [
        ("train_gpt.py", "pydantic_core"),
        ("train_gpt.py", "libtorch"),
        ("eval/perplexity.py --checkpoint nowhere --input nothing", "libtorch"),
        ("data/text.py nothing --output_dir nowhere", "multiarray_umath"),
    ],
)
def test_ctrl_c_during_imports_ends_a_command_without_a_traceback(wait_for, command, library):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, env=os.environ, **pipes)
    assert wait_for(lambda: loaded(process, library), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_ctrl_c_before_training_begins_is_written_to_the_status(trainer, wait_for, tmp_path):
    run = tmp_path / "run"
    process = trainer.start(run, *LONG_STEP, "--n_layer=1000", python=trainer.warm_python)
    assert wait_for(lambda: status(run) == "running", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert status(run) == "interrupted" and not (run / "config.yaml").exists()
