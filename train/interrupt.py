"""Requests to stop a run: signals and --max_minutes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from train.rank_log import note
from train.run_dir import write_status
from util.ctrl_c import EXIT_CODE
from util.launcher import launched_rank
from util.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(Exception):
    """Raised on all ranks when one of them was asked to stop during an evaluation."""


class StopRequest:
    """Records that this rank was asked to stop. The training loop then stops all ranks after the same step.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP (the terminal is closed; ignored under nohup) are requests to stop. A
    second Ctrl-C ends the process at once.
    """

    def __init__(self, max_minutes: float, started: float, output_dir: Path):
        """`max_minutes` count from `started`, a time.monotonic() at the start of the process; 0 means no limit."""
        self.signal = ""
        self.output_dir = output_dir
        self._deadline = started + 60 * max_minutes if max_minutes else float("inf")
        # torchrun passes a second Ctrl-C on as SIGTERM.
        self._second_ctrl_c = {signal.SIGINT, *([signal.SIGTERM] if "TORCHELASTIC_RUN_ID" in os.environ else [])}
        pipe, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(pipe,), name="signals", daemon=True).start()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal == "SIGINT" and number in self._second_ctrl_c:
            time.sleep(60)  # the thread ends the process; a collective that fails meanwhile prints no traceback
        self.signal = signal.Signals(number).name

    def _answer(self, pipe: int) -> None:
        """Answers signals at once. Python's handlers wait while the main thread waits for a GPU or for another rank."""
        stopping = interrupted = False
        while received := os.read(pipe, 1):
            number = received[0]
            if interrupted and number in self._second_ctrl_c:
                end_interrupted(self.output_dir)
            if number in SIGNALS and not stopping:
                way_out = "; press Ctrl-C again to stop now without one" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                _say(f"{name}: stopping; a checkpoint is saved after this step or the next{way_out}")
                stopping = True
            interrupted |= number == signal.SIGINT

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


def end_on_ctrl_c(output_dir: Path) -> None:
    """Makes Ctrl-C end the process at once, until training begins and StopRequest handles it."""
    signal.signal(signal.SIGINT, lambda number, frame: end_interrupted(output_dir))


def end_interrupted(output_dir: Path) -> NoReturn:
    """Ends the process at once, without a checkpoint. status.json then says `interrupted`."""
    with suppress(OSError):
        write_status(output_dir, "interrupted", reason="Ctrl-C")
    _say("interrupted")
    os._exit(EXIT_CODE)


def _say(line: str) -> None:
    """Prints a line on rank 0 from a signal handler or a thread: print() could interrupt itself in the main thread."""
    if launched_rank() == 0:
        with suppress(OSError, RuntimeError):
            start = "\n" if sys.stderr.isatty() else ""  # after a progress bar, or the terminal's ^C
            os.write(2, f"{start}{line}\n".encode())
            note(line)
