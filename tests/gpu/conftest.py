"""Shared parts of the GPU checks: their size, their time limit, and the figures of the report.

    bash scripts/bench/gpu_check.sh [--output FILE] [--minutes N] [--only TEXT]
    python -m pytest -m gpu tests/gpu

On a machine with CUDA the checks run there. Without CUDA they are rehearsed on the CPU with tiny shapes, as a part of
the default suite, and the measurements are skipped. Each check computes a value in two ways and limits the difference.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfg.config import Config, load_config
from data.shards import write_shard
from scripts.bench.common import describe, save
from train.metrics import read_records
from util.errors import UserError
from util.ranks import Ranks, close_ranks, init_ranks
from util.values import user_path

ROOT = Path(__file__).resolve().parents[2]
PERIOD = 251  # the data counts modulo this number, which a model learns in a few steps
FULL = "--n_layer=4 --n_head=8 --n_embd=512 --sequence_length=512 --batch_size=4"
QUICK = "--n_layer=1 --n_head=4 --n_embd=64 --sequence_length=32 --batch_size=2 --vocab_size=8100"
FAMILIES = {
    "gpt2": "",
    "llama": "--positions=rotary --norm=rmsnorm --mlp=swiglu --bias=0 --tie_embeddings=0 --n_kv_head=2 --qk_norm=1"
    " --logit_softcap=2",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("gpu", "checks of tests/gpu")
    options.addoption("--output", type=user_path, metavar="FILE", help="report of the figures, as JSON")
    options.addoption("--device", choices=["cuda", "cpu"], help="default: cuda if this machine has it")
    options.addoption("--minutes", type=float, default=math.inf, help="time limit; checks that start later fail")
    options.addoption("--quick", action="store_true", help="tiny shapes and no measurements; implied by --device=cpu")
    options.addoption("--large", action="store_true", help="also GPT-2 1558M: its memory beside the plan (40 GB)")


def device_of(config: pytest.Config) -> str:
    return config.getoption("--device", None) or ("cuda" if torch.cuda.is_available() else "cpu")


def is_quick(config: pytest.Config) -> bool:
    return config.getoption("--quick", False) or device_of(config) == "cpu"


class Report:
    """The JSON file of --output. It is rewritten after each check, so that an interrupted run leaves a report too."""

    def __init__(self, path: Path, device: str):
        self.path, self.started = path, time.perf_counter()
        self.content: dict[str, Any] = {**describe(device), "passed": False, "checks": [], "throughput": []}
        save(path, self.content)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        properties = dict(report.user_properties)
        result: dict[str, Any] = {"name": report.nodeid.removeprefix("tests/gpu/"), "passed": report.passed}
        result |= {"figures": properties.get("figures", {}), "commands": [*properties.get("commands", [])]}
        result["seconds"] = round(report.duration, 1)
        if report.failed:
            result["error"] = str(getattr(report.longrepr, "reprcrash", report.longrepr))
        self.content["throughput" if "test_speed" in report.nodeid else "checks"].append(result)
        self.write()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.content["passed"] = exitstatus == 0
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.perf_counter() - self.started, 1)
        save(self.path, self.content)


def pytest_configure(config: pytest.Config) -> None:
    device, minutes = device_of(config), config.getoption("--minutes", math.inf)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("error: --device=cuda: this machine has no CUDA device; use --device=cpu for a rehearsal", 2)
    if not minutes > 0:
        pytest.exit(f"error: --minutes={minutes}: must be above 0", 2)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic steps; read when cuBLAS starts
    if output := config.getoption("--output", None):
        try:
            config.pluginmanager.register(Report(output, device))
        except UserError as error:
            pytest.exit(f"error: {error}", 2)


@dataclass
class Bench:
    """The device and size of the checks, the time limit, and the commands run by the current check."""

    device: str
    quick: bool
    folder: Path
    minutes: float
    deadline: float
    commands: list[str] = field(default_factory=list)

    def shape(self) -> list[str]:
        return (QUICK if self.quick else FULL).split()

    def config(self, *flags: str) -> Config:
        return load_config([*self.shape(), f"--device={self.device}", *flags], world_size=1)

    def run(self, script: str, *flags: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the repository within the time limit and checks its exit code."""
        command = [sys.executable, str(ROOT / script), *flags]
        self.commands.append(shlex.join(command))
        left = self.deadline - time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=min(max(0, left), 86400), env=os.environ | env
            )
        except subprocess.TimeoutExpired:
            pytest.fail(f"{script} was stopped: the {self.minutes:g} minutes are over", pytrace=False)
        assert done.returncode == code, f"{script} exited with {done.returncode}: {done.stderr[-1000:].strip()}"
        return done

    def train(self, output_dir: Path, *flags: str, script: str = "train_gpt.py", **how: Any) -> list[dict[str, Any]]:
        """Runs train_gpt.py, or a script that wraps it, and returns the records of metrics.jsonl."""
        data = f"--input_train_bin={self.folder}/count_train_*.bin"
        self.run(script, data, f"--output_dir={output_dir}", f"--device={self.device}", *flags, **how)
        return read_records(output_dir / "metrics.jsonl")


@pytest.fixture(scope="package")
def gpu_session(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder, minutes = tmp_path_factory.mktemp("gpu"), pytestconfig.getoption("--minutes", math.inf)
    write_shard(folder / "count_train_000001.bin", np.arange(2_000_000) % PERIOD, 50257)
    deadline = time.perf_counter() + 60 * minutes
    return Bench(device_of(pytestconfig), is_quick(pytestconfig), folder, minutes, deadline)


@pytest.fixture
def bench(gpu_session: Bench) -> Iterator[Bench]:
    """The settings of a check. Fails the check if the time is over."""
    if time.perf_counter() > gpu_session.deadline:
        pytest.fail(f"skipped: the {gpu_session.minutes:g} minutes are over", pytrace=False)
    gpu_session.commands.clear()
    torch._dynamo.reset()  # it compiles only a handful of variants of one function per process
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32 in comparisons
    yield gpu_session
    torch.set_float32_matmul_precision(precision)
    if gpu_session.device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def one_rank(gpu_session: Bench) -> Iterator[Ranks]:
    """A process group of this process alone, which FSDP needs."""
    yield init_ranks(gpu_session.device, sharded=True)
    close_ranks()


@pytest.fixture
def figures(request: pytest.FixtureRequest, gpu_session: Bench) -> Callable[..., None]:
    """A function `figures({name: value}, at_most=limit)` that adds values to the report and then checks them.

    Without a limit the values are only reported.
    """
    noted: dict[str, dict[str, float | None]] = {}
    request.node.user_properties += [("figures", noted), ("commands", gpu_session.commands)]

    def note(values: dict[str, float], at_most: float | None = None) -> None:
        for name, value in values.items():
            # JSON has no infinity and no NaN.
            noted[name] = {"measured": value if math.isfinite(value) else None, "at_most": at_most}
        assert at_most is None or all(value <= at_most for value in values.values()), f"{values}, at most {at_most}"

    return note
