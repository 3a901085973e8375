"""The documents of text files (.txt, .md) and the rows of JSON files, compressed or not.

Line ends become \\n, and a byte-order mark is removed.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from typing import IO, Any

from data.prepare.inputs import Damaged, ReadOptions
from data.tokenizers.tokenizer import END_OF_TEXT
from util.errors import UserError

BLOCK = 2**22
# Characters around an <|endoftext|> that is mentioned in a sentence.
BEFORE_MENTION, AFTER_MENTION = frozenset(" \t`'\"“‘«([{"), frozenset(" \t`'\"”’»)]}.,;:!?")
SEPARATORS = "separators"  # key of their number among the counts of skipped text
Row = tuple[int, Any]  # where it is (the byte of a line, the number of an item or row), and what it was converted to


def open_binary(path: str) -> IO[bytes]:
    """Opens a file, which is decompressed if its name says so."""
    name = path.lower()
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), BLOCK)
    for suffix, opener in ((".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)):
        if name.endswith(suffix):
            return opener(path, "rb")  # type: ignore
    return open(path, "rb")


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turns errors of reading and decompressing into UserErrors, and Damaged where the content is the cause."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as e:
        raise Damaged(f"{path}: damaged compressed file ({e})") from e
    except OSError as e:
        if e.errno is None:  # raised by a decompressor
            raise Damaged(f"{path}: damaged compressed file ({e})") from e
        raise UserError(f"{path}: {e.strerror}") from e


def not_utf8(e: UnicodeDecodeError, before: int = 0) -> str:
    return f"not UTF-8 text ({e.reason} at byte {before + e.start})"


# --- text -----------------------------------------------------------------------------------------


def text_documents(path: str, options: ReadOptions, skipped: Counter[str]) -> Iterator[Iterable[str]]:
    """Yields the documents of a text file, each in blocks to bound memory."""
    if options.skip_bad:
        try:
            for _ in text_blocks(path):
                pass
        except Damaged:
            skipped["bad"] += 1
            return
    found = 0
    for document in split_documents(text_blocks(path), options.document_separator, skipped):
        found += 1
        yield document
    if not found:
        skipped["empty"] += 1


def text_blocks(path: str) -> Iterator[str]:
    """Yields the text of a file in blocks."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    at = 0
    with read_errors(path), open_binary(path) as f:
        try:
            while block := f.read(BLOCK):
                at += len(block)
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as e:
            raise Damaged(f"{path}: {not_utf8(e, at - len(e.object))}") from e


def split_documents(blocks: Iterable[str], separator: str, counts: Counter[str]) -> Iterator[Iterable[str]]:
    """Divides text at the separators and yields the documents that are not empty, each in blocks.

    Each document must be consumed before the next. Line ends beside a separator belong to it. `separator` is a value
    of ReadOptions.document_separator. By default an <|endoftext|> with spaces or quotes on both sides is text: a
    sentence mentions it.
    """
    if separator == "none":
        pieces: Iterable[str] = filter(None, blocks)
    else:
        pieces = _divide(blocks, separator or END_OF_TEXT, not separator, counts)
    for is_text, document in groupby(pieces, key=bool):
        if is_text:
            yield document


def _divide(blocks: Iterable[str], separator: str, may_be_text: bool, counts: Counter[str]) -> Iterator[str]:
    """Yields the text between separators in pieces, and "" for each separator."""
    before, text = "", ""  # `before` is the character before `text`
    begun, divided = True, False  # whether the current document has text; whether a separator was found
    for block in chain(blocks, (None,)):
        text += block or ""
        start = search = 0
        while (at := text.find(separator, search)) >= 0:
            search = at + len(separator)
            if block is not None and search == len(text):
                break  # the next character decides
            if may_be_text and _is_mentioned(text[at - 1] if at else before, text[search : search + 1]):
                continue
            piece = text[start:at].rstrip("\n")
            if piece := piece if begun else piece.lstrip("\n"):
                yield piece
            yield ""
            counts[SEPARATORS] += 1
            start, begun, divided = search, False, True
        # Keep what may belong to a separator: its beginning, and the line ends before it.
        piece = text[start : len(text) if block is None else max(start, len(text) - len(separator))]
        piece = piece.rstrip("\n") if divided or block is not None else piece
        end = start + len(piece)
        before, text = text[end - 1] if end else before, text[end:]
        if piece := piece if begun else piece.lstrip("\n"):
            begun = True
            yield piece


