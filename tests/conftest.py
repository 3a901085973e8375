"""What tests share: tiny learnable shards and the real training command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.shards import write_shard
from model.formats.pretrained import load_model
from scripts.soak import trace_of

pytest_plugins = ["tests.fault_table"]

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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two training shards and one of validation: counting modulo the vocabulary, so it can be learned."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(20_000) % VOCAB
    write_shard(folder / "count_val_000000.bin", tokens[:3000], VOCAB)
    write_shard(folder / "count_train_000001.bin", tokens[3000:9000], VOCAB)
    write_shard(folder / "count_train_000002.bin", tokens[9000:], VOCAB)
    return folder


class Trainer:
    """Starts `train_gpt.py`, or a script that wraps it, on the tiny shards, directly or under torchrun."""

    def __init__(self, shards: Path):
        self.shards = shards

    def command(
        self, output_dir: Path, *flags: str, ranks: int = 1, restarts: int = 0, script: str = SCRIPT
    ) -> list[str]:
        data = [f"--input_train_bin={self.shards}/*_train_*.bin", f"--input_val_bin={self.shards}/*_val_*.bin"]
        python = [sys.executable]
        if ranks > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            python += [f"--max-restarts={restarts}"]
        return [*python, script, *TINY, *data, f"--output_dir={output_dir}", *flags]

    def start(
        self,
        output_dir: Path,
        *flags: str,
        ranks: int = 1,
        restarts: int = 0,
        script: str = SCRIPT,
        fault: str = "",
        env: dict[str, str] | None = None,
        **popen: Any,
    ) -> subprocess.Popen[str]:
        """`fault` is a RAWGPT_FAULT (util/files.py); `popen` are arguments of subprocess.Popen."""
        return subprocess.Popen(
            self.command(output_dir, *flags, ranks=ranks, restarts=restarts, script=script),
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAWGPT_FAULT": fault, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **popen,
        )

    def run(self, output_dir: Path, *flags: str, code: int = 0, **how: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(output_dir, *flags, **how)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"exit {process.returncode} instead of {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def trainer(shards: Path) -> Trainer:
    return Trainer(shards)


def read_metrics(output_dir: Path) -> list[dict]:
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict]]:
    return read_metrics


@pytest.fixture(scope="session")
def trace() -> Callable[[Path], list[dict]]:
    """The numbers of a run that must not depend on how it was interrupted, in full precision."""
    return trace_of


@pytest.fixture(scope="session")
def parameters_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The parameters in a checkpoint, whole, whoever wrote it."""
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
        raise TimeoutError("the run neither got there nor ended")

    return wait


@pytest.fixture(scope="session")
def kill_all() -> Callable[[subprocess.Popen[str]], None]:
    def kill(process: subprocess.Popen[str]) -> None:
        """SIGKILLs a run, launcher and workers alike; torchrun puts each worker into a session of its own."""
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = listed.read_text().split() if listed.exists() else []
        for pid in [process.pid, *map(int, children)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()

    return kill
