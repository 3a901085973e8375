"""Input of eval/perplexity.py: token shards as one long text, and the documents that data/text.py reads from files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.fingerprint import check_shards_tokenizer, same_tokenizer, tokenizer_in_manifest
from data.loader import TokenStream
from data.prepare.inputs import ReadOptions, find_files
from data.prepare.sources import documents, plan
from data.shards import find_shards, open_shard
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import NAMED_FINGERPRINTS
from eval.encoding import TextEncoder
from eval.model import EvalModel
from util.errors import UserError

SHARDS = (".bin", ".npy")
BLOCK = 2**20  # tokens that are read at a time
# A text for which different tokenizers give different ids.
PROBE = " The 3 naïve Übermenschen don't   know: f(x) != 東京\n\tdef x_1(): return None"


@dataclass(frozen=True)
class Text:
    """Token ids. The first one is only context for the others and is not scored."""

    length: int
    read: Callable[[int, int], np.ndarray]  # read(start, stop) returns ids of shape (stop - start,)
    bytes: int | None = None  # of the whole text as UTF-8; None: the sum over its tokens


def truncate(texts: Iterable[Text], max_tokens: int) -> list[Text]:
    """Returns the texts up to the `max_tokens`-th scored token; 0: all."""
    kept, left = [], max_tokens or 2**63
    for text in texts:
        if left > 0 and text.length > 1:
            kept.append(text if text.length - 1 <= left else replace(text, length=left + 1, bytes=None))
            left -= text.length - 1
    return kept


def count_bytes(texts: Iterable[Text], byte_lengths: np.ndarray | None) -> int | None:
    """Returns the number of UTF-8 bytes of the scored part of the texts, or None if it is unknown.

    `byte_lengths` (vocab_size,) are the bytes of each token's text, 0 for end-of-text.
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


def find_inputs(patterns: list[str], format: str) -> tuple[list[Path], list[str]]:
    """Returns the shards and the text files that names, globs and folders name, in order, each once.

    A folder with shards stands for its validation shards.
    """
    named = [p for p in patterns if p.endswith(SHARDS) or _holds_shards(p)]
    shards = [path for p in named for path in find_shards(p, "input")]
    paths = find_files([p for p in patterns if p not in named], format)
    shards += [Path(p) for p in paths if p.endswith(SHARDS)]
    once: dict[str, Path] = {}
    for path in shards:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values()), [p for p in paths if not p.endswith(SHARDS)]


def _holds_shards(path: str) -> bool:
    return os.path.isdir(path) and any(name.endswith(SHARDS) for name in os.listdir(path))


def open_texts(
    shards: list[Path], files: list[str], options: ReadOptions, model: EvalModel, skipped: Counter[str]
) -> list[Text]:
    """Returns the concatenated shards as one text, then each document of the files. Counts what `documents` skips."""
    texts = [shard_text(shards, model)] if shards else []
    for unit in plan(files, options):
        for document in documents(unit, options, skipped):
            texts.append(document_text("".join(document.text), model.text))
    return texts


def shard_text(paths: list[Path], model: EvalModel) -> Text:
    """Returns the concatenated shards, checked against the model's tokenizer."""
    fingerprint = model.checkpoint.tokenizer_fingerprint if model.checkpoint else {"name": "none"}
    check_shards_tokenizer(paths, fingerprint, model.vocab_size, "input")
    stream = TokenStream([open_shard(path, model.vocab_size) for path in paths])

    def read(start: int, stop: int) -> np.ndarray:
        ids = np.empty(stop - start, np.int32)
        stream.read_into(ids, start)
        return ids

    return Text(len(stream), read)


def document_text(document: str, encoder: TextEncoder) -> Text:
    """Encodes a document. It starts with BOS or end-of-text, which some tokenizers add themselves."""
    ids = encoder.encode(document)
    if ids[:1] != encoder.bos_tokens:
        ids = [*encoder.bos_tokens, *ids]
    array = np.array(ids, np.int32)
    return Text(len(ids), lambda start, stop: array[start:stop], len(document.encode()))


def byte_lengths_for(paths: list[Path], model: EvalModel) -> np.ndarray | None:
    """Returns the bytes of each token (vocab_size,), or None if the tokenizer is unknown.

    It is the model's tokenizer, or else the one in the shards' manifests. It is an error if the two differ.
    """
    if model.byte_lengths is not None or not paths:
        return model.byte_lengths
    recorded = [tokenizer_in_manifest(folder) for folder in dict.fromkeys(path.parent for path in paths)]
    names = {t["name"] for t in recorded if t and same_tokenizer(t, NAMED_FINGERPRINTS.get(t["name"], {"name": ""}))}
    if len(names) != 1 or None in recorded:
        return None
    tokenizer = load_tokenizer(names.pop())
    if model.checkpoint is None and model.text.encode_continuation(PROBE) != tokenizer.encode(PROBE):
        raise UserError(
            f"--input: the shards in {paths[0].parent} were made with tokenizer {tokenizer.name}, which differs from"
            f" the tokenizer of {model.name}; use text files, or shards made with that tokenizer"
        )
    return tokenizer.byte_lengths(max(model.vocab_size, tokenizer.vocab_size))
