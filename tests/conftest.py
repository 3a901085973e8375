"""Shared fixtures: tiny learnable shards and the real training command."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.shards import write_shard
from model.formats.pretrained import load_model
from tests.soak.trace import read_trace

pytest_plugins = ["tests.fault_table"]

# A shell starts background jobs with SIGINT ignored, and so would be every process that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_gpt.py")
VOCAB = 251
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    f"--vocab_size={VOCAB}",
    "--sequence_length=32",
    "--batch_size=2",
    "--total_batch_size=256",
    "--num_iterations=20",
    "--learning_rate=1e-3",
    "--warmup_iters=4",
    "--val_loss_every=5",
    "--save_every_niter=5",
    "--device=cpu",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest file first, so that with two workers it is not the last."""
    items.sort(key=lambda item: item.path.name != "test_parallel.py")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two training shards and one validation shard: tokens count modulo the vocabulary size."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(20_000) % VOCAB
    write_shard(folder / "count_val_000000.bin", tokens[:3000], VOCAB)
    write_shard(folder / "count_train_000001.bin", tokens[3000:9000], VOCAB)
    write_shard(folder / "count_train_000002.bin", tokens[9000:], VOCAB)
    return folder


@dataclass(frozen=True)
class Python:
    """The interpreter for runs, and its environment variables."""

    executable: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a script of the project, or `-m` and a module, with its arguments, and checks the exit code.

        An error of a user must be one line.
        """
        env = {**os.environ, "OMP_NUM_THREADS": "1", **self.env}
        command = [self.executable, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == code, f"exit {done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
        if code:
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    """An interpreter that starts with torch already imported (tests/warm_python.py)."""
    if sys.platform != "linux" or "RAWGPT_COLD_START" in os.environ:
        yield Python()
        return
    script, address = ROOT / "tests" / "warm_python.py", f"warm_python_{os.getpid()}_{time.monotonic_ns()}"
    client = tmp_path_factory.mktemp("python") / "warm_python"
    client.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(str(script))} "$@"\n')
    client.chmod(0o755)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script), address], env=env, start_new_session=True, **pipes) as server:
        assert server.stdout.readline()  # it listens
        yield Python(str(client), {"WARM_PYTHON": address, "PYTHON_EXEC": str(client)})  # PYTHON_EXEC is for torchrun
        server.stdin.close()


class Trainer:
    """Starts `train_gpt.py`, or a script that wraps it, on the tiny shards, directly or under torchrun."""

    def __init__(self, shards: Path, warm_python: Python):
        self.shards, self.warm_python = shards, warm_python

    def command(
        self,
        output_dir: Path,
        *flags: str,
        ranks: int = 1,
        restarts: int = 0,
        script: str = SCRIPT,
        python: str = sys.executable,
    ) -> list[str]:
        data = [f"--input_train_bin={self.shards}/*_train_*.bin", f"--input_val_bin={self.shards}/*_val_*.bin"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher = [*torchrun, f"--max-restarts={restarts}"] if ranks > 1 else []
        muon = "--optimizer=muon" in flags  # which does not take --learning_rate
        tiny = [flag for flag in TINY if not (muon and flag.startswith("--learning_rate="))]
        return [python, *launcher, script, *tiny, *data, f"--output_dir={output_dir}", *flags]

    def start(
        self,
        output_dir: Path,
        *flags: str,
        ranks: int = 1,
        restarts: int = 0,
        script: str = SCRIPT,
        fault: str = "",
        env: dict[str, str] | None = None,
        python: Python | None = None,
        **popen: Any,
    ) -> subprocess.Popen[str]:
        """Starts a run in a new interpreter, or in `python`. `fault`: see util/files.py. `popen`: for Popen."""
        python = python or Python()
        command = self.command(
            output_dir, *flags, ranks=ranks, restarts=restarts, script=script, python=python.executable
        )
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAWGPT_FAULT": fault, **python.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **popen,
        )

    def run(self, output_dir: Path, *flags: str, code: int = 0, **how: Any) -> subprocess.CompletedProcess[str]:
        """Runs to the end and checks the exit code.

        The warm interpreter is used, unless the process is prepared in a way that concerns the interpreter too.
        """
        cold = "preexec_fn" in how or "TORCH_LOGS" in (how.get("env") or {})
        process = self.start(output_dir, *flags, python=None if cold else self.warm_python, **how)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"exit {process.returncode} instead of {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def trainer(shards: Path, warm_python: Python) -> Trainer:
    return Trainer(shards, warm_python)


@pytest.fixture(scope="session")
def imports_of() -> Callable[..., tuple[subprocess.CompletedProcess[str], set[str]]]:
    """A function that runs a command in a cold interpreter and also returns the modules that it has imported."""

    def run(*words: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
        command = [sys.executable, "-X", "importtime", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
        done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
        return done, imported

    return run


def read_metrics(output_dir: Path) -> list[dict]:
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict]]:
    return read_metrics


@pytest.fixture(scope="session")
def trace() -> Callable[[Path], list[dict]]:
    """A function that returns the numbers of a run that must not depend on interruptions."""
    return read_trace


@pytest.fixture(scope="session")
def parameters_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """A function that returns the full parameters of a checkpoint."""
    return lambda path: {n: p.detach() for n, p in load_model(path, torch.device("cpu"))[0].named_parameters()}


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., bool]:
    def wait(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120) -> bool:
        """Polls until the condition holds (True) or the process has ended (False)."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition():
                return True
            if process.poll() is not None:
                return False
            time.sleep(0.001)
        raise TimeoutError("the condition did not become true, and the run did not end")

    return wait


@pytest.fixture(scope="session")
def kill_all() -> Callable[[subprocess.Popen[str]], None]:
    def kill(process: subprocess.Popen[str]) -> None:
        """Kills launcher and workers. torchrun starts each worker in a separate session."""
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = listed.read_text().split() if listed.exists() else []
        for pid in [process.pid, *map(int, children)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()

    return kill
