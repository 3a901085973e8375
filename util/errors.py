"""The exceptions that end a command with one line instead of a traceback, and the exit code of each."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EREMOTEIO)
MACHINE_REFUSES = (
    *DISK_REFUSES,
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR),
)


class UserError(Exception):
    """A mistake in a flag or a file. The message is one line: what is wrong, where, and the way out."""

    exit_code = 2
    status = "user error"  # in status.json


class DivergedError(UserError):
    """Training has come to numbers that are none, or jumps about, and going back did not help."""

    exit_code = 3
    status = "diverged"


class StorageError(UserError):
    """What the disk refuses or has lost."""

    exit_code = 5
    status = "storage error"


def storage_error(error: OSError) -> StorageError | None:
    """What the machine refused, a full disk say, as one line; None if the error is of another kind."""
    if error.errno not in MACHINE_REFUSES:
        return None
    return StorageError(f"{error.filename or 'a file could not be read or written'}: {error.strerror}")


@contextmanager
def user_errors(path: Path | str) -> Iterator[None]:
    """Converts an OSError in the block into the UserError `path: what the system says`."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was most likely meant to be, or None if nothing is near."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def quote(value: Any) -> str:
    """A value as a message quotes it: on one line, and of what is endless only the beginning."""
    if isinstance(value, int) and abs(value) >= 2**100:
        value = hex(value)  # Python writes no decimal number of more than 4300 digits
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:60]}…"


def exit_with(error: UserError) -> NoReturn:
    """Prints the error as one line and leaves with its exit code.

    Under torchrun every rank meets the same mistake, and the launcher stops all of them as soon as
    the first has gone. So rank 0 speaks, the others wait for it, and speak only if they are still
    there, which means that the mistake was theirs alone. torchrun's closing report quotes the line
    because it is left in the error file that torchrun reads.
    """
    rank = int(os.environ.get("RANK", 0))
    line = " ".join(str(error).split())
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, which the loop takes as a wish to stop
        time.sleep(10)
        line = f"rank {rank}: {line}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(path, "w") as f:
            json.dump({"message": {"message": line, "extraInfo": details}}, f)
    # Not sys.exit: a thread that prefetches or a half-built process group must not delay the exit.
    sys.stdout.flush()
    os._exit(error.exit_code)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def __init__(self, **kwargs: Any):
        super().__init__(**({"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError into its one line and exit code, Ctrl-C into the customary 130.

    So too what the machine refuses, a full disk say, wherever it happens.
    """
    try:
        yield
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if (refused := storage_error(error)) is None:
            raise
        exit_with(refused)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_command(main: Callable[[], int | None], teardown: bool = True) -> NoReturn:
    """Runs a command's `main` and exits with what it returns.

    Without `teardown` it leaves at once, also after an exception: gloo's threads, which live as long as anything still
    holds the process group, may want Python while the interpreter is taken down, and abort a run that is done
    (pytorch#179291); and a thread that still waits for another rank must not keep torchrun from seeing the failure.
    """
    code = 1
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a command
    try:
        with one_line_errors():
            code = main() or 0
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's last flush may go
        code = 128 + signal.SIGPIPE
    except SystemExit as e:  # Ctrl-C
        code = int(e.code or 0)
    except Exception:
        if teardown:
            raise
        traceback.print_exc()
    if not teardown:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
