"""Token shards (.bin files): finding, reading, checking and writing them.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] token count, the rest 0) and the tokens.
Magic 20240520 with version 1 has uint16 tokens (llm.c's GPT-2 files), 20240801 with version 7 uint32 (llm.c's Llama 3
files). nanoGPT's headerless uint16 files are read under nanoGPT's names, train.bin and val.bin. Any file would parse as
headerless, so guessing by content could silently train on garbage. A .npy file is an array of tokens, as build-nanogpt
writes it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from util.errors import UserError, closest, user_errors
from util.files import file_sha256, find_paths, refuse_lfs_pointer, write_atomically

HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
FORMATS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
HEADERLESS_NAMES = ("train.bin", "val.bin")
FOLDER_NAMES = ("*_{}_*.bin", "*_{}_*.npy", "*_{}.bin", "{}.bin")  # of the shards in a folder; the first that match
TINY_SHAKESPEARE = "python data/tiny_shakespeare.py"
COMMANDS = {  # for folders that presets name
    "tinyshakespeare": TINY_SHAKESPEARE,
    "tinyshakespeare_bytes": f"{TINY_SHAKESPEARE} --tokenizer bytes --output_dir data/tinyshakespeare_bytes",
}
REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE_BLOCKS, SAMPLE_BLOCK = 64, 16384  # the sample of ids that is checked without --check_data
READ_BLOCK = 2**24  # tokens read at a time when a whole file is checked


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype of a shard's tokens."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def open_file(path: Path) -> int:
    """Opens a file for reading and returns its file descriptor."""
    with user_errors(path):
        return os.open(path, os.O_RDONLY)


@dataclass(frozen=True)
class Shard:
    """A checked file with `count` tokens, which start at byte `offset`."""

    path: Path
    count: int
    dtype: np.dtype
    offset: int
    vocab_size: int = 2**32  # ids are below this
    largest_id: int = 0  # of those that open_shard checked

    def read(self, start: int, length: int, fd: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length), (length,).

        Uses pread instead of a memory map: mapped pages count as the process's memory, and truncating a mapped file
        kills the process.
        """
        size, at = length * self.dtype.itemsize, self.offset + start * self.dtype.itemsize
        opened = open_file(self.path) if fd is None else fd
        try:
            content = os.pread(opened, size, at)
            while 0 < len(content) < size and (more := os.pread(opened, size - len(content), at + len(content))):
                content += more  # Linux returns at most 2 GiB per call
        finally:
            if fd is None:
                os.close(opened)
        if len(content) != size:
            raise UserError(
                f"{self.path}: {length} tokens at {start} are missing; the file was truncated while it was open"
            )
        return np.frombuffer(content, self.dtype)

    def check(self, tokens: np.ndarray, start: int) -> int:
        """Checks that `tokens`, which start at index `start`, are in the vocabulary. Returns the largest."""
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            at = int(tokens.argmax())
            raise UserError(
                f"{self.path}: token id {tokens[at]} at position {start + at} is not below"
                f" --vocab_size={self.vocab_size}; the file is from another tokenizer, or damaged"
            )
        return largest


def open_shard(path: Path, vocab_size: int, check_all: bool = False) -> Shard:
    """Opens a shard and checks its header, its size and its token ids.

    Checks the ids in a sample of blocks spread over the file, or with `check_all` all ids.
    """
    with user_errors(path):
        size = path.stat().st_size
        with open(path, "rb") as f:
            header = np.frombuffer(f.read(HEADER_BYTES), "u1")
    if size == 0:
        raise UserError(f"{path}: empty file; make it again")
    if size < HEADER_BYTES:
        refuse_lfs_pointer(path)
    if path.suffix == ".npy":
        shard = _numpy(path)
    else:
        shard = _headerless(path, size, header) or _with_header(path, size, header)
    shard = replace(shard, vocab_size=vocab_size)
    return replace(shard, largest_id=_check_ids(shard, check_all))


