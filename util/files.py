"""Files: atomic writes, flushing, locks, hashes, JSON and YAML, and the one hook by which tests inject faults."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from util.errors import UserError, user_errors

# RAWGPT_FAULT=POINT[@RANK][#TIME]=WHAT; see fault_point.
_FAULT = re.compile(r"(?P<point>[a-z ]+)(@(?P<rank>\d+))?(#(?P<time>\d+))?=(?P<what>[A-Z]+)")
_fault = _FAULT.fullmatch(os.environ.get("RAWGPT_FAULT", ""))
_times_passed = 0
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def find_paths(pattern: str) -> list[str]:
    """Returns the path, if it exists, or else the paths that match it as a glob, sorted.

    Folders at the start of the pattern that exist are taken literally, so `[v2]/*.bin` finds the files of a folder
    named [v2]. If nothing matches, brackets are taken literally everywhere.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    parts, n = Path(pattern).parts, 0
    while n < len(parts) and os.path.isdir(os.path.join(*parts[: n + 1])):
        n += 1
    folder, rest = os.path.join("", *parts[:n]), os.path.join("", *parts[n:])
    for tail in (rest, rest.replace("[", "[[]")):
        if found := glob.glob(os.path.join(glob.escape(folder), tail), recursive=True):
            return sorted(set(found))
    return []


def refuse_lfs_pointer(path: Path | str) -> None:
    """Raises a UserError if the file is the pointer that Git LFS leaves in place of a file it has not downloaded."""
    with user_errors(path), open(path, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Adds `path` to an OSError without a file name, such as the error of a write to a full disk."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)
        raise


def is_latest_file(path: Path) -> bool:
    """Returns whether `path` is the file `latest` beside checkpoints, which contains the name of the newest."""
    return path.name == "latest" and path.is_file()


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises OSError if it cannot be read, ValueError if its content is not JSON."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")  # reading a named pipe would wait forever
    try:
        return json.loads(path.read_bytes())
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of plain values. Raises OSError if it cannot be read, ValueError if its content is not YAML."""
    import yaml

    from util import strict_yaml

    if path.exists() and not path.is_file():
        raise ValueError("is not a file")
    try:
        return strict_yaml.load(path.read_text(encoding="utf-8"))
    except RecursionError as e:
        raise ValueError("is nested too deeply") from e
    except yaml.YAMLError as e:
        raise ValueError(f"is not readable as YAML: {e}") from e


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on disk."""
    with path_in_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, even with concurrent writers or a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path_in_errors(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
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
    """Yields a file to write to. It appears at `path`, flushed to disk, when the block ends without an exception.

    Raises FileExistsError if `path` exists at the start or at the end.
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
    """Renames a file without replacing another: os.link fails if `path` exists, os.rename does not."""
    try:
        os.link(name, path)
    except OSError as e:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from e
        os.rename(name, path)  # a file system without links


def is_at(file: IO[str], path: Path) -> bool:
    """Returns whether an open file is still at `path`: not deleted, moved or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def reopen(file: IO[str], path: Path) -> IO[str]:
    """Returns `file`, opened with "a+". If `path` was deleted or replaced, writes its content there and opens that."""
    if is_at(file, path):
        return file
    with file:
        file.flush()
        file.seek(0)
        write_atomically(path, file.read().encode(errors="replace"))
    return open(path, "a+", errors="replace", buffering=1)


def take_lock(path: Path) -> tuple[IO[str], str | None]:
    """Locks `path` until the returned file is closed or the process ends.

    The second value is None, or the number of the process that already holds the lock, as text. Only the lock counts,
    not the content of the file. On a file system without locks it prints a warning and returns an unlocked file.
    """
    lock = open(path, "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some network file systems raise PermissionError for a held lock
        lock.seek(0)
        return lock, lock.read().strip() or "unknown"
    except OSError as e:
        print(
            f"warning: {path} cannot be locked ({e.strerror}); nothing keeps a second process out of {path.parent}",
            file=sys.stderr,
        )
    with path_in_errors(path):
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    return lock, None


def fault_point(name: str, path: Path | None = None) -> None:
    """Injects the fault given in RAWGPT_FAULT, for tests. Does nothing if the variable is not set.

    RAWGPT_FAULT=POINT[@RANK][#TIME]=WHAT makes the TIME-th call (default: the first) for POINT on RANK (default: any)
    raise the OSError of that name (ENOSPC, EIO ...) about `path`, or send KILL or STOP to this process. The tests of
    docs/reliability.md use it. After torchrun has restarted the workers the fault does not happen again.
    """
    global _times_passed
    if _fault is None or _fault["point"] != name or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if _fault["rank"] not in (None, os.environ.get("RANK", "0")):
        return
    _times_passed += 1
    if _times_passed != int(_fault["time"] or 1):
        return
    if _fault["what"] in ("KILL", "STOP"):
        os.kill(os.getpid(), signal.Signals[f"SIG{_fault['what']}"])
        return
    number = getattr(errno, _fault["what"])
    raise OSError(number, os.strerror(number), str(path) if path else None)
