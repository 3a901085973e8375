"""Text files, divided into work units, and the documents of a unit.

A document is a .txt file, a line of .jsonl or a row of .parquet. .txt and .jsonl may be compressed (.gz, .zst). A work
unit is a range of rows of a parquet file, a range of bytes of a plain .jsonl, or any other file as a whole.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

from util.errors import UserError, quote, user_errors

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")
UNIT_BYTES = 2**22  # approximate size of a unit
MAX_SPLITS = 16  # of a row group: reading its last rows decodes all rows before them
BLOCK = 2**22
ROWS_BYTES = 2**20  # approximate size of a batch of parquet rows
HASH_BLOCK, HASH_BLOCKS = 2**16, 64  # bytes, and how many blocks of a file are hashed

TRIES, FIRST_PAUSE = 6, 2.0  # for remote files; the pause, in seconds, doubles with each try
READERS = 16  # threads that plan remote files at the same time

REMOTE = re.compile(r"(hf|https?|s3|gs)://(?!.*\.\.)[\x21-\x7e]+")
T = TypeVar("T")
Document = Iterable[str]  # the text in blocks, usually one


@dataclass(frozen=True)
class WorkUnit:
    """A piece of a file that a worker reads alone."""

    path: str
    start: int  # a row of .parquet, a byte of .jsonl; 0 for other files
    stop: int
    size: int  # approximate bytes of text, to balance parts and to show progress


def is_remote(path: str) -> bool:
    return "://" in path


def input_files(patterns: list[str]) -> list[str]:
    """Expands paths, globs and folders to files, in the order given, each file once. Keeps remote addresses."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        if is_remote(pattern):
            if not REMOTE.fullmatch(pattern) or not pattern.endswith(".parquet"):
                what = "only remote .parquet files are read, from hf://, https://, http://, s3:// or gs://"
                raise UserError(f"{quote(pattern)}: {what}; download other files first")
            paths[pattern] = None
            continue
        path = os.path.expanduser(pattern)
        named = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        found = [file for one in named for file in _files(Path(one))]
        if not found:
            raise UserError(f"{pattern}: {'no text in this folder' if os.path.isdir(path) else 'no such file'}")
        paths |= dict.fromkeys(map(str, found))
    for name in paths:
        if not name.endswith(SUFFIXES):
            raise UserError(f"{name}: only {', '.join(SUFFIXES)} files are read")
    return list(paths)


def _files(path: Path) -> list[Path]:
    """Returns the file itself, or all text files below a folder."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))


def file_fingerprint(path: str) -> dict[str, Any]:
    """Returns name, size and hash of a file. A remote file is identified by its address, which names a revision.

    Files above 4 MiB are hashed by sample, so that a repeated command returns quickly.
    """
    if is_remote(path):
        return {"name": path}
    digest = hashlib.sha256()
    with user_errors(path), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        for at in [*range(0, size, max(HASH_BLOCK, size // HASH_BLOCKS)), max(0, size - HASH_BLOCK)]:
            f.seek(at)  # the last block holds the metadata of a parquet file
            digest.update(f.read(HASH_BLOCK))
    return {"name": Path(path).name, "size": size, "hash": digest.hexdigest()}


def plan(paths: list[str], text_key: str) -> list[WorkUnit]:
    """Divides files into units, in order. The result depends on the files alone."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda path: retry(path, lambda: list(_units(path, text_key))), paths)
        return list(chain.from_iterable(found))


def retry(path: str, read: Callable[[], T]) -> T:
    """Calls `read` and returns its result. For a remote file it retries up to TRIES times."""
    if not is_remote(path):
        return read()
    for attempt in range(TRIES):
        try:
            return read()
        except UserError:
            raise
        except Exception as e:  # network libraries raise many kinds of exceptions
            problem = f"{type(e).__name__}: {e}"
        if attempt < TRIES - 1:
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise UserError(f"{path} cannot be read ({problem}); repeat the command to resume")


