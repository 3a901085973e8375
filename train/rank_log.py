"""Log files of the ranks: logs/rank_N.log holds what each rank printed, with the time, and its last stacks."""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from util.errors import UserError
from util.files import reopen
from util.ranks import Ranks

_log: IO[str] | None = None


class _Console:
    """stdout or stderr, copied to the log. A console that can no longer be written counts as a closed terminal."""

    def __init__(self, stream: Any):
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        if "\r" not in text:  # a progress bar
            *lines, self._line = (self._line + text).split("\n")
            for line in filter(None, lines):
                note(line)
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *text: str) -> None:
        try:
            getattr(self._stream, method)(*text)
        except OSError:
            self._stream = open(os.devnull, "w")
            os.kill(os.getpid(), signal.SIGHUP)  # saves and stops; under nohup training continues

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_log(output_dir: Path, ranks: Ranks) -> None:
    """Copies stdout, stderr and the stacks of a fatal signal to this rank's log from now on."""
    global _log
    _log = open(log_path(output_dir, ranks.rank), "a+", errors="replace", buffering=1)
    faulthandler.enable(_log)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    note(
        f"rank {ranks.rank} of {ranks.world_size} on {platform.node()}, process {os.getpid()}, restart {restart},"
        f" {ranks.device}, torch {torch.__version__}"
    )
    sys.stdout, sys.stderr = _Console(sys.stdout), _Console(sys.stderr)


def restore_log(output_dir: Path, ranks: Ranks) -> None:
    """Writes the log again if the directory was deleted."""
    global _log
    if _log is not None:
        _log = reopen(_log, log_path(output_dir, ranks.rank))
        faulthandler.enable(_log)


def log_path(output_dir: Path, rank: int) -> Path:
    return output_dir / "logs" / f"rank_{rank}.log"


def note(line: str) -> None:
    """Writes a line to the log only."""
    if _log is not None:
        with suppress(OSError):  # if the disk is full, the next save reports it
            _log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def note_stacks() -> None:
    """Writes the stack of every thread to the log."""
    if _log is not None:
        faulthandler.dump_traceback(_log)


def record_memory(device: torch.device) -> None:
    """Makes torch record where in the code each piece of GPU memory in use was allocated."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history("state", stacks="python")


def out_of_memory(error: torch.OutOfMemoryError) -> UserError:
    """Writes a snapshot of the GPU's memory beside the log, and returns the error for the user."""
    return UserError(
        f"out of memory on the GPU ({str(error).split('.')[0]}); lower --batch_size (--total_batch_size stays the same,"
        f" with more micro-steps), or run scripts/plan.py to see what --activation_checkpointing and --zero_stage"
        f" save{_dump_memory()}"
    )


def _dump_memory() -> str:
    """Writes the snapshot and returns where it is, as the end of a message."""
    if _log is None:
        return ""
    path = Path(_log.name.replace("rank_", "oom_rank_")).with_suffix(".pickle")
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as e:  # must not hide the error to be reported
        return f" (no memory snapshot: {e})"
    return f"; {path} shows what the memory was used for, on https://docs.pytorch.org/memory_viz"
