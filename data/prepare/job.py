"""Text to shards, on all cores. The bytes of the shards do not depend on the number of workers or on interruptions.

The input is divided into work units (data/prepare/sources.py). Worker processes read and encode one unit at a time and
write its tokens to a file. This process appends the files to the shards in the order of the units, and keeps a journal
of its progress. Everything is written to the hidden folder `.partial` of the output. Complete shards are moved out, the
manifest last. So an interrupted command leaves no file that a glob would find, and the next command resumes from the
journal.

A part (`--part 3/16`) is a folder with the tokens of a share of the units. `--join` concatenates all parts and cuts
them into the shards that a single run writes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.journal import (
    JOURNAL,
    RECIPE,
    Journal,
    Progress,
    difference,
    hash_units,
    open_journal,
    other_command,
    read_object,
    same_pieces,
)
from data.prepare.sources import WorkUnit, describe_skipped
from data.prepare.workers import Encoded, EncodeOptions, encoded_units, text_bytes
from data.shards import ShardWriter, open_shard
from data.tokenizers.fim import sentinels
from data.tokenizers.tokenizer import Tokenizer
from util.errors import MACHINE_REFUSES, UserError, refuse_broken_link, user_errors
from util.files import take_lock, write_atomically

PARTIAL, RECUT, MANIFEST = ".partial", "recut", "manifest.json"
JOURNAL_SECONDS = 2.0
READ_TOKENS = 2**22


@dataclass(frozen=True)
class Job:
    """The output of a command that prepares data, and the settings that decide it."""

    output_dir: Path
    name: str  # first part of the shards' names
    recipe: dict[str, Any]  # everything that decides the shards' bytes; stored in the manifest
    tokenizer: Tokenizer
    options: EncodeOptions
    shard_size: int = 10**8  # tokens
    val_tokens: int = 10**8  # the first shard's tokens
    val_tenth: bool = False  # validation gets at most a tenth of all tokens
    max_tokens: int = 0  # 0: no limit
    workers: int = 1
    fingerprints: dict[str, Any] = field(default_factory=dict)  # of the input files, by path
    pieces: bool = False  # writes input for --join or a mixture instead of shards to train on

    def validation(self, total: int) -> int:
        """Returns how many of `total` tokens are for validation."""
        if self.pieces:
            return self.val_tokens
        if self.val_tenth:
            return min(self.val_tokens, total // 10)
        return self.val_tokens if total > self.val_tokens else total // 10

    def layout(self, val_tokens: int) -> Iterator[tuple[str, int]]:
        """Yields names and sizes of the shards, in order."""
        if self.pieces:
            yield from ((f"piece_{i:06d}.bin", self.shard_size) for i in count())
        if val_tokens:
            yield f"{self.name}_val_000000.bin", val_tokens
        for i in count(1):
            yield f"{self.name}_train_{i:06d}.bin", self.shard_size


def prepare(job: Job, units: list[WorkUnit]) -> dict[str, Any] | None:
    """Encodes the units into the shards of `job`. Returns the manifest, or None if the shards existed already."""
    if job.options.fim_rate:
        sentinels(job.tokenizer)
    partial = open_job(job.output_dir, job.recipe, job)
    if partial is None:
        return None
    with disk_errors(job.output_dir), locked(job.output_dir):
        for stale in partial.glob("unit_*"):
            stale.unlink()
        writer = ShardWriter(partial, job.layout(job.val_tokens), job.tokenizer.vocab_size)
        journal = open_journal(partial, job.recipe, hash_units(units, job.fingerprints), writer)
        progress = journal.progress
        if progress.units:
            print(f"{job.output_dir}: resuming after {progress.tokens:,} tokens")
        if not job.max_tokens or progress.tokens < job.max_tokens:
            try:
                _encode(job, units, journal)
            except UserError:
                journal.write()
                raise
        writer.close()
        journal.write()
        return _finish(job, partial, progress, writer.files)


def _encode(job: Job, units: list[WorkUnit], journal: Journal) -> None:
    from tqdm import tqdm

    progress = journal.progress
    options = replace(job.options, max_tokens=job.max_tokens)
    sizes = [unit.size for unit in units]
    started, saved, before = time.monotonic(), time.monotonic(), progress.tokens
    interactive = os.isatty(2)
    with tqdm(
        total=sum(sizes),
        initial=sum(sizes[: progress.units]),
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        mininterval=0.1 if interactive else 60,
        delay=0 if interactive else 60,  # in a log file: one line a minute, none for the first minute
    ) as bar:
        for encoded in encoded_units(units, progress.units, options, job.tokenizer, journal.partial, job.workers):
            if not progress.units or units[progress.units].path != units[progress.units - 1].path:
                journal.file_start = journal.state()
            _append(job, encoded, progress, journal.writer)
            rate = (progress.tokens - before) / (time.monotonic() - started)
            bar.set_postfix_str(f"{progress.tokens:,} tokens, {rate / 1e6:.2f}M tok/s", refresh=False)
            bar.update(sizes[progress.units - 1])
            if time.monotonic() - saved > JOURNAL_SECONDS:
                journal.write()
                saved = time.monotonic()
            if job.max_tokens and progress.tokens >= job.max_tokens:
                return


def _append(job: Job, encoded: Encoded, progress: Progress, writer: ShardWriter) -> None:
    """Appends the tokens of a unit to the shards, up to --max_tokens, and deletes the unit's file."""
    room = job.max_tokens - progress.tokens if job.max_tokens else encoded.tokens
    left = min(room, encoded.tokens)
    cut = left < encoded.tokens
    progress.units += 1
    progress.tokens += left
    progress.documents += 0 if cut else encoded.documents
    progress.text_bytes += 0 if cut else encoded.text_bytes
    progress.skipped.update(encoded.skipped)
    with open(encoded.path, "rb") as f:
        while left:
            tokens = np.fromfile(f, writer.dtype, min(left, READ_TOKENS))
            assert len(tokens), "a unit's file is shorter than its worker reported"
            writer.add(tokens)
            left -= len(tokens)
            if cut:  # the worker counted the whole unit: count the part that is used
                progress.documents += int(np.count_nonzero(tokens == job.tokenizer.end_of_text))
                progress.text_bytes += text_bytes(tokens, job.tokenizer)
    os.unlink(encoded.path)