def _units(path: str, text_key: str) -> Iterator[WorkUnit]:
    if path.endswith(".parquet"):
        with _parquet(path, text_key) as (file, column):
            yield from _row_units(path, file.metadata, column)
        return
    size = Path(path).stat().st_size
    pieces = max(1, -(-size // UNIT_BYTES)) if path.endswith(".jsonl") else 1
    for i in range(pieces):
        start, stop = i * size // pieces, (i + 1) * size // pieces
        yield WorkUnit(path, start, stop, stop - start)


def _row_units(path: str, metadata: Any, column: int) -> Iterator[WorkUnit]:
    """Merges small row groups and splits large ones into units of about UNIT_BYTES."""
    begin = row = size = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        large = group.column(column).total_uncompressed_size
        splits = min(MAX_SPLITS, max(1, large // UNIT_BYTES), max(1, group.num_rows))
        if row > begin and (splits > 1 or size + large > UNIT_BYTES):
            yield WorkUnit(path, begin, row, size)
            begin, size = row, 0
        for i in range(1, splits):
            stop = row + i * group.num_rows // splits
            yield WorkUnit(path, begin, stop, large // splits)
            begin = stop
        size += large // splits
        row += group.num_rows
    if row > begin:
        yield WorkUnit(path, begin, row, size)


def documents(unit: WorkUnit, text_key: str, skip_bad: bool, skipped: Counter[str]) -> Iterator[Document]:
    """Yields the documents of a unit. Counts null and empty documents in `skipped`, and with `skip_bad` damaged ones.

    Without `skip_bad`, damaged text is an error that names the file and the line or byte.
    """
    try:
        if unit.path.endswith(".parquet"):
            rows: Iterable[str | bytes | None] = _parquet_rows(unit, text_key)
        elif unit.path.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            rows = _json_rows(unit, text_key, skip_bad, skipped)
        else:
            yield from _text_file(unit, skip_bad, skipped)
            return
        for row in rows:
            if row is None:
                skipped["null"] += 1
            elif not row:
                skipped["empty"] += 1
            elif (text := _decoded(row, unit.path, skip_bad)) is None:
                skipped["bad"] += 1
            else:
                yield (text,)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{unit.path}: damaged compressed file ({e})") from e
    except OSError as e:
        if is_remote(unit.path):
            raise  # probably the network: `retry` tries again
        raise UserError(f"{unit.path}: {e.strerror or e}") from e


def _decoded(text: str | bytes, path: str, skip_bad: bool) -> str | None:
    """Returns a row as valid text, or None if it is not UTF-8 and `skip_bad` is set."""
    if isinstance(text, str):
        try:
            text.encode()
            return text
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can contain; tiktoken converts it like this
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return text.decode()
    except UnicodeDecodeError as e:
        if skip_bad:
            return None
        raise UserError(f"{path}: a row is {_not_utf8(e)}") from e


def _not_utf8(e: UnicodeDecodeError, before: int = 0) -> str:
    return f"not UTF-8 text ({e.reason} at byte {before + e.start}); repair it, or skip damaged text with --skip_bad"


def _open(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), BLOCK)
    return open(path, "rb")


def _text_file(unit: WorkUnit, skip_bad: bool, skipped: Counter[str]) -> Iterator[Document]:
    """Yields the document of a .txt file, in blocks to bound memory. Line ends become \\n."""
    if skip_bad:
        try:
            for _ in _text_blocks(unit.path):
                pass
        except UserError:
            skipped["bad"] += 1
            return
    blocks = _text_blocks(unit.path)
    if first := next(filter(None, blocks), ""):  # the first block may end within the first character
        yield chain((first,), blocks)
    else:
        skipped["empty"] += 1


def _text_blocks(path: str) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    at = 0
    with _open(path) as f:
        try:
            while block := f.read(BLOCK):
                at += len(block)
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: {_not_utf8(e, at - len(e.object))}") from e


def _json_rows(unit: WorkUnit, text_key: str, skip_bad: bool, skipped: Counter[str]) -> Iterator[str | None]:
    """Yields field `text_key` of each line that begins within the unit."""
    with _open(unit.path) as f:
        at = unit.start
        if at:
            f.seek(at - 1)
            at += len(f.readline(unit.stop - at + 1)) - 1  # skip the rest of a line of the previous unit
        compressed = not unit.path.endswith(".jsonl")
        if not at and not f.peek(1):  # type: ignore[attr-defined]
            skipped["empty"] += 1  # an empty file
        while (compressed or at < unit.stop) and (line := f.readline()):
            if line.strip():
                try:
                    yield _field(line, text_key)
                except ValueError as problem:
                    if not skip_bad:
                        raise UserError(f"{unit.path}: line {_line_number(unit.path, at)}{problem}") from problem
                    skipped["bad"] += 1
            at += len(line)


def _field(line: bytes, text_key: str) -> str | None:
    """Returns the field of a JSON line. Raises ValueError with a message that follows "line N"."""
    try:
        text = json.loads(line)[text_key]
    except UnicodeDecodeError as e:
        raise ValueError(f" is {_not_utf8(e)}") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f" is not a JSON object with a field {text_key!r}; see --text_key, --skip_bad") from e
    if not isinstance(text, str) and text is not None:
        raise ValueError(f": field {text_key!r} is not text; see --text_key, --skip_bad")
    return text


def _line_number(path: str, at: int) -> int:
    """Returns the number of the line that begins at byte `at` of the uncompressed text."""
    number = 1
    with _open(path) as f:
        while at and (block := f.read(min(at, BLOCK))):
            number += block.count(10)
            at -= len(block)
    return number


@contextmanager
def _parquet(path: str, text_key: str) -> Iterator[tuple[Any, int]]:
    """Opens a parquet file. Yields it and the index of its text column."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException, set_memory_pool, system_memory_pool, types

    set_memory_pool(system_memory_pool())  # the default pool never returns memory to the system
    source, metadata = (_remote_file(path), _remote_metadata(path)) if is_remote(path) else (path, None)
    try:
        options = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}
        with pq.ParquetFile(source, metadata=metadata, **options) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise UserError(f"{path}: no column {text_key!r}; it has {', '.join(names)}; see --text_key")
            kind = file.schema_arrow.field(text_key).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(f"{path}: column {text_key!r} holds {kind}, not text; see --text_key")
            column = next(i for i in range(file.metadata.num_columns) if file.schema.column(i).path == text_key)
            yield file, column
    except ArrowException as e:
        raise UserError(f"{path}: not a readable parquet file ({e})") from e
    except OSError as e:  # pyarrow raises it for damaged pages
        if is_remote(path):
            raise  # probably the network: `retry` tries again
        raise UserError(f"{path}: not a readable parquet file ({e})") from e


def _remote_file(path: str) -> Any:
    import fsspec

    return fsspec.open(path).open()


@lru_cache(maxsize=8)
def _remote_metadata(path: str) -> Any:
    """Reads the metadata at the end of a remote file. It can be megabytes, so it is cached for later units."""
    import pyarrow.parquet as pq

    return pq.read_metadata(_remote_file(path))


def _parquet_rows(unit: WorkUnit, text_key: str) -> Iterator[str | bytes | None]:
    """Yields the rows of a unit. Rows that are not UTF-8, which a string column may contain, are yielded as bytes."""
    with _parquet(unit.path, text_key) as (file, _):
        row, first = 0, 0
        groups: list[int] = []
        for g in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(g).num_rows
            if row < unit.stop and row + rows > unit.start:
                first = first if groups else row
                groups.append(g)
            row += rows
        at = first  # row
        for batch in file.iter_batches(_rows_at_once(file, groups, text_key), row_groups=groups, columns=[text_key]):
            low, high = max(0, unit.start - at), unit.stop - at
            at += len(batch)
            for value in batch.column(0).slice(low, max(0, high - low)) if low < len(batch) else ():
                try:
                    yield value.as_py()
                except UnicodeDecodeError:
                    yield getattr(value, "value", value).as_buffer().to_pybytes()
            if at >= unit.stop:
                return


def _rows_at_once(file: Any, groups: list[int], text_key: str) -> int:
    """Returns how many rows have about a megabyte of text, so that long rows do not need more memory."""
    rows = size = 1
    for g in groups:
        group = file.metadata.row_group(g)
        column = next(i for i in range(group.num_columns) if group.column(i).path_in_schema == text_key)
        rows += group.num_rows
        size += group.column(column).total_uncompressed_size
    return max(1, min(1024, rows * ROWS_BYTES // size))
