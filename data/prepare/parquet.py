"""The rows of parquet files: one column of text, which may be a field of a struct, or several columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from data.prepare.inputs import Damaged, ReadOptions, is_remote
from data.prepare.text_files import not_utf8
from util.errors import UserError

ROWS_BYTES = 2**20  # approximate size of a batch of rows
OBJECT_ROWS = 256  # rows with several columns that are read at a time


@contextmanager
def open_parquet(path: str, text_key: str) -> Iterator[tuple[Any, int]]:
    """Opens a parquet file. Yields it and the index of its text column among the columns that are stored."""
    with _open(path) as file:
        _check_column(path, file.schema_arrow, text_key)
        column = next(i for i in range(file.metadata.num_columns) if file.schema.column(i).path == text_key)
        yield file, column


@contextmanager
def _open(path: str) -> Iterator[Any]:
    """Opens a parquet file, and turns errors of reading it into Damaged or UserError."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException, set_memory_pool, system_memory_pool

    set_memory_pool(system_memory_pool())  # the default pool never returns memory to the system
    source, metadata = (_remote_file(path), _remote_metadata(path)) if is_remote(path) else (path, None)
    try:
        options = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}
        with pq.ParquetFile(source, metadata=metadata, **options) as file:
            yield file
    except ArrowException as e:
        raise Damaged(f"{path}: not a readable parquet file ({e})") from e
    except OSError as e:  # pyarrow raises it for damaged pages
        if is_remote(path):
            raise  # probably the network: `retry` tries again
        kind = UserError if e.errno else Damaged
        raise kind(f"{path}: not a readable parquet file ({e})") from e


def _check_column(path: str, schema: Any, text_key: str) -> None:
    """Checks that there is a column of text, or of bytes, which must be UTF-8."""
    from pyarrow import types

    fields, names = schema, [text_key] if text_key in schema.names else text_key.split(".")
    for name in names:
        known = [f.name for f in fields]
        if known.count(name) != 1:
            raise UserError(f"{path}: no column {text_key!r}; it has {', '.join(schema.names)}; see --text_key")
        kind = fields.field(name).type
        fields = kind if types.is_struct(kind) else []
    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if not any(getattr(types, f"is_{test}")(kind) for test in tests):
        raise UserError(f"{path}: column {text_key!r} holds {kind}, not text; see --text_key")


def _remote_file(path: str) -> Any:
    import fsspec

    return fsspec.open(path).open()


@lru_cache(maxsize=8)
def _remote_metadata(path: str) -> Any:
    """Reads the metadata at the end of a remote file. It can be megabytes, so it is cached for later units."""
    import pyarrow.parquet as pq

    return pq.read_metadata(_remote_file(path))


def parquet_rows(
    path: str, start: int, stop: int, options: ReadOptions, skipped: Counter[str]
) -> Iterator[tuple[int, str | bytes | None]]:
    """Yields number (from 1) and text of rows [start, stop). Rows that are not UTF-8 are yielded as bytes.

    With --skip_bad the rest of a row group after a damaged page is skipped, and counted as one.
    """
    from pyarrow import ArrowException

    with open_parquet(path, options.text_key) as (file, column):
        first = 0
        for g in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(g).num_rows
            if first < stop and first + rows > start:
                try:
                    yield from _group_rows(file, g, column, options.text_key, first, start, stop)
                except (ArrowException, OSError) as e:
                    if not options.skip_bad or is_remote(path) or getattr(e, "errno", None):
                        raise
                    skipped["bad"] += 1
            first += rows


def _group_rows(
    file: Any, group: int, column: int, text_key: str, first: int, start: int, stop: int
) -> Iterator[tuple[int, str | bytes | None]]:
    """Yields number and text of the rows [start, stop) that are in a row group, whose first row is `first`."""
    import pyarrow.compute as pc

    at = first
    batch_size = rows_at_once(file.metadata.row_group(group), column)
    for batch in file.iter_batches(batch_size, row_groups=[group], columns=[text_key]):
        texts = batch.column(0)
        if batch.schema.names[0] != text_key:
            texts = pc.struct_field(texts, text_key.split(".")[1:])
        low, high = max(0, start - at), stop - at
        for number, value in enumerate(texts.slice(low, max(0, high - low)) if low < len(texts) else (), at + low + 1):
            try:
                yield number, value.as_py()
            except UnicodeDecodeError:
                yield number, getattr(value, "value", value).as_buffer().to_pybytes()
        at += len(batch)
        if at >= stop:
            return


def rows_at_once(group: Any, column: int) -> int:
    """Returns how many rows have about a megabyte of text, so that long rows do not need more memory."""
    size = group.column(column).total_uncompressed_size
    return max(1, min(1024, group.num_rows * ROWS_BYTES // max(1, size)))


def object_rows(
    path: str, columns: Iterable[str], convert: Callable[[Any], Any], skip_bad: bool, skipped: Counter[str]
) -> Iterator[tuple[int, Any]]:
    """Yields number (from 1) and `convert(row)` of each row, a dict of those of `columns` that the file has.

    `convert` raises ValueError with a message that follows "row N" if the row is malformed.
    """
    with _open(path) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(OBJECT_ROWS, columns=names):
            for i in range(len(batch)):
                number += 1
                try:
                    yield number, convert(batch.slice(i, 1).to_pylist()[0])
                except ValueError as problem:
                    if not skip_bad:
                        what = f" is {not_utf8(problem)}" if isinstance(problem, UnicodeDecodeError) else problem
                        raise Damaged(f"{row_name(path, number)}{what}") from problem
                    skipped["bad"] += 1


def row_name(path: str, number: int) -> str:
    return f"{path}: row {number}"
