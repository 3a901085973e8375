"""Timing and the report of the GPU speed benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.bench.common import describe, save
from scripts.bench.gpu_table import number
from util.ranks import Ranks, init_ranks


class Bench:
    """The device, the time limit, and the report, which is saved after each result."""

    def __init__(self, output: Path, seconds: float, device: str, tiny: bool, nanogpt: Path | None):
        self.output, self.seconds, self.device, self.tiny, self.nanogpt = output, seconds, device, tiny, nanogpt
        self.start, self.part = time.perf_counter(), ""
        self.report: dict[str, Any] = {**describe(device), "tiny": tiny, "figures": {}, "profiles": {}}
        self.report |= {"failed": {}, "left_out": {}}
        self.ranks: Ranks | None = None

    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self.start

    def save(self) -> None:
        """Writes the report."""
        self.report["seconds"] = round(self.elapsed(), 1)
        save(self.output, self.report)

    def note(self, name: str, value: float | str) -> None:
        """Prints and saves one result of the current part."""
        self.report["figures"].setdefault(self.part, {})[name] = value
        self.save()
        print(f"{self.elapsed():6.1f} s  {self.part}: {name}: {number(value)}", flush=True)

    def wait(self) -> None:
        """Waits until the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def rank(self) -> Ranks:
        """Returns the only rank. The first call starts the process group, which stage 3 needs."""
        self.ranks = self.ranks or init_ranks(self.device, sharded=True)
        return self.ranks

    def time_of(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Returns the median seconds of a call, after three warm-up calls. On CUDA it is measured with events."""
        repeats = 2 if self.tiny else repeats
        for _ in range(3):
            work()
        self.wait()
        if self.device != "cuda":
            marks = [time.perf_counter()]
            for _ in range(repeats):
                work()
                marks.append(time.perf_counter())
            return statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        self.wait()
        return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


class LeftOut(Exception):
    """Raised by a part that cannot run; the message is the reason."""
