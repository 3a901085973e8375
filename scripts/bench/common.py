"""Shared parts of the GPU benchmarks: a run without data or files, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfg.config import Config
from model.gpt import InitialValue
from train.metrics import StepResult
from train.optim import make_optimizer
from train.parallel import ParallelModel, parallelize
from train.stability import LossScaler, SpikeGuard
from train_gpt import train_step
from util.device import device_name
from util.errors import UserError
from util.files import write_atomically
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """Everything that `train_gpt.train_step` needs, in this process: no data, no output directory, no checkpoints."""

    def __init__(self, config: Config, ranks: Ranks, initial_value: InitialValue | None = None):
        self.config, self.ranks = config, ranks
        self.model: ParallelModel = parallelize(config, ranks, initial_value)
        self.optimizer = make_optimizer(self.model.gpt, config, ranks.world_size)
        self.scaler, self.guard = LossScaler(config), SpikeGuard(config)

    def step(self, k: int, batch: Tensor) -> StepResult:
        """Takes training step `k` on `batch` (rows, sequence_length + 1)."""
        parts = self.model, self.optimizer, self.scaler, self.guard
        return train_step(k, batch[:, :-1], batch[:, 1:], *parts, self.config, self.ranks, end_of_text=None)


def describe(device: str) -> dict[str, Any]:
    """Returns what a measurement depends on: hardware, versions, commit, command."""
    cuda = device == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else ""
    return {
        "hardware": device_name(torch.device(device)),
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        # A system cuDNN on this path replaces the one that is installed with torch.
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or None,
        "command": shlex.join(sys.argv),
    }


def _output(program: str, *arguments: str) -> str:
    """Returns what a program prints; "" if it is missing or fails."""
    if not shutil.which(program):
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def save(path: Path, report: dict[str, Any]) -> None:
    """Writes the report as JSON."""
    try:
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written: {error.strerror}") from error
