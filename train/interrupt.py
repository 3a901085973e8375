"""Requests to stop a run: signals and --max_minutes."""

from __future__ import annotations

import signal
import time
from types import FrameType

from util.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(Exception):
    """Raised on all ranks when one of them was asked to stop during an evaluation."""


class StopRequest:
    """Records that this rank was asked to stop. The training loop then stops all ranks after the same step.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP (the terminal is closed; ignored under nohup) are requests to stop. A
    second Ctrl-C ends the process at once.
    """

    def __init__(self, max_minutes: float, started: float):
        """`max_minutes` count from `started`, a time.monotonic() at the start of the process; 0 means no limit."""
        self.signal = ""
        self._deadline = started + 60 * max_minutes if max_minutes else float("inf")
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def out_of_time(self) -> bool:
        return time.monotonic() > self._deadline

    def requested(self) -> bool:
        """Returns whether this rank was signalled or is out of time."""
        return bool(self.signal) or self.out_of_time()

    def outcome(self, ranks: Ranks) -> tuple[str, str]:
        """Returns the status and the reason for status.json, the same on all ranks, of a run that was stopped."""
        signalled, late = ranks.any(bool(self.signal), self.out_of_time())
        if signalled:
            return "stopped", self.signal or "a signal to another rank"
        return ("out of time", "--max_minutes") if late else ("done", "")
