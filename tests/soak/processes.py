"""The processes of a run: the launcher and its workers, found in /proc (Linux only)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def processes_of(output_dir: Path) -> dict[int, int | str]:
    """Finds the living processes of a run by their command lines.

    Returns process id → the rank of a worker, or "torchrun", or "script" (a shell script that launches).
    """
    found: dict[int, int | str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if f"--output_dir={output_dir}" not in words:
                continue
            variables = (process / "environ").read_text().split("\0")
        except OSError:
            continue  # it has just ended
        ranks = [int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")]
        found[int(process.name)] = ranks[0] if ranks else "script" if words[0] == "bash" else "torchrun"
    return found


def workers_of(output_dir: Path) -> dict[int, int]:
    """Returns rank → process id."""
    return {rank: pid for pid, rank in processes_of(output_dir).items() if isinstance(rank, int)}


def all_gone(output_dir: Path, seconds: float) -> bool:
    """Waits at most `seconds` until no process of the run is left, and returns whether that happened."""
    deadline = time.monotonic() + seconds
    while processes_of(output_dir) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not processes_of(output_dir)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Sends a signal to all of these processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(output_dir: Path, seconds: float) -> None:
    """Kills every process of the run; gives up after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(output_dir)) and time.monotonic() < deadline:
        send(signal.SIGKILL, left)
        time.sleep(0.02)
