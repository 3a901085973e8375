"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a write or a flush to a full disk, names this one."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)
        raise


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError if it cannot be read, ValueError if it holds none."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")  # a pipe, say, on which one would wait
    try:
        return json.loads(path.read_bytes())
    except RecursionError as e:
        raise ValueError("lists within lists without end") from e


def flush_to_disk(path: Path) -> None:
    """Has the file's content, or the directory's entries, on disk before we go on."""
    with naming(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, whoever else writes it at the same time, even if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            Path(f.name).unlink(missing_ok=True)
            raise
    flush_to_disk(path.parent)


@contextmanager
def create_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which appears at `path` when the block is left without an exception, flushed to disk.

    Raises FileExistsError if something is there already, at the start or by then.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            yield f  # type: ignore[misc]
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            _rename_to_new(f.name, path)
        finally:
            Path(f.name).unlink(missing_ok=True)
    flush_to_disk(path.parent)


def _rename_to_new(name: str, path: Path) -> None:
    try:
        os.link(name, path)  # unlike a rename, this refuses to replace a file
    except OSError as e:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from e
        os.rename(name, path)  # a file system without links


def take_lock(path: Path) -> tuple[IO[str], str | None]:
    """Locks `path` for as long as the returned file is open, which no process outlives.

    Beside it None, or, if another process holds the lock, that process's number as text. What stands in the file does
    not matter, only whether somebody holds it. On a file system without locks a warning says that nothing is locked.
    """
    lock = open(path, "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter is how some network file systems put it
        lock.seek(0)
        return lock, lock.read().strip() or "unknown"
    except OSError as e:  # a file system without locks: better unlocked than not at all
        print(
            f"warning: {path} cannot be locked ({e.strerror}); nothing keeps a second process out of {path.parent}",
            file=sys.stderr,
        )
    with naming(path):
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    return lock, None
