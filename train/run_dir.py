"""The directory of a run: its lock, its status and config.yaml. train/run_facts.py has run.json."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from train.run_facts import write_facts
from util.errors import DISK_REFUSES, DivergedError, StorageError, UserError, refuse_broken_link, storage_error
from util.files import fault_point, is_at, take_lock, write_atomically
from util.ranks import Ranks

_held_lock: IO[str] | None = None
_status = ""  # the last one written


def lock_output_dir(output_dir: Path) -> None:
    """Creates the run's directory, locks it while this process lives, and sets its status to running.

    The kernel drops the lock when the process ends, so a lock never becomes stale.
    """
    global _held_lock
    refuse_broken_link(output_dir, "output_dir")
    for name in ("config.yaml", "metrics.jsonl"):
        if (output_dir / name).exists() and not (output_dir / "checkpoints").is_dir():
            raise UserError(
                f"--output_dir={output_dir}: contains {name} but no checkpoints/, so it is not a rawgpt run;"
                f" choose another directory"
            )
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


def restore_output_dir(output_dir: Path, config_yaml: str) -> bool:
    """Creates and locks the directory again if it was deleted or moved during the run. Returns whether it was."""
    lock = output_dir / ".lock"
    if _held_lock is None or _held_lock.name != str(lock) or is_at(_held_lock, lock):
        return False
    gone = f"--output_dir={output_dir} was deleted or moved while this run used it"
    try:
        lock_output_dir(output_dir)
        write_config(output_dir, config_yaml)
        write_facts(output_dir)
    except (UserError, OSError) as e:
        raise StorageError(f"{gone}, and cannot be restored: {e}") from e
    print(f"warning: {gone}; created again with config.yaml, metrics.jsonl and logs; a checkpoint follows")
    return True


def write_status(output_dir: Path, status: str, step: int | None = None, reason: str = "") -> None:
    """Writes status.json, for scripts: torchrun exits with 1 whatever its workers exit with.

    The status is one of: running (if no process is, it crashed or was killed), done, stopped (by a signal, with a
    checkpoint), out of time (--max_minutes, with a checkpoint), interrupted (by Ctrl-C, without a checkpoint), user
    error, diverged, storage error. Only the process that has locked the directory writes the file.
    """
    global _status
    if _held_lock is not None and is_at(_held_lock, output_dir / ".lock"):
        content = {"status": status, "step": step, "reason": reason}
        _status = status  # before it can be read from the file
        write_atomically(output_dir / "status.json", (json.dumps(content) + "\n").encode())


def is_running() -> bool:
    """Returns whether the status of the run is still `running`."""
    return _status == "running"


def refuse_restart_after_divergence(output_dir: Path) -> None:
    """Raises DivergedError again if torchrun restarted a run that had diverged: it would only diverge again."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        with suppress(OSError, ValueError, KeyError, TypeError):
            status = json.loads((output_dir / "status.json").read_text())
            if status["status"] == DivergedError.status:
                raise DivergedError(status["reason"])


@contextmanager
def status_on_error(output_dir: Path) -> Iterator[None]:
    """Writes the line of a UserError, or of an operating-system error, into status.json and raises it."""
    try:
        yield
    except (UserError, OSError) as error:
        line = error if isinstance(error, UserError) else storage_error(error)
        if line is None:
            raise
        with suppress(OSError):  # if the disk is full, the error says so already
            write_status(output_dir, line.status, reason=str(line))
        raise line from error


def check_shared(output_dir: Path, ranks: Ranks) -> None:
    """Raises UserError if `output_dir` is not one shared folder: every rank writes its part of a checkpoint."""
    mark = output_dir / ranks.on_main(lambda: f".shared_{os.getpid()}_{time.time_ns()}")
    ranks.on_main(lambda: mark.write_bytes(b""))
    seen = ranks.gather(mark.exists())
    ranks.on_main(lambda: mark.unlink())
    if not all(seen):
        raise UserError(
            f"--output_dir={output_dir}: rank {seen.index(False)} and rank 0 see different folders; every rank"
            f" writes its part of a checkpoint, so use storage that all nodes share"
        )


def write_config(output_dir: Path, config_yaml: str) -> None:
    """Writes the flags of the run as config.yaml, which `--cfg=PATH` reads."""
    fault_point("config", output_dir / "config.yaml")
    write_atomically(output_dir / "config.yaml", config_yaml.encode())
