"""Ctrl-C while a command starts. This module imports little, so that a command can import it first."""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, as in shells


def exit_on_ctrl_c() -> None:
    """Makes Ctrl-C end the process with one word and exit code 130, until `raise_on_ctrl_c`.

    Commands call it before their imports, which take seconds: a KeyboardInterrupt there would print a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_on_ctrl_c() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, so that a command can clean up."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)
