"""Text → shards: documents are tokenized, each after an end-of-text token, and written with a manifest.

Everything is written to a hidden folder inside the output and moved out when it is complete, the
manifest last, so an interrupted run leaves nothing that a glob would pick up.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfg.errors import UserError
from cfg.files import file_sha256, write_atomically
from data.shards import token_dtype, write_shard

if TYPE_CHECKING:
    from tiktoken import Encoding

PARTIAL, MANIFEST = ".partial", "manifest.json"
DOCUMENTS_AT_ONCE = 256


def encode_documents(documents: Iterable[str], tokenizer: Encoding) -> Iterator[np.ndarray]:
    """Each document as end-of-text followed by its tokens, (n,) uint16 or uint32, in order; uses all cores."""
    dtype = token_dtype(tokenizer.n_vocab)
    documents = iter(documents)
    while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
        for tokens in tokenizer.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
            yield np.array([tokenizer.eot_token, *tokens], dtype)


class ShardWriter:
    """Collects tokens into shards of `shard_size` under one split name; `paths` are those written."""

    def __init__(
        self, folder: Path, prefix: str, vocab_size: int, shard_size: int, numbered: bool = True, first: int = 0
    ):
        self.folder, self.prefix, self.vocab_size = folder, prefix, vocab_size
        self.shard_size, self.numbered, self.number = shard_size, numbered, first
        self.paths: list[Path] = []
        self.tokens = 0
        self._pieces: list[np.ndarray] = []
        self._held = 0

    def add(self, tokens: np.ndarray) -> None:
        while self._held + len(tokens) >= self.shard_size:
            room = self.shard_size - self._held
            self._hold(tokens[:room])
            self._write()
            tokens = tokens[room:]
        self._hold(tokens)

    def _hold(self, tokens: np.ndarray) -> None:
        if len(tokens):
            self._pieces.append(tokens)
            self._held += len(tokens)

    def _write(self) -> None:
        name = f"{self.prefix}_{self.number:06d}.bin" if self.numbered else f"{self.prefix}.bin"
        write_shard(self.folder / name, np.concatenate(self._pieces), self.vocab_size)
        self.paths.append(self.folder / name)
        self.tokens += self._held
        self.number += 1
        self._pieces, self._held = [], 0

    def close(self) -> None:
        if self._pieces:
            self._write()


def begin(output_dir: Path, recipe: dict[str, Any]) -> Path | None:
    """The folder to write into, or None if `output_dir` already holds what `recipe` describes.

    Raises UserError if it holds shards made otherwise: they are not overwritten.
    """
    partial = output_dir / PARTIAL
    if (partial / MANIFEST).is_file():  # complete, but stopped while it was moved out
        _publish(output_dir)
    manifest = output_dir / MANIFEST
    if manifest.is_file():
        if _recipe(manifest) == recipe:
            return None
        raise UserError(
            f"{output_dir} holds shards made from other input or options; choose another --output_dir or remove it"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir={output_dir} is a file")
    if list(output_dir.glob("*.bin")):
        raise UserError(f"{output_dir} holds .bin files without a manifest; choose another --output_dir or remove them")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--output_dir={output_dir}: {e.strerror}") from e
    return partial


def _recipe(manifest: Path) -> Any:
    try:
        return json.loads(manifest.read_text())["recipe"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{manifest}: not a manifest of rawgpt; choose another --output_dir") from e


def finish(output_dir: Path, writers: list[ShardWriter], facts: dict[str, Any]) -> None:
    """Closes the writers, writes the manifest and moves everything into place."""
    files = []
    for writer in writers:
        writer.close()
        files += [{"name": p.name, "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in writer.paths]
    content = json.dumps({"format": 1, **facts, "files": files}, indent=1) + "\n"
    write_atomically(output_dir / PARTIAL / MANIFEST, content.encode())
    _publish(output_dir)


def _publish(output_dir: Path) -> None:
    partial = output_dir / PARTIAL
    for shard in sorted(partial.glob("*.bin")):
        os.replace(shard, output_dir / shard.name)
    os.replace(partial / MANIFEST, output_dir / MANIFEST)
    shutil.rmtree(partial)