def _finish(job: Job, partial: Path, progress: Progress, files: list[dict[str, Any]]) -> dict[str, Any]:
    """Publishes complete shards. Cuts them again if the input is too small for the planned validation shard."""
    if not progress.tokens and not job.pieces:
        shutil.rmtree(partial)
        raise UserError(f"the input contains no text{describe_skipped(progress.skipped)}")
    folder, val_tokens = partial, job.validation(progress.tokens)
    if val_tokens != job.val_tokens:
        folder = partial / RECUT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        writer = ShardWriter(folder, job.layout(val_tokens), job.tokenizer.vocab_size)
        for tokens in tokens_in([partial / row["name"] for row in files], job.tokenizer.vocab_size):
            writer.add(tokens)
        writer.close()
        files = writer.files
    return publish(job, folder, progress, files)


def publish(
    job: Job, folder: Path, progress: Progress, files: list[dict[str, Any]], facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Writes the manifest beside the complete shards in `folder`, moves all to the output and returns the manifest."""
    manifest = {
        "format": 1,
        "recipe": job.recipe,
        "tokenizer": job.tokenizer.fingerprint,
        "vocab_size": job.tokenizer.vocab_size,
        "tokens": progress.tokens,
        "documents": progress.documents,
        "text_bytes": progress.text_bytes,
        "skipped": dict(progress.skipped),
        **(facts or {}),
        "files": files,
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    _move_out(job.output_dir)
    return manifest


def _move_out(output_dir: Path) -> None:
    """Moves complete shards from `.partial` to the output. Shards are complete if there is a manifest beside them."""
    partial = output_dir / PARTIAL
    for folder in (partial / RECUT, partial):
        if (folder / MANIFEST).is_file():
            for row in json.loads((folder / MANIFEST).read_text())["files"]:
                if (folder / row["name"]).exists():
                    (output_dir / row["name"]).parent.mkdir(exist_ok=True)  # data/sft.py's tokenizer is in a folder
                    os.replace(folder / row["name"], output_dir / row["name"])
            os.replace(folder / MANIFEST, output_dir / MANIFEST)
            shutil.rmtree(partial)
            return


def tokens_in(paths: list[Path], vocab_size: int) -> Iterator[np.ndarray]:
    """Yields all tokens of the shards in order, at most READ_TOKENS at a time."""
    for path in paths:
        shard = open_shard(path, vocab_size)
        for start in range(0, shard.count, READ_TOKENS):
            yield shard.read(start, min(READ_TOKENS, shard.count - start))


def open_job(output_dir: Path, recipe: dict[str, Any], job: Job | None = None) -> Path | None:
    """Returns the hidden folder to write into, or None if `output_dir` already holds the shards of `recipe`.

    Shards of another recipe, complete or not, are an error: they are never overwritten. With `job`, `open_journal`
    decides on unfinished work.
    """
    refuse_broken_link(output_dir, "output_dir")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir={output_dir} is a file")
    partial = output_dir / PARTIAL
    if partial.is_dir():
        with locked(output_dir):
            _move_out(output_dir)  # if the last command was interrupted while it moved its shards
    # --- complete ---
    existing = read_manifest(output_dir)
    if existing is not None:
        if existing["recipe"] != recipe and not (job and job.pieces and same_pieces(existing, recipe)):
            raise UserError(
                f"{output_dir} holds shards made from other input or options"
                f" ({', '.join(difference(existing['recipe'], recipe))}); choose another --output_dir or remove it"
            )
        for row in existing["files"]:
            path = output_dir / row["name"]
            if not path.is_file() or path.stat().st_size != row["bytes"]:
                raise UserError(f"{path} is missing or truncated; remove {output_dir} to make it again")
        shutil.rmtree(partial, ignore_errors=True)  # if the last command was interrupted before it did this
        return None
    if list(output_dir.glob("*.bin")):
        raise UserError(f"{output_dir} holds .bin files without a manifest; choose another --output_dir or remove them")
    # --- unfinished, or new ---
    unfinished = job is None and (partial / JOURNAL).exists()
    if unfinished and (changed := difference(read_object(partial / RECIPE), recipe)):
        raise other_command(partial, changed)
    with user_errors(f"--output_dir={output_dir}"):
        partial.mkdir(parents=True, exist_ok=True)
    return partial


def tokenizer_recipe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the part of a recipe that the tokenizer decides. Most put only end-of-text before a document."""
    prefix = tokenizer.document_prefix
    found: dict[str, Any] = {"tokenizer": tokenizer.sha256}  # its path may differ between machines
    return found if prefix == [tokenizer.end_of_text] else {**found, "document_prefix": prefix}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder of shards, or None if there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_object(path)
    kinds = {"recipe": dict, "tokenizer": dict, "files": list, "tokens": int, "documents": int}
    if not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: not a manifest that rawgpt wrote; choose another --output_dir")
    return manifest


def summary(output_dir: Path, manifest: dict[str, Any]) -> str:
    """Describes the output in one line."""
    notes = describe_skipped(manifest["skipped"], manifest["recipe"].get("document_separator", ""))
    if "part" in manifest["recipe"]:
        return f"{output_dir}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens{notes}, for --join"
    val = sum(row["tokens"] for row in manifest["files"] if "_val_" in row["name"])
    return (
        f"{output_dir}: {manifest['documents']:,} documents, {manifest['tokens'] - val:,} training and {val:,}"
        f" validation tokens{notes}"
    )


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Locks an output directory. A second command fails with a UserError."""
    (output_dir / PARTIAL).mkdir(parents=True, exist_ok=True)
    lock, holder = take_lock(output_dir / PARTIAL / ".lock")
    with lock:
        if holder:
            raise UserError(f"--output_dir={output_dir}: another command (process {holder}) is preparing it")
        yield


@contextmanager
def disk_errors(output_dir: Path) -> Iterator[None]:
    """Turns a disk error, such as a full disk, into a UserError that says how to resume."""
    try:
        yield
    except OSError as e:
        if e.errno not in MACHINE_REFUSES:
            raise
        raise UserError(
            f"--output_dir={output_dir}: {e.strerror}; finished work is kept, repeat the command to resume"
        ) from e