def _headerless(path: Path, size: int, header: np.ndarray) -> Shard | None:
    if path.name not in HEADERLESS_NAMES:
        return None
    is_header = len(header) == HEADER_BYTES and not header[12:].any()  # text does not start with 500 times token 0
    if is_header:
        return None
    if size % 2:
        raise UserError(f"{path}: odd number of bytes ({size}), but tokens are uint16; truncated?")
    return Shard(path, size // 2, np.dtype("<u2"), 0)


def _numpy(path: Path) -> Shard:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError) as e:  # damaged
        raise UserError(f"{path}: not an array of tokens: {e}") from e
    if tokens.ndim != 1 or tokens.dtype not in ("<u2", "<u4"):
        problem = (
            f"{path}: an array of {tokens.dtype} with shape {tokens.shape}, but tokens are uint16 or uint32 in one"
        )
        if tokens.dtype.kind not in "iu" or tokens.min(initial=0) < 0:
            raise UserError(f"{problem} dimension; is it another file?")
        kind = "uint32" if tokens.max(initial=0) >= 2**16 else "uint16"
        raise UserError(f"{problem} dimension; save it again with np.save(path, tokens.astype(np.{kind}).reshape(-1))")
    return Shard(path, len(tokens), tokens.dtype, tokens.offset)


def _with_header(path: Path, size: int, header: np.ndarray) -> Shard:
    if len(header) < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes are less than a header of {HEADER_BYTES}; truncated, make it again")
    magic, version, count = (int(n) for n in header.view("<i4")[:3])
    if magic not in FORMATS:
        names = " or ".join(HEADERLESS_NAMES)
        raise UserError(
            f"{path}: magic {magic} is not the magic of a token shard ({' or '.join(map(str, FORMATS))});"
            f" nanoGPT's headerless files must be named {names}"
        )
    expected_version, dtype = FORMATS[magic]
    if version != expected_version:
        raise UserError(f"{path}: version {version}, but magic {magic} has version {expected_version}")
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        what = "truncated" if size < expected else "too long"
        raise UserError(f"{path}: {what}: {count} tokens need {expected} bytes, but the file has {size}; make it again")
    return Shard(path, count, dtype, HEADER_BYTES)


def _check_ids(shard: Shard, check_all: bool) -> int:
    """Checks the ids of a sample of blocks, or all. Returns the largest."""
    if check_all or shard.count <= SAMPLE_BLOCKS * SAMPLE_BLOCK:
        starts, length = list(range(0, shard.count, READ_BLOCK)), READ_BLOCK
    else:
        starts, length = np.linspace(0, shard.count - SAMPLE_BLOCK, SAMPLE_BLOCKS, dtype=int).tolist(), SAMPLE_BLOCK
    largest = 0
    for start in starts:
        length = min(length, shard.count - start)
        largest = max(largest, shard.check(shard.read(start, length), start))
    return largest


