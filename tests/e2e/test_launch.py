"""The launchers with the real torchrun: whoever is killed or warned, the trace is that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
FLAGS = ["--dropout=0.1", "--num_iterations=30", "--save_every_niter=5"]
STRATEGIES = {"ddp": []}


class Launcher:
    """Starts runs by scripts/launch, and knows which processes are theirs."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RDZV", "SLURM", "NNODES"))}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        self.env |= {"OMP_NUM_THREADS": "1", "MAX_RESTARTS": "2"}

    def start(self, script: str, output_dir: Path, *flags: str, **env: str) -> subprocess.Popen[str]:
        flags = self.trainer.command(output_dir, *FLAGS, *flags)[2:]  # without python train_gpt.py
        command = ["bash", str(LAUNCH / script), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.env | env, start_new_session=True, **pipes)

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == code, out
        return out

    def run(self, script: str, output_dir: Path, *flags: str, **env: str) -> str:
        return self.finish(self.start(script, output_dir, *flags, **env))


@pytest.fixture(scope="module")
def launcher(trainer):
    return Launcher(trainer)


def processes_of(output_dir):
    """The processes that train into this directory and their launchers, by their command lines; no zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has just ended
        if f"--output_dir={output_dir}" in words:
            found[int(path.parent.name)] = words
    return found


def workers_of(output_dir):
    return [pid for pid, words in processes_of(output_dir).items() if words[1].endswith(("-u", "train_gpt.py"))]


def all_gone(output_dir, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and processes_of(output_dir):
        time.sleep(0.02)
    return not processes_of(output_dir)


def steps_logged(output_dir):
    path = output_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def status(output_dir):
    return json.loads((output_dir / "status.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(launcher, trace, tmp_path_factory):
    """The trace of an undisturbed run, by strategy and number of workers; each is run once, when it is asked for."""
    traces = {}

    def of(strategy, workers):
        if (strategy, workers) not in traces:
            output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            launcher.run("single_node.sh", output_dir, *STRATEGIES[strategy], NPROC=str(workers))
            assert status(output_dir) == {"status": "done", "step": 30, "reason": ""}
            traces[strategy, workers] = trace(output_dir)
            assert [r["step"] for r in traces[strategy, workers]] == list(range(1, 31))
        return traces[strategy, workers]

    return of


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    launcher, trace, wait_for, undisturbed, tmp_path, strategy
):
    output_dir = tmp_path / "run"
    process = launcher.start("single_node.sh", output_dir, *STRATEGIES[strategy], NPROC="4")
    assert wait_for(lambda: steps_logged(output_dir) >= 12, process)
    workers = workers_of(output_dir)
    assert len(workers) == 4
    os.kill(workers[2], signal.SIGKILL)
    out = launcher.finish(process)
    assert "resuming from" in out
    assert (output_dir / "logs" / "metrics_superseded.jsonl").exists()  # it did go back
    assert trace(output_dir) == undisturbed(strategy, 4)  # ==: all digits
    assert status(output_dir)["status"] == "done"
    assert all_gone(output_dir, seconds=0.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_launcher_takes_its_workers_along(launcher, trace, wait_for, undisturbed, tmp_path, strategy):
    output_dir = tmp_path / "run"
    process = launcher.start("single_node.sh", output_dir, *STRATEGIES[strategy], NPROC="2")
    assert wait_for(lambda: steps_logged(output_dir) >= 12, process)
    assert len(workers_of(output_dir)) == 2
    process.kill()  # the script has become torchrun
    process.communicate()
    assert all_gone(output_dir)
    assert status(output_dir)["status"] == "running"  # which nobody is: so it was killed
    launcher.run("single_node.sh", output_dir, *STRATEGIES[strategy], NPROC="2")
    assert trace(output_dir) == undisturbed(strategy, 2)
