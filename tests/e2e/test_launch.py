"""The launch scripts with the real torchrun. After kills and signals the trace equals an undisturbed run's."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.processes import all_gone, processes_of

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
FLAGS = ["--dropout=0.1", "--num_iterations=30", "--save_every_niter=5"]
STRATEGIES = {
    "stage0": [],
    "stage1": ["--zero_stage=1"],
    "stage2": ["--zero_stage=2"],
    "stage3": ["--zero_stage=3"],
    "hsdp": ["--zero_stage=3", "--replicas=2"],
}
EACH = [pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]  # a storm: tests/e2e/test_kill_storm.py


class Launcher:
    """Starts the tiny run by a launch script or by torchrun."""

    def __init__(self, trainer, stand_ins: Path):
        self.trainer = trainer
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("NPROC", "NNODES", "RDZV", "SLURM"))}
        self.env["PATH"] = f"{stand_ins}:{Path(sys.executable).parent}:{self.env['PATH']}"
        self.env |= {"OMP_NUM_THREADS": "1", "MAX_RESTARTS": "2"}

    def start(self, launcher: list[str], output_dir: Path, *flags: str, **env: str) -> subprocess.Popen[str]:
        flags = self.trainer.command(output_dir, *FLAGS, *flags)[2:]  # without python train_gpt.py
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*launcher, *flags], env=self.env | env, cwd=ROOT, start_new_session=True, **pipes)

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == code, out
        return out


@pytest.fixture(scope="module")
def launcher(trainer, tmp_path_factory):
    """A launcher with stand-ins for SLURM's commands: srun runs its task here, scontrol prints its arguments."""
    folder = tmp_path_factory.mktemp("bin")
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": '[ $1 = requeue ] && echo "requeued $2" || echo localhost',
    }
    for name, does in stand_ins.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (folder / name).chmod(0o755)
    return Launcher(trainer, folder)


def torchrun(workers, *options):
    return ["torchrun", "--standalone", f"--nproc_per_node={workers}", *options, "train_gpt.py"]


def kill(output_dir, which):
    (pid,) = [pid for pid, process in processes_of(output_dir).items() if process == which]
    os.kill(pid, signal.SIGKILL)


def steps_logged(output_dir):
    path = output_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def status(output_dir):
    return json.loads((output_dir / "status.json").read_text())


@pytest.mark.parametrize("strategy", EACH)
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    launcher, assert_same_run, wait_for, undisturbed, tmp_path, strategy
):
    output_dir = tmp_path / "run"
    process = launcher.start(torchrun(4, "--max-restarts=2"), output_dir, *STRATEGIES[strategy])
    assert wait_for(lambda: steps_logged(output_dir) >= 12, process)
    kill(output_dir, 2)
    out = launcher.finish(process)
    assert out.count("resuming from") == 1
    assert (output_dir / "logs" / "metrics_superseded.jsonl").exists()  # steps were repeated
    assert_same_run(output_dir, undisturbed(4, *FLAGS, *STRATEGIES[strategy]))
    assert status(output_dir)["status"] == "done"
    assert all_gone(output_dir, seconds=60)


def test_a_launcher_killed_while_its_workers_start_leaves_no_worker(launcher, wait_for, tmp_path):
    process = launcher.start(torchrun(2), tmp_path / "run")
    assert wait_for(lambda: {0, 1} <= set(processes_of(tmp_path / "run").values()), process)
    process.kill()
    assert all_gone(tmp_path / "run", seconds=10)
    launcher.finish(process, code=-signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_killed_on_one_machine_restarts_all_of_them(
    launcher, assert_same_run, wait_for, undisturbed, tmp_path
):
    """Two launchers that meet at a port; for torchrun these are two machines."""
    output_dir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    env = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": endpoint}
    machines = [launcher.start(["bash", str(LAUNCH / "multi_node.sh")], output_dir, **env) for _ in range(2)]
    assert wait_for(lambda: steps_logged(output_dir) >= 12, machines[0])
    kill(output_dir, 1)
    outs = [launcher.finish(machine) for machine in machines]
    assert sum(out.count("resuming from") for out in outs) == 1
    assert_same_run(output_dir, undisturbed(2, *FLAGS))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["stage0", "stage3"])
def test_a_slurm_job_goes_through_the_queue_until_it_is_done(
    launcher, assert_same_run, wait_for, undisturbed, tmp_path, strategy
):
    """The first job runs out of time, in the second torchrun is killed with its workers, the third completes."""
    output_dir = tmp_path / "run"
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "NPROC": "2"}

    def submit():
        sbatch = ["bash", str(LAUNCH / "slurm.sbatch")]
        return launcher.start(sbatch, output_dir, *STRATEGIES[strategy], **job, SLURM_SUBMIT_DIR=str(ROOT))

    first = submit()
    assert wait_for(lambda: steps_logged(output_dir) >= 7, first)
    first.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B:USR1 does
    assert "requeued 42" in launcher.finish(first, code=1)
    stopped = status(output_dir)
    assert stopped["status"] == "stopped" and "SIGUSR1" in stopped["reason"] and 7 <= stopped["step"] < 25

    second = submit()
    assert wait_for(lambda: steps_logged(output_dir) > (stopped["step"] // 5 + 1) * 5, second)  # past a checkpoint
    kill(output_dir, "torchrun")
    assert "requeued 42" in launcher.finish(second, code=128 + signal.SIGKILL)
    assert all_gone(output_dir, seconds=10)
    assert status(output_dir)["status"] == "running"  # although no process is left

    assert "requeued" not in launcher.finish(submit())
    assert status(output_dir)["status"] == "done"
    assert_same_run(output_dir, undisturbed(2, *FLAGS, *STRATEGIES[strategy]))