def shard_header(count: int, vocab_size: int) -> bytes:
    """Returns the header of a shard with `count` tokens."""
    dtype = token_dtype(vocab_size)
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = *next((magic, version) for magic, (version, d) in FORMATS.items() if d == dtype), count
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Writes tokens (n,) as a shard, atomically. Raises ValueError if an id is out of range."""
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise ValueError(f"token ids must be in [0, {vocab_size})")
    write_atomically(path, shard_header(len(tokens), vocab_size) + tokens.astype(token_dtype(vocab_size)).tobytes())


class ShardWriter:
    """A writer that appends tokens to shards. Another writer can resume from a `position`."""

    def __init__(self, folder: Path, layout: Iterator[tuple[str, int]], vocab_size: int):
        self.folder, self.layout, self.vocab_size = folder, layout, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.files: list[dict[str, Any]] = []  # the complete shards, as in the manifest
        self._file: IO[bytes] | None = None
        self._name, self._size, self._held = "", 0, 0

    def resume(self, files: list[dict[str, Any]], held: int) -> None:
        """Continues after the complete `files` and `held` tokens of the next file. Later tokens are dropped."""
        self.files = files
        for _ in files:
            next(self.layout)
        sizes = {row["name"]: row["bytes"] for row in files}
        if held:
            self._name, self._size = next(self.layout)
            self._held = held
            sizes[self._name] = HEADER_BYTES + held * self.dtype.itemsize
        for name, size in sizes.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"{path} is missing or shorter than its journal says; remove {self.folder}")
        if held:
            self._file = open(self.folder / self._name, "r+b")
            self._file.truncate(sizes[self._name])
            self._file.seek(0, os.SEEK_END)

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens (n,). Raises ValueError if an id is not in the vocabulary."""
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise ValueError(f"token ids must be below {self.vocab_size}")
        while len(tokens):
            if self._file is None:
                self._name, self._size = next(self.layout)
                self._held = 0
                self._file = open(self.folder / self._name, "wb")
                self._file.write(bytes(HEADER_BYTES))  # zeros until the shard is complete, so that nobody reads it
            piece = tokens[: self._size - self._held]
            self._file.write(piece.astype(self.dtype, copy=False).tobytes())
            self._held += len(piece)
            tokens = tokens[len(piece) :]
            if self._held == self._size:
                self.close()

    def flush(self) -> None:
        """Writes everything to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def position(self) -> dict[str, Any]:
        """Returns the arguments with which `resume` continues from here, once everything before is on disk."""
        return {"files": list(self.files), "held": self._held if self._file is not None else 0}

    def close(self) -> None:
        """Completes the current shard, if there is one."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(shard_header(self._held, self.vocab_size))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path = self.folder / self._name
        self.files.append(
            {"name": path.name, "tokens": self._held, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        )


def find_shards(pattern: str, flag: str) -> list[Path]:
    """Returns the files that match a glob, or the file with that name, sorted by name.

    A folder stands for its training shards if `flag` is input_train_bin, else for its validation shards. A path below
    data/ that matches nothing is looked up in the repository too, where the commands in data/ write by default.
    """
    split = "train" if flag == "input_train_bin" else "val"
    places = ["", str(REPOSITORY)] if Path(pattern).parts[:1] == ("data",) else [""]
    for place in places:
        path = os.path.join(place, pattern)
        patterns = [path]
        if os.path.isdir(path):
            patterns = [os.path.join(path, name.format(split)) for name in FOLDER_NAMES]
        for each in patterns:
            if paths := sorted({Path(p) for p in find_paths(each) if os.path.isfile(p)}):
                return paths
    is_folder = os.path.isdir(pattern) or not (glob.has_magic(pattern) or Path(pattern).suffix)
    place = "" if os.path.isdir("data") else places[-1]
    hint = _no_match_hint(Path(place, pattern, "*" if is_folder else ""))
    raise UserError(f"--{flag}={pattern} matches no file: {hint}")


def _no_match_hint(pattern: Path) -> str:
    """Explains why a glob matches nothing, and names a similar path."""
    parent = Path(pattern.anchor)
    for part in pattern.parts[len(parent.parts) : -1]:
        if glob.has_magic(part) and not os.path.isdir(parent / part):
            break
        if not os.path.isdir(parent / part):
            missing = f"folder {parent / part} does not exist"
            siblings = [d.name for d in parent.iterdir() if os.path.isdir(d)] if os.path.isdir(parent) else []
            near = None if part in COMMANDS else closest(part, siblings)
            if near:
                return f"{missing}; did you mean {parent / near}?"
            if made := closest(part, COMMANDS):
                return f"{missing}; {COMMANDS[made]} makes data/{made}"
            return f"{missing}; docs/data.md explains how to make shards"
        parent = parent / part
    there = sorted(p.name for p in parent.iterdir() if not p.name.startswith(".")) if os.path.isdir(parent) else []
    return f"{parent} contains {', '.join(there[:4]) + (', …' if len(there) > 4 else '') if there else 'nothing'}"
