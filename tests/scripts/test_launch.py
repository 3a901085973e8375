"""The launchers: the commands that they run, and when the SLURM job requeues itself.

`torchrun`, `srun`, `scontrol` and `nvidia-smi` are stand-ins, first in PATH. tests/e2e/test_launch.py runs them with
the real torchrun.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
FLAGS = ["--cfg=gpt2-124m", "--sample_prompt=two  words", "--input_train_bin=data/*_train_*.bin", "--output_dir", "out"]
SIGNALS = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"
ELASTIC = ["--max-restarts=3", f"--signals-to-handle={SIGNALS},SIGHUP"]


@pytest.fixture(autouse=True)
def not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class StandIns:
    """A folder of fake commands. Each records its arguments and then runs a given script."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {
            k: v for k, v in os.environ.items() if k not in ("NPROC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        }
        self.env["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        (folder / "bin").mkdir()
        self.add("torchrun", "env > $(dirname $0)/../env")
        self.add("nvidia-smi", "exit 1")

    def add(self, name: str, does: str) -> None:
        note = f'printf "%s\\0" "$@" >> "{self.folder / name}.called"; printf "\\n" >> "{self.folder / name}.called"'
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{does}\n")
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        path = self.folder / f"{name}.called"
        return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []

    def command(self, script: str, *flags: str) -> list[str]:
        return ["bash", str(LAUNCH / script), *flags]

    def run(self, script: str, *flags: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command(script, *flags)
        return subprocess.run(command, env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir()))
def test_every_script_parses(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0


def test_single_node(stand_ins, tmp_path):
    done = stand_ins.run("single_node.sh", *FLAGS, cwd=tmp_path)  # from anywhere
    assert done.returncode == 0, done.stderr
    expected = ["--standalone", "--nproc-per-node=1", *ELASTIC, "train_gpt.py", *FLAGS]
    assert stand_ins.calls("torchrun") == [expected]
    environment = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert environment["PWD"] == str(ROOT)
    assert environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"


def test_the_launchers_exit_code_is_torchruns(stand_ins):
    stand_ins.add("torchrun", "exit 7")
    assert stand_ins.run("single_node.sh").returncode == 7


@pytest.mark.parametrize(
    "env,workers",
    [({}, 3), ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 1), ({"NPROC": "4"}, 4)],
)
def test_one_worker_per_visible_gpu(stand_ins, env, workers):
    stand_ins.add("nvidia-smi", "echo GPU 0; echo GPU 1; echo GPU 2")
    stand_ins.run("single_node.sh", **env)
    assert f"--nproc-per-node={workers}" in stand_ins.calls("torchrun")[0]


def test_environment_variables_override_the_defaults(stand_ins):
    stand_ins.run("single_node.sh", NPROC="2", MAX_RESTARTS="0", OMP_NUM_THREADS="7")
    assert {"--nproc-per-node=2", "--max-restarts=0"} <= set(stand_ins.calls("torchrun")[0])
    assert "OMP_NUM_THREADS=7\n" in (stand_ins.folder / "env").read_text()
    done = stand_ins.run("single_node.sh", NPROC="all")
    assert (done.returncode, done.stderr) == (2, "error: NPROC=all must be a number of workers\n")


def test_nohup_is_respected(stand_ins):
    command = ["nohup", *stand_ins.command("single_node.sh")]
    subprocess.run(command, env=stand_ins.env, check=True, capture_output=True)
    assert f"--signals-to-handle={SIGNALS}" in stand_ins.calls("torchrun")[0]


def test_multi_node(stand_ins):
    done = stand_ins.run("multi_node.sh", *FLAGS, NNODES="2", RDZV_ENDPOINT="node0:29400", NPROC="8", RDZV_ID="a b")
    assert done.returncode == 0, done.stderr
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=node0:29400", "--rdzv-id=a b"]
    expected = ["--nnodes=2", "--nproc-per-node=8", *rendezvous, *ELASTIC, "train_gpt.py", *FLAGS]
    assert stand_ins.calls("torchrun") == [expected]


@pytest.mark.parametrize("env,missing", [({}, "NNODES"), ({"NNODES": "2"}, "RDZV_ENDPOINT")])
def test_multi_node_requires_its_variables(stand_ins, env, missing):
    done = stand_ins.run("multi_node.sh", *FLAGS, **env)
    assert done.returncode == 2 and done.stderr.startswith(f"error: set {missing}") and done.stderr.count("\n") == 1
    assert not stand_ins.calls("torchrun")


@pytest.mark.parametrize("model,batch_size", [("gpt2-124m", 16), ("gpt2-350m", 4)])
def test_t4x4(stand_ins, model, batch_size):
    done = stand_ins.run("t4x4.sh", "--compile=0", MODEL=model)
    assert done.returncode == 0, done.stderr
    flags = [f"--cfg={model}", "--dtype=float16", f"--batch_size={batch_size}", "--compile=0"]
    expected = ["--standalone", "--nproc-per-node=4", *ELASTIC, "train_gpt.py", *flags]
    assert stand_ins.calls("torchrun") == [expected]


class Slurm(StandIns):
    """A fake SLURM that runs the job in a copy of the repository's root. The fake `srun` is the run."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.root, self.output_dir = folder / "root", folder / "root" / "out"
        (self.root / "scripts").mkdir(parents=True)
        (self.root / "scripts" / "launch").symlink_to(LAUNCH)
        self.add("scontrol", "[ $1 != hostnames ] && [ $1 != show ] || printf 'node7\\nnode8\\n'")
        self.env |= {
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "32",
        }

    def leave(self, status: str | None, newest: int | None) -> str:
        """Returns the script of a run that ends with this status and this newest checkpoint."""
        mark = json.dumps({"status": status, "step": newest, "reason": ""})
        does = f"mkdir -p {self.output_dir}/checkpoints\n"
        does += f"echo '{mark}' > {self.output_dir}/status.json\n" if status else ""
        return does + (f"echo step_{newest:08d} > {self.output_dir}/checkpoints/latest\n" if newest else "")

    @property
    def requeued(self) -> bool:
        calls = [call for call in self.calls("scontrol") if call[0] == "requeue"]
        assert calls in ([], [["requeue", "123456"]])
        return bool(calls)


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_slurm_starts_one_torchrun_per_node(slurm):
    slurm.add("srun", slurm.leave("done", 10) + "echo $SRUN_CPUS_PER_TASK")
    done = slurm.run("slurm.sbatch", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert slurm.calls("scontrol") == [["show", "hostnames", "node[7-8]"]]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=node7:23456", "--rdzv-id=123456.0"]
    torchrun = ["torchrun", "--nnodes=2", "--nproc-per-node=8", *rendezvous, *ELASTIC, "train_gpt.py", *FLAGS]
    assert slurm.calls("srun") == [["--ntasks-per-node=1", "--kill-on-bad-exit=1", *torchrun]]
    assert done.stdout.startswith("32\n")


@pytest.mark.parametrize(
    "status,newest,code,again",
    [
        ("done", 30, 0, False),
        ("done", 30, 1, False),  # a signal came after the last step
        ("out of time", 20, 0, False),
        ("stopped", 20, 1, False),  # by scancel, without a warning of the time limit
        ("user error", 20, 1, False),
        ("running", 20, 1, True),  # crashed after progress
        ("running", 10, 1, False),  # crashed without progress
        (None, None, 1, False),  # ended before it locked its directory
    ],
)
def test_slurm_requeues_a_run_that_can_continue(slurm, status, newest, code, again):
    subprocess.run(["bash", "-c", slurm.leave("stopped", 10)], check=True)  # of an earlier start
    slurm.add("srun", slurm.leave(status, newest) + f"exit {code}")
    done = slurm.run("slurm.sbatch", "--output_dir=out")
    assert slurm.requeued == again, done.stdout
    assert done.returncode == (0 if status == "done" else code)
    assert f"status of the run: {status or 'never began'}; " in done.stdout


@pytest.mark.parametrize(
    "status,newest,again", [("stopped", 20, True), ("done", 30, False), ("running", 20, True), ("running", 10, False)]
)
def test_slurm_warns_the_run_before_the_time_limit(slurm, status, newest, again):
    subprocess.run(["bash", "-c", slurm.leave("stopped", 10)], check=True)
    up = slurm.folder / "up"
    on_signal = slurm.leave(status, newest) + "exit 1"
    waits = f"trap on_signal USR1\ntouch {up}\nfor i in {{1..999}}; do sleep 0.02; done"
    slurm.add("srun", f"on_signal() {{\n{on_signal}\n}}\n{waits}")
    command = slurm.command("slurm.sbatch", "--output_dir=out")
    job = subprocess.Popen(command, env=slurm.env, stdout=subprocess.PIPE, text=True)
    while not up.exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)  # like --signal=B:USR1
    out, _ = job.communicate(timeout=60)
    assert slurm.requeued == again, out
    assert job.returncode == (0 if status == "done" else 1)


def test_slurm_requires_output_dir_and_the_repository_root(slurm):
    done = slurm.run("slurm.sbatch", "--cfg=shakespeare")
    assert done.returncode == 2 and "error: set --output_dir" in done.stderr
    done = slurm.run("slurm.sbatch", *FLAGS, SLURM_SUBMIT_DIR=str(slurm.folder))
    assert done.returncode == 2 and "error: run sbatch in the root of the repository" in done.stderr
    assert not slurm.calls("srun")
