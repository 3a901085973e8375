"""Worker processes that encode work units. A worker reads text and writes tokens itself; pipes carry only counts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.encoder import Encode, make_encoder, split_safely
from data.prepare.inputs import ReadOptions
from data.prepare.sources import WorkUnit, documents, retry
from data.shards import token_dtype
from data.tokenizers import fim
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import Tokenizer
from util.errors import UserError

HELD_TOKENS = 2**22  # tokens in memory before they are written
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS = 32, 2**16


@dataclass(frozen=True)
class EncodeOptions(ReadOptions):
    """The options that decide the tokens of a unit, and `fast`, which only decides the speed."""

    fim_rate: float = 0.0
    fim_spm_rate: float = 0.0
    fast: bool = True
    max_tokens: int = 0  # stop a unit after about so many tokens; 0: no limit


@dataclass
class Encoded:
    """The result of a unit: a file of tokens without a header, and counts."""

    path: Path
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class Encoder:
    """The state that a process keeps between units."""

    options: EncodeOptions
    tokenizer: Tokenizer
    encode: Encode

    @classmethod
    def of(cls, options: EncodeOptions, tokenizer: Tokenizer) -> Encoder:
        """Creates an encoder from options that `check_fast` has returned."""
        return cls(options, tokenizer, make_encoder(tokenizer, fast=options.fast, compared=True)[0])


def text_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Returns the number of UTF-8 bytes of the tokens. Special tokens count 0."""
    return int(tokenizer.byte_lengths(tokenizer.vocab_size)[tokens].sum())


def encode_unit(unit: WorkUnit, path: Path, encoder: Encoder) -> Encoded:
    """Writes the tokens of a unit to `path`, which appears when it is complete."""
    tokenizer, options = encoder.tokenizer, encoder.options
    dtype = token_dtype(tokenizer.vocab_size)
    prefix = np.array(tokenizer.document_prefix, np.uint32)
    found = Encoded(path)
    held: list[np.ndarray] = []
    half = path.with_name(f"{path.name}.{os.getpid()}")

    with open(half, "wb") as f:

        def write() -> None:
            for tokens in held:
                f.write(tokens.astype(dtype).tobytes())
            held.clear()

        holds = 0
        for document in documents(unit, options, found.skipped):
            if options.max_tokens and found.tokens >= options.max_tokens:
                break
            before = replace(found)
            found.tokens += len(prefix)
            held.append(prefix)
            found.documents += 1
            for part in parts(document.text, encoder):
                try:
                    tokens = np.array([part], np.uint32) if isinstance(part, int) else encoder.encode(part)
                except UserError as e:
                    if not options.skip_bad:
                        raise UserError(f"{document.place()}: {e}") from e
                    write()
                    f.truncate(before.tokens * dtype.itemsize)
                    f.seek(0, os.SEEK_END)
                    found = before
                    found.skipped["bad"] += 1
                    break
                found.text_bytes += 0 if isinstance(part, int) else len(part.encode())
                held.append(tokens)
                found.tokens += len(tokens)
                holds += len(tokens)
                if holds > HELD_TOKENS:
                    write()
                    holds = 0
        write()
    os.replace(half, path)
    return found


def parts(document: Iterable[str], encoder: Encoder) -> Iterator[str | int]:
    """Yields the pieces of a document to encode, in order: text, and the ids of sentinels for fill-in-the-middle."""
    options, tokenizer = encoder.options, encoder.tokenizer
    if options.fim_rate:
        for part in fim.rearrange("".join(document), options.fim_rate, options.fim_spm_rate, tokenizer):
            yield from [part] if isinstance(part, int) else split_safely([part], tokenizer.pattern)
    else:
        yield from split_safely(document, tokenizer.pattern)


def check_fast(options: EncodeOptions, tokenizer: Tokenizer, units: list[WorkUnit]) -> EncodeOptions:
    """Turns `fast` off if the fast encoder is missing or disagrees with tiktoken on a sample.

    The sample is the beginnings of documents of the first and the middle unit.
    """
    if not options.fast:
        return options

    def beginnings(unit: WorkUnit) -> list[str]:
        some = islice(documents(unit, replace(options, skip_bad=True), Counter()), SAMPLE_DOCUMENTS)
        return ["".join(islice(document.text, 1))[:SAMPLE_CHARACTERS] for document in some]

    chosen = [units[0], units[len(units) // 2]] if units else []
    sample = [text for unit in chosen for text in retry(unit.path, partial(beginnings, unit))]
    _, name = make_encoder(tokenizer, sample)
    return options if name == "splintr" else replace(options, fast=False)


_encoder: Encoder | None = None


def _start_worker(options: EncodeOptions, name: str, sha256: str) -> None:
    global _encoder
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:  # a killed parent cannot stop its children
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    # Load the tokenizer again: sending it would block the parent until each worker had read it from the pipe.
    tokenizer = load_tokenizer(name)
    assert tokenizer.sha256 == sha256, f"tokenizer {name} changed while the command ran"
    _encoder = Encoder.of(options, tokenizer)


def _start() -> None:
    """Does nothing. Submitting it starts a worker before there is work."""


def _work(unit: WorkUnit, path: Path, fast: bool) -> Encoded:
    global _encoder
    assert _encoder is not None
    if _encoder.options.fast and not fast:
        _encoder = Encoder.of(replace(_encoder.options, fast=False), _encoder.tokenizer)
    encoder = _encoder
    return retry(unit.path, lambda: encode_unit(unit, path, encoder))


def _submit(pool: ProcessPoolExecutor, *call: Any) -> Future[Any]:
    """Submits a call. A worker started by it inherits a blocked SIGINT, so that only the parent handles Ctrl-C."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(*call)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def encoded_units(
    units: list[WorkUnit], first: int, options: EncodeOptions, tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[Encoded]:
    """Encodes the units from number `first` on and yields the results in order. The caller deletes their files.

    At most two units per worker are in progress, which bounds memory and disk.
    """
    workers = min(workers, len(units) - first)
    if workers <= 1:
        encoder = Encoder.of(check_fast(options, tokenizer, units[first:]), tokenizer)
        for i in range(first, len(units)):
            path = folder / f"unit_{i:08d}"
            yield retry(units[i].path, partial(encode_unit, units[i], path, encoder))
        return
    context = multiprocessing.get_context("spawn")  # a forked worker would inherit the lock on the output
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
                "a worker process was killed, perhaps because memory ran out; repeat the command to resume, with fewer"
                " --workers if necessary"
            ) from e
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
