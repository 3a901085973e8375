"""What a rank says, kept in logs/rank_N.log with the time: the last lines tell what it was doing when it failed."""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from util.ranks import Ranks

_log: TextIO | None = None


class _Console:
    """stdout or stderr, copied to the log. If nobody reads it any longer, that counts as a closed terminal."""

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

    def _try(self, what: str, *text: str) -> None:
        try:
            getattr(self._stream, what)(*text)
        except OSError:
            self._stream = open(os.devnull, "w")
            os.kill(os.getpid(), signal.SIGHUP)  # ends well; under nohup it goes on

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_log(output_dir: Path, ranks: Ranks) -> None:
    """From now on stdout, stderr and the stacks of a fatal signal are also in this rank's log."""
    global _log
    _log = open(path_of(output_dir, ranks.rank), "a", errors="replace", buffering=1)
    faulthandler.enable(_log)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    note(
        f"rank {ranks.rank} of {ranks.world_size} on {platform.node()}, process {os.getpid()}, restart {restart},"
        f" {ranks.device}, torch {torch.__version__}"
    )
    sys.stdout, sys.stderr = _Console(sys.stdout), _Console(sys.stderr)


def path_of(output_dir: Path, rank: int) -> Path:
    return output_dir / "logs" / f"rank_{rank}.log"


def note(line: str) -> None:
    """A line for the log alone."""
    if _log is not None:
        with suppress(OSError):  # a full disk must not end a run here; it will where it matters
            _log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def note_stacks() -> None:
    """What every thread is doing, for the log."""
    if _log is not None:
        faulthandler.dump_traceback(_log)


def record_memory() -> None:
    """From now on torch notes where in the code each piece of GPU memory that is in use was taken."""
    torch.cuda.memory._record_memory_history("state", stacks="python")


def dump_memory() -> str:
    """Leaves what is in the GPU's memory beside the log, for pytorch.org/memory_viz; says so, as the end of a line."""
    if _log is None:
        return ""
    path = Path(_log.name.replace("rank_", "oom_rank_")).with_suffix(".pickle")
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as e:  # which is not the failure to be reported
        return f" (no memory snapshot: {e})"
    return f"; {path} has what the memory was used for, for https://docs.pytorch.org/memory_viz"
