"""Units → token files, in processes: each reads, encodes and writes by itself, so no text passes between them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.encoder import Encode, make_encoder, split_safely
from data.prepare.sources import Document, WorkUnit, documents, retry
from data.shards import token_dtype
from data.tokenizers import fim
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import Tokenizer
from util.errors import UserError

HELD_TOKENS = 2**22  # in memory before they are written
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 32, 2**16


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the tokens of a unit, and `fast`, which does not."""

    text_key: str = "text"
    skip_bad: bool = False
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.0
    fast: bool = True
    max_tokens: int = 0  # of a unit, about; 0: all


@dataclass
class Encoded:
    """The tokens of a unit, in a file of their own without a header, and what was counted."""

    path: Path
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class Encoder:
    """What a process keeps from unit to unit."""

    options: EncodeOptions
    tokenizer: Tokenizer
    encode: Encode

    @classmethod
    def of(cls, options: EncodeOptions, tokenizer: Tokenizer) -> Encoder:
        """`options.fast` must be what `check_fast` left of it."""
        return cls(options, tokenizer, make_encoder(tokenizer, fast=options.fast, compared=True)[0])


def text_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes that tokens stand for; special ones stand for none."""
    return int(tokenizer.byte_lengths(tokenizer.vocab_size)[tokens].sum())


def encode_unit(unit: WorkUnit, path: Path, encoder: Encoder) -> Encoded:
    """Writes the tokens of a unit to `path`, which then appears whole."""
    tokenizer, options = encoder.tokenizer, encoder.options
    dtype = token_dtype(tokenizer.vocab_size)
    start = np.array(tokenizer.document_prefix, np.uint32)
    found = Encoded(path)
    held: list[np.ndarray] = []
    half = path.with_name(f"{path.name}.{os.getpid()}")

    with open(half, "wb") as f:

        def write() -> None:
            f.write(np.concatenate(held).astype(dtype).tobytes())
            held.clear()

        holds = 0
        for document in documents(unit, options.text_key, options.skip_bad, found.skipped):
            if options.max_tokens and found.tokens >= options.max_tokens:
                break
            found.tokens += len(start)
            held.append(start)
            found.documents += 1
            for part in parts(document, encoder):
                tokens = np.array([part], np.uint32) if isinstance(part, int) else encoder.encode(part)
                found.text_bytes += 0 if isinstance(part, int) else len(part.encode())
                held.append(tokens)
                found.tokens += len(tokens)
                holds += len(tokens)
                if holds > HELD_TOKENS:
                    write()
                    holds = 0
        if held:
            write()
    os.replace(half, path)
    return found


def parts(document: Document, encoder: Encoder) -> Iterator[str | int]:
    """A document's text in the order and the pieces in which it is encoded, with ids of sentinels between."""
    options, tokenizer = encoder.options, encoder.tokenizer
    if options.fim_rate:
        for part in fim.rearrange("".join(document), options.fim_rate, options.fim_spm_rate, tokenizer):
            yield from [part] if isinstance(part, int) else split_safely([part], tokenizer.pattern)
    else:
        yield from split_safely(document, tokenizer.pattern)


def check_fast(options: EncodeOptions, tokenizer: Tokenizer, units: list[WorkUnit]) -> EncodeOptions:
    """`options`, without `fast` if the fast encoder is not to be had or differs from tiktoken on the units' text.

    Looks at the beginnings of documents of the first and the middle unit.
    """
    if not options.fast:
        return options

    def beginnings(unit: WorkUnit) -> list[str]:
        some = islice(documents(unit, options.text_key, True, Counter()), SAMPLE_DOCUMENTS)
        return ["".join(islice(document, 1))[:SAMPLE_CHARACTERS] for document in some]

    chosen = [units[0], units[len(units) // 2]] if units else []
    sample = [text for unit in chosen for text in retry(unit.path, partial(beginnings, unit))]
    _, name = make_encoder(tokenizer, sample)
    return options if name == "splintr" else replace(options, fast=False)


_encoder: Encoder | None = None


def _start_worker(options: EncodeOptions, name: str, sha256: str) -> None:
    global _encoder
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:  # a killed parent cannot tell its children
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(name)  # a pipe would hold up the parent until each worker has read it
    assert tokenizer.sha256 == sha256, f"tokenizer {name} changed while the command ran"
    _encoder = Encoder.of(options, tokenizer)


def _start() -> None:
    """What starts a worker, before there is work for it."""


def _work(unit: WorkUnit, path: Path, fast: bool) -> Encoded:
    global _encoder
    assert _encoder is not None
    if _encoder.options.fast and not fast:
        _encoder = Encoder.of(replace(_encoder.options, fast=False), _encoder.tokenizer)
    encoder = _encoder
    return retry(unit.path, lambda: encode_unit(unit, path, encoder))


def _submit(pool: ProcessPoolExecutor, *call: Any) -> Future[Any]:
    """A worker that this starts has SIGINT blocked from its first moment: Ctrl-C is the parent's to answer."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(*call)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def encoded_units(
    units: list[WorkUnit], first: int, options: EncodeOptions, tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[Encoded]:
    """The units from number `first` on, encoded, in order; their files lie in `folder` until they are taken.

    At most two units a worker are under way, which bounds memory and disk.
    """
    workers = min(workers, len(units) - first)
    if workers <= 1:
        encoder = Encoder.of(check_fast(options, tokenizer, units[first:]), tokenizer)
        for i in range(first, len(units)):
            path = folder / f"unit_{i:08d}"
            yield retry(units[i].path, partial(encode_unit, units[i], path, encoder))
        return
    context = multiprocessing.get_context("spawn")  # nothing of ours is inherited, a lock least of all
    waiting: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (options, tokenizer.name, tokenizer.sha256)) as pool:
        try:
            for _ in range(workers):
                _submit(pool, _start)
            options = check_fast(options, tokenizer, units[first:])  # while they start
            for i in range(first, len(units)):
                waiting.append(_submit(pool, _work, units[i], folder / f"unit_{i:08d}", options.fast))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise UserError(
                "a worker process was killed, for want of memory perhaps; the same command goes on, with fewer"
                " --workers if need be"
            ) from e
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
