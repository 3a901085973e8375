"""Faults to order, by which tests hold what docs/reliability.md promises. Without RAWGPT_FAULT nothing happens here.

RAWGPT_FAULT is POINT[@RANK][#TIME]=WHAT: when that rank (default: any) passes that point for that time (default: the
first), an error of the operating system by its name (ENOSPC, EIO ...), or KILL or STOP, the signal, to the process
itself. After torchrun has restarted the workers it happens no more.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

ORDER = re.compile(r"(?P<point>[a-z ]+)(@(?P<rank>\d+))?(#(?P<time>\d+))?=(?P<what>[A-Z]+)")
_ordered = ORDER.fullmatch(os.environ.get("RAWGPT_FAULT", ""))
_times = 0


def fault_point(name: str, path: Path | None = None) -> None:
    """A moment at which the system may refuse; called just before what would then fail, of the file `path`.

    Raises OSError if that is ordered.
    """
    global _times
    if _ordered is None or _ordered["point"] != name or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if _ordered["rank"] not in (None, os.environ.get("RANK", "0")):
        return
    _times += 1
    if _times != int(_ordered["time"] or 1):
        return
    if _ordered["what"] in ("KILL", "STOP"):
        os.kill(os.getpid(), signal.Signals[f"SIG{_ordered['what']}"])
        return
    number = getattr(errno, _ordered["what"])
    raise OSError(number, os.strerror(number), str(path) if path else None)
