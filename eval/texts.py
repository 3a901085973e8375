"""What perplexity is measured on: token shards as one long text, and text files, of which each is a document."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.fingerprint import check_shards_tokenizer, same_tokenizer, tokenizer_in_manifest
from data.loader import TokenStream
from data.shards import find_shards, open_shard
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import NAMED_FINGERPRINTS
from eval.model import Subject
from util.errors import UserError

PACKED = (".parquet", ".gz", ".zst")
BLOCK = 2**20  # tokens at a time
PROBE = " The 3 naïve Übermenschen don't   know: f(x) != 東京\n\tdef x_1(): return None"  # tokenizers differ on it


@dataclass(frozen=True)
class Text:
    """Token ids, of which the first is there for the others to follow on."""

    length: int
    read: Callable[[int, int], np.ndarray]  # start, stop → their ids, (stop - start,)
    bytes: int | None = None  # of the whole as UTF-8; None: those of its tokens


def cut(texts: Iterable[Text], max_tokens: int) -> list[Text]:
    """The texts up to the `max_tokens`-th token that is scored; 0: all."""
    kept, left = [], max_tokens or 2**63
    for text in texts:
        if left > 0 and text.length > 1:
            kept.append(text if text.length - 1 <= left else replace(text, length=left + 1, bytes=None))
            left -= text.length - 1
    return kept


def count_bytes(texts: Iterable[Text], byte_lengths: np.ndarray | None) -> int | None:
    """UTF-8 bytes of all that is scored of the texts; None where they are not known.

    `byte_lengths` (vocab_size,) of each token; end-of-text tokens have none.
    """
    total = 0
    for text in texts:
        if text.bytes is not None:
            total += text.bytes
        elif byte_lengths is None:
            return None
        else:
            for start in range(1, text.length, BLOCK):
                total += int(byte_lengths[text.read(start, min(start + BLOCK, text.length))].sum())
    return total


def find_inputs(patterns: list[str]) -> tuple[list[Path], list[Path]]:
    """Shards and text files that names and globs stand for, in order, each once.

    Raises UserError for one that matches nothing, or a file of a kind that is not read.
    """
    if folders := [pattern for pattern in patterns if os.path.isdir(os.path.expanduser(pattern))]:
        raise UserError(f"--input: {folders[0]} is a folder; name its files, '{Path(folders[0]) / '*.bin'}' say")
    paths = dict.fromkeys(path for pattern in patterns for path in find_shards(os.path.expanduser(pattern), "input"))
    if packed := [path for path in paths if path.suffix in PACKED]:
        raise UserError(
            f"--input: {packed[0]} is not read here, only .bin, .jsonl and plain text; python data/text.py makes"
            " shards of it"
        )
    return [p for p in paths if p.suffix == ".bin"], [p for p in paths if p.suffix != ".bin"]


def open_texts(shards: list[Path], files: list[Path], text_key: str, subject: Subject) -> list[Text]:
    """The shards end to end, then each document of the files. Raises UserError for what is wrong with one of them."""
    texts = [shard_text(shards, subject)] if shards else []
    for path in files:
        documents = json_documents(path, text_key) if path.suffix == ".jsonl" else iter([read_text(path)])
        texts += [document_text(document, subject) for document in documents]
    return texts


def shard_text(paths: list[Path], subject: Subject) -> Text:
    if subject.tokenizer_identity and subject.tokenizer_identity["name"] != "none":
        check_shards_tokenizer(paths, subject.tokenizer_identity, "input")
    stream = TokenStream([open_shard(path, subject.vocab_size) for path in paths])

    def read(start: int, stop: int) -> np.ndarray:
        ids = np.empty(stop - start, np.int32)
        stream.read_into(ids, start)
        return ids

    return Text(len(stream), read)


def document_text(document: str, subject: Subject) -> Text:
    """The document after the token that the model knows the beginning of one by."""
    ids = subject.encode(document)
    if subject.before_text is not None and ids[:1] != [subject.before_text]:  # unless the tokenizer has put it there
        ids = [subject.before_text, *ids]
    array = np.array(ids, np.int32)
    return Text(len(ids), lambda start, stop: array[start:stop], len(document.encode()))


def byte_lengths_for(paths: list[Path], subject: Subject) -> np.ndarray | None:
    """Bytes of each token of the shards: by the subject's tokenizer, else by the one their manifests name.

    None where neither is known. Raises UserError if that one gives other ids than the subject's own.
    """
    if subject.byte_lengths is not None or not paths:
        return subject.byte_lengths
    made = [tokenizer_in_manifest(folder) for folder in dict.fromkeys(path.parent for path in paths)]
    named = {m["name"] for m in made if m and same_tokenizer(m, NAMED_FINGERPRINTS.get(m["name"], {"name": ""}))}
    if len(named) != 1 or None in made:
        return None
    tokenizer = load_tokenizer(named.pop())
    if subject.gpt is None and subject.encode_more(PROBE) != tokenizer.encode(PROBE):
        raise UserError(
            f"--input: the shards in {paths[0].parent} were made with tokenizer {tokenizer.name}, which gives other ids"
            f" than that of {subject.name}; give text, or other shards"
        )
    return tokenizer.byte_lengths(max(subject.vocab_size, tokenizer.vocab_size))


def read_text(path: Path) -> str:
    """The file as it is, line ends too. Raises UserError if it cannot be read, is empty or is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    if not content:
        raise UserError(f"{path}: empty file")
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from e


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1 on, and value of each line that is not blank. Raises UserError for one that is no JSON."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: not JSON") from e


def json_documents(path: Path, text_key: str) -> Iterator[str]:
    """The field `text_key` of each line of a .jsonl file, without those that are empty."""
    for number, row in json_lines(path):
        if document := text_field(row, text_key, f"{path}, line {number}", "; see --text_key"):
            yield document


def text_field(row: Any, key: str, where: str, hint: str = "") -> str:
    """A field of a line as text. Raises UserError, which says `where`, if it is none that can be written as UTF-8."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise UserError(f"{where}: not an object with text in a field {key!r}{hint}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: field {key!r} holds half of a surrogate pair, which is no text") from e
    return value