def _is_mentioned(before: str, after: str) -> bool:
    """Returns whether the characters around an <|endoftext|> show that it is part of a sentence."""
    return before in BEFORE_MENTION and after in AFTER_MENTION


# --- JSON -----------------------------------------------------------------------------------------


def is_list(path: str) -> bool:
    """Returns whether a JSON file holds one list. Otherwise it holds a value per line."""
    with read_errors(path), open_binary(path) as f:
        return f.read(2**12).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def list_rows(path: str, convert: Callable[[Any], Any], skip_bad: bool, skipped: Counter[str]) -> Iterator[Row]:
    """Yields number and `convert(item)` of each item of a JSON list, which is read as a whole.

    `convert` raises ValueError with a message that follows "item N" if the item is malformed.
    """
    with read_errors(path), open_binary(path) as f:
        content = f.read()
    try:
        items = json.loads(content)
    except UnicodeDecodeError as e:
        raise Damaged(f"{path}: {not_utf8(e)}") from e
    except (ValueError, RecursionError) as e:
        raise Damaged(f"{path}: a list that is not JSON ({e})") from e
    for number, item in enumerate(items, 1):
        try:
            yield number, convert(item)
        except ValueError as problem:
            if not skip_bad:
                raise Damaged(f"{item_name(path, number)}{problem}") from problem
            skipped["bad"] += 1


def line_rows(
    path: str, start: int, stop: int | None, convert: Callable[[Any], Any], skip_bad: bool, skipped: Counter[str]
) -> Iterator[Row]:
    """Yields place and `convert(value)` of each line that begins from byte `start` to byte `stop`; None: to the end.

    `convert` raises ValueError with a message that follows "line N" if the value is malformed.
    """
    with read_errors(path), open_binary(path) as f:
        at = start
        if at:
            f.seek(at - 1)
            limit = -1 if stop is None else stop - at + 1
            at += len(f.readline(limit)) - 1  # skip the rest of a line of the previous unit
        if not at and not f.peek(1):  # type: ignore[attr-defined]
            skipped["empty"] += 1  # an empty file
        while (stop is None or at < stop) and (line := f.readline()):
            if line.strip():
                try:
                    yield at, convert(parse_line(line))
                except ValueError as problem:
                    if not skip_bad:
                        raise Damaged(f"{line_name(path, at)}{problem}") from problem
                    skipped["bad"] += 1
            at += len(line)


def parse_line(line: bytes) -> Any:
    """Returns the value of a JSON line. Raises ValueError with a message that follows "line N"."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as e:
        raise ValueError(f" is {not_utf8(e)}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(" is not JSON") from e


def text_of(row: Any, text_key: str) -> str | None:
    """Returns the text of a JSON object. Raises ValueError with a message that follows "line N"."""
    try:
        text = field_of(row, text_key)
    except (KeyError, TypeError) as e:
        raise ValueError(f" is not a JSON object with a field {text_key!r} (see --text_key)") from e
    if not isinstance(text, str) and text is not None:
        raise ValueError(f": field {text_key!r} is not text (see --text_key)")
    return text


def field_of(row: Any, text_key: str) -> Any:
    """Returns row[text_key], or else, if the key is `a.b`, field b of the object in field a."""
    if text_key in row:
        return row[text_key]
    for name in text_key.split("."):
        if row is None:
            return None
        row = row[name]
    return row


def line_name(path: str, at: int) -> str:
    """Names the line that begins at byte `at` of the uncompressed text."""
    number = 1
    with open_binary(path) as f:
        while at and (block := f.read(min(at, BLOCK))):
            number += block.count(10)
            at -= len(block)
    return f"{path}: line {number}"


def item_name(path: str, number: int) -> str:
    return f"{path}: item {number}"
