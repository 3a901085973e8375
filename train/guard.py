"""What ends a run before its time: a signal, the clock. And one run per output directory."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from util.errors import DISK_REFUSES, DivergedError, StorageError, UserError, storage_error
from util.files import take_lock, write_atomically
from util.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):
    """Some rank was asked to stop, and all of them have left what they were doing."""


class StopRequest:
    """Remembers that this rank was asked to stop; the loop lets all ranks agree on the step.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP (the terminal is closed; not under nohup) ask; a second Ctrl-C
    ends the process at once.
    """

    def __init__(self, max_minutes: float, since: float):
        """`max_minutes` count from `since`, a time.monotonic() at the start of the process; 0 is no limit."""
        self.reason = ""
        self._deadline = since + 60 * max_minutes if max_minutes else float("inf")
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def votes(self) -> list[float]:
        """[was signalled, is out of time], as numbers that can be summed over ranks."""
        return [float(bool(self.reason)), float(time.monotonic() > self._deadline)]


_held_lock: IO[str] | None = None


def claim_output_dir(output_dir: Path) -> None:
    """Makes the run's directory, locks it for as long as this process lives, and marks it as running.

    The kernel drops the lock with the process, so none is left stale. Raises UserError if the
    directory cannot be written, or another process trains into it, StorageError if the disk is full or fails.
    """
    global _held_lock
    for name in ("config.yaml", "metrics.jsonl"):
        if (output_dir / name).exists() and not (output_dir / "checkpoints").is_dir():
            raise UserError(f"--output_dir={output_dir} holds a {name} that is no run's; choose another directory")
    try:
        for folder in ("checkpoints", "samples", "logs"):
            (output_dir / folder).mkdir(parents=True, exist_ok=True)
        lock, holder = take_lock(output_dir / ".lock")
        if not holder:
            _held_lock = lock
            write_status(output_dir, "running")
    except OSError as e:
        kind = StorageError if e.errno in DISK_REFUSES else UserError
        raise kind(f"--output_dir={output_dir} cannot be written: {e.strerror}") from e
    if holder:
        raise UserError(
            f"--output_dir={output_dir} is in use by another run (process {holder}); wait for it, or choose another"
        )


def write_status(output_dir: Path, status: str, step: int | None = None, reason: str = "") -> None:
    """Says in status.json how the run stands, for scripts: torchrun's exit code is 1 whatever its workers' were.

    running (if nobody is, it crashed or was killed), done, stopped (by a signal, with a checkpoint), out of time
    (--max_minutes, with a checkpoint), user error, diverged or storage error. Only the process that has claimed the
    directory writes it.
    """
    if _held_lock is not None:
        content = {"status": status, "step": step, "reason": reason}
        write_atomically(output_dir / "status.json", (json.dumps(content) + "\n").encode())


def stay_diverged(output_dir: Path) -> None:
    """Raises DivergedError again if torchrun has restarted a run that ended with it, and would only repeat it."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        with suppress(OSError, ValueError, KeyError, TypeError):
            status = json.loads((output_dir / "status.json").read_text())
            if status["status"] == DivergedError.status:
                raise DivergedError(status["reason"])


@contextmanager
def mistakes_noted(output_dir: Path) -> Iterator[None]:
    """Leaves the one line of a UserError, or of what the machine refuses, also in status.json."""
    try:
        yield
    except (UserError, OSError) as error:
        line = error if isinstance(error, UserError) else storage_error(error)
        if line is None:
            raise
        with suppress(OSError):  # a full disk is its own message
            write_status(output_dir, line.status, reason=str(line))
        raise line from error


def check_shared(output_dir: Path, ranks: Ranks) -> None:
    """Raises UserError if `output_dir` is another folder on some rank: each writes its own part of a checkpoint."""
    mark = output_dir / ranks.on_main(lambda: f".shared_{os.getpid()}_{time.time_ns()}")
    ranks.on_main(lambda: mark.write_bytes(b""))
    seen = ranks.gather(mark.exists())
    ranks.on_main(lambda: mark.unlink())
    if not all(seen):
        raise UserError(
            f"--output_dir={output_dir} of rank {seen.index(False)} is not that of rank 0; every rank writes its part"
            f" of a checkpoint, so it must be on storage that all nodes share"
        )
