"""Input files, divided into work units, and the documents of a unit.

A document is a text file or a part of it between separators, a line of .jsonl, an item of a JSON list, or a row of
.parquet or of a data set of the hub. A work unit is a range of rows of a parquet file, a range of bytes of a plain
.jsonl, a file of a data set of the hub, or any other file as a whole.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from data.prepare.hub import dataset_fingerprint, dataset_rows, dataset_units, file_row_name
from data.prepare.inputs import COMPRESSED, Damaged, ReadOptions, file_fingerprint, is_dataset, is_remote, kind_of
from data.prepare.parquet import open_parquet, parquet_rows, row_name
from data.prepare.text_files import (
    SEPARATORS,
    is_list,
    item_name,
    line_name,
    line_rows,
    list_rows,
    not_utf8,
    text_documents,
    text_of,
)
from data.tokenizers.tokenizer import END_OF_TEXT
from util.errors import UserError, quote, user_errors
from util.files import refuse_lfs_pointer

UNIT_BYTES = 2**22  # approximate size of a unit
MAX_SPLITS = 16  # of a row group: reading its last rows decodes all rows before them

TRIES, FIRST_PAUSE = 6, 2.0  # for remote files; the pause, in seconds, doubles with each try
READERS = 16  # threads that plan remote files at the same time

T = TypeVar("T")


@dataclass(frozen=True)
class WorkUnit:
    """A piece of a file that a worker reads alone."""

    path: str
    start: int  # a row of .parquet, a byte of .jsonl, a file of a data set; 0 for other files
    stop: int
    size: int  # approximate bytes of text, to balance parts and to show progress


class Document(NamedTuple):
    """A document: its text in blocks, usually one, and a function that returns its place, for errors."""

    text: Iterable[str]
    place: Callable[[], str]


def fingerprint(path: str) -> dict[str, Any]:
    """Returns what identifies the content of a file or of a data set of the hub."""
    return dataset_fingerprint(path) if is_dataset(path) else file_fingerprint(path)


def plan(paths: list[str], options: ReadOptions) -> list[WorkUnit]:
    """Divides files into units, in order. The result depends on the files alone."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda path: retry(path, lambda: list(_units(path, options))), paths)
        return list(chain.from_iterable(found))


def retry(path: str, read: Callable[[], T]) -> T:
    """Calls `read` and returns its result. For a remote file it retries up to TRIES times."""
    if not is_remote(path) and not is_dataset(path):
        return read()
    tries = TRIES if is_remote(path) else 1
    for attempt in range(tries):
        try:
            return read()
        except UserError:
            raise
        except Exception as e:  # network libraries raise many kinds of exceptions
            problem = f"{type(e).__name__}: {e}"
        if attempt < tries - 1:
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise UserError(f"{path} cannot be read ({problem}); repeat the command to resume")


def _units(path: str, options: ReadOptions) -> Iterator[WorkUnit]:
    if is_dataset(path):
        yield from (WorkUnit(path, i, i + 1, size) for i, size in enumerate(dataset_units(path, options.text_key)))
        return
    if not is_remote(path):
        refuse_lfs_pointer(path)
    kind = kind_of(path, options.format)
    if kind == "parquet":
        try:
            with open_parquet(path, options.text_key) as (file, column):
                yield from _row_units(path, file.metadata, column)
        except Damaged:
            if not options.skip_bad:
                raise
            yield WorkUnit(path, 0, 1, 1)  # `documents` counts it
        return
    with user_errors(path):
        size = os.path.getsize(path)
    cuttable = kind == "jsonl" and size > UNIT_BYTES and not path.lower().endswith(COMPRESSED) and not is_list(path)
    pieces = -(-size // UNIT_BYTES) if cuttable else 1
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


def documents(unit: WorkUnit, options: ReadOptions, skipped: Counter[str]) -> Iterator[Document]:
    """Yields the documents of a unit. Each must be consumed before the next.

    Counts null and empty documents in `skipped`, and with --skip_bad damaged ones. Without --skip_bad, damaged text is
    an error that names the file and the line or byte.
    """
    path, kind = unit.path, kind_of(unit.path, options.format)
    convert = partial(text_of, text_key=options.text_key)
    rows: Iterable[tuple[int, str | bytes | None]]
    name: Callable[[str, int], str]  # of path and number: the place of a row
    try:
        if is_dataset(path):
            rows, name = dataset_rows(path, unit.start, options.text_key), partial(file_row_name, unit.start)
        elif kind == "parquet":
            rows, name = parquet_rows(path, unit.start, unit.stop, options, skipped), row_name
        elif kind == "jsonl" and is_list(path):
            rows, name = list_rows(path, convert, options.skip_bad, skipped), item_name
        elif kind == "jsonl":
            stop = None if path.lower().endswith(COMPRESSED) else unit.stop
            rows, name = line_rows(path, unit.start, stop, convert, options.skip_bad, skipped), line_name
        else:
            for blocks in text_documents(path, options, skipped):
                yield Document(blocks, lambda: path)
            return
        for number, row in rows:
            if row is None:
                skipped["null"] += 1
            elif not row:
                skipped["empty"] += 1
            elif (text := _decoded(row, partial(name, path, number), options.skip_bad)) is None:
                skipped["bad"] += 1
            else:
                yield Document((text,), partial(name, path, number))
    except Damaged:
        if not options.skip_bad:
            raise
        skipped["bad"] += 1


def describe_skipped(skipped: dict[str, int], separator: str = "") -> str:
    """Describes the counts of `documents`, for the end of a summary. `separator` is --document_separator."""
    counts = " and ".join(f"{n:,} {what}" for what, n in sorted(skipped.items()) if n and what != SEPARATORS)
    notes = f", {counts} skipped" if counts else ""
    if places := skipped.get(SEPARATORS):
        notes += f", text split at {places:,} {quote(separator or END_OF_TEXT)} (see --document_separator)"
    elif separator not in ("", "none"):
        notes += f", no {quote(separator)} found (see --document_separator)"
    return notes


def _decoded(text: str | bytes, place: Callable[[], str], skip_bad: bool) -> str | None:
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
        raise Damaged(f"{place()} is {not_utf8(e)}") from e
