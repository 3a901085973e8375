"""Errors that end a command with one line instead of a traceback, and their exit codes.

Functions that read user input raise UserError. Functions that read or write files may raise OSError; the command turns
a full or failing disk into StorageError.
"""

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

from util.ctrl_c import EXIT_CODE, raise_on_ctrl_c
from util.values import parse_count, user_path

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EREMOTEIO)
MACHINE_REFUSES = (
    *DISK_REFUSES,
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR),
)


class UserError(Exception):
    """An error in a flag or a file. The message is one line: where, what is wrong, how to fix it."""

    exit_code = 2
    status = "user error"  # in status.json


class DivergedError(UserError):
    """Training has diverged, and rolling back did not help."""

    exit_code = 3
    status = "diverged"


class StorageError(UserError):
    """A file could not be read or written: a full disk, missing permissions, lost data."""

    exit_code = 5
    status = "storage error"


def storage_error(error: OSError) -> StorageError | None:
    """Returns the error as a StorageError if the machine caused it (a full disk, for example), otherwise None."""
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


def refuse_broken_link(path: Path, flag: str) -> None:
    """Raises UserError if the output `path`, or a folder above it, is a symbolic link to nothing.

    The target is not created: it may be on a disk that is not mounted.
    """
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise UserError(
                f"--{flag}={path}: {link} is a link to {os.readlink(link)}, which does not exist; create it or"
                f" remove the link"
            )


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate most similar to `word`, or None if none is similar."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def quote(value: Any) -> str:
    """Formats a value for an error message: one line, long values shortened."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:60]}…"


def exit_with(error: UserError) -> NoReturn:
    """Prints the error as one line and exits with its code.

    Under torchrun usually all ranks raise the same error, and torchrun stops all of them when the first one exits. So
    rank 0 prints at once, and the others wait: a rank that is still running after the wait was the only one with the
    error, and prints it. The line is also written to torchrun's error file, from which its final report quotes.
    """
    rank = int(os.environ.get("RANK", 0))
    line = " ".join(str(error).split())
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the training loop's handler would only set a flag
        time.sleep(10)
        line = f"rank {rank}: {line}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(path, "w") as f:
            json.dump({"message": {"message": line, "extraInfo": details}}, f)
    # Not sys.exit: a prefetching thread or an unfinished process group could delay the exit.
    sys.stdout.flush()
    os._exit(error.exit_code)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors. `type=int` takes 1e4 and 0.5M, `type=Path` takes ~/x."""

    def __init__(self, **kwargs: Any):
        super().__init__(**({"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs))
        self.register("type", int, parse_count)
        self.register("type", Path, user_path)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError or a storage error in the block into one line and its exit code, and Ctrl-C into code 130."""
    try:
        yield
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if (storage := storage_error(error)) is None:
            raise
        exit_with(storage)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(EXIT_CODE)


def run_command(main: Callable[[], int | None], teardown: bool = True) -> NoReturn:
    """Runs a command's `main` and exits with what it returns.

    Without `teardown` it exits at once, without shutting down the interpreter, also after an exception. Otherwise
    gloo's threads, which live as long as the process group, may call Python during the shutdown and abort a finished
    run (pytorch#179291), and a thread that waits for another rank would hide a failure from torchrun.
    """
    code = 1
    raise_on_ctrl_c()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not stop a command
    try:
        with one_line_errors():
            code = main() or 0
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has exited, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
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
