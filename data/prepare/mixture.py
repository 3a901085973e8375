"""Mixtures: documents of several sources, drawn into one data set by weight.

A mixture is a YAML file:

    tokens: 1B                     # in total, also 1_000_000_000 or 1e9
    sources:
      web:  {input: "web/*.parquet", weight: 0.7}
      code: {input: [src/], text_key: content, weight: 0.3, fim_rate: 0.5}

Each source is first prepared alone, with the tokens that its share needs. Then documents are drawn one by one, each
from the source that is furthest behind its share. The draw is deterministic. A source that ends starts again from its
beginning; the manifest counts the passes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data.prepare.hub import pin_datasets
from data.prepare.inputs import input_files
from data.prepare.job import (
    Job,
    disk_errors,
    locked,
    open_job,
    prepare,
    publish,
    read_manifest,
    tokens_in,
)
from data.prepare.journal import JOURNAL, Progress
from data.prepare.sources import fingerprint, plan
from data.shards import ShardWriter
from util.errors import UserError
from util.files import read_yaml
from util.values import parse_count

SLACK = 2**20  # tokens prepared beyond a source's share, so that its last document is complete


class Source(BaseModel):
    model_config = ConfigDict(extra="forbid")
    input: str | list[str]
    weight: float = Field(gt=0, le=1e12, allow_inf_nan=False)
    text_key: str = "text"
    fim_rate: float = Field(0.0, ge=0, le=1)
    fim_spm_rate: float = Field(0.0, ge=0, le=1)


class Mixture(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tokens: int = Field(ge=1, le=10**15)
    sources: dict[str, Source] = Field(min_length=1)

    @field_validator("tokens", mode="before")
    @classmethod
    def _read_count(cls, value: Any) -> Any:
        return parse_count(value) if isinstance(value, str) else value


def read_mixture(path: Path) -> Mixture:
    """Reads a mixture file and scales its weights to a sum of 1. An error names the file and the key or line."""
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError("must hold `tokens:` and `sources:`")
        mixture = Mixture(**content)
    except (OSError, ValueError, TypeError) as e:
        what = getattr(e, "strerror", None) or str(e)
        if isinstance(e, ValidationError):
            what = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
        raise UserError(f"--mixture={path}: {what}; data/prepare/mixture.py has an example") from e
    for name, source in mixture.sources.items():
        if not name or Path(name).name != name:
            raise UserError(f"--mixture={path}: {name!r} must be a name, not a path")
        if source.fim_spm_rate and not source.fim_rate:
            raise UserError(f"--mixture={path}: {name}: fim_spm_rate is a share of fim_rate, which is 0")
    total = sum(source.weight for source in mixture.sources.values())
    for source in mixture.sources.values():
        source.weight /= total
    return mixture


@dataclass
class Drawn:
    """Counts of the documents drawn from a source."""

    weight: float
    tokens: int = 0
    documents: int = 0
    passes: int = 0  # through the source, including the last, incomplete one


def mix(job: Job, mixture: Mixture) -> dict[str, Any] | None:
    """Prepares the sources and draws from them. Returns the manifest, or None if the output existed already.

    Files and settings of the sources become part of the recipe, because they decide the result.
    """
    files: dict[str, list[str]] = {}
    described: dict[str, dict[str, Any]] = {}
    fingerprints: dict[str, Any] = {}
    for name, source in mixture.sources.items():
        inputs = [source.input] if isinstance(source.input, str) else source.input
        files[name] = pin_datasets(input_files(inputs, job.options.format), job.output_dir)
        fingerprints |= {path: fingerprint(path) for path in files[name]}
        found = [fingerprints[path] for path in files[name]]
        described[name] = {**source.model_dump(exclude={"input"}), "source": found}
    settings = job.recipe
    job = replace(job, recipe={**job.recipe, "mixture": {"tokens": mixture.tokens, "sources": described}})
    folders = {name: job.output_dir / f"source_{name}" for name in mixture.sources}
    partial, made = open_job(job.output_dir, job.recipe), None
    if partial is not None:
        for name, source in mixture.sources.items():
            options = replace(job.options, **source.model_dump(exclude={"input", "weight"}, exclude_unset=True))
            limit = math.ceil(source.weight * mixture.tokens) + SLACK
            # Only what decides the documents of this source: the work stays valid if another source changes.
            decisive = {key: getattr(options, key) for key in ("text_key", "fim_rate", "fim_spm_rate")}
            recipe = {**settings, **decisive, "of": name, "source": described[name]["source"], "max_tokens": limit}
            part = replace(job, output_dir=folders[name], recipe=recipe, options=options, fingerprints=fingerprints)
            print(f"{name}: {source.weight:.1%} of {mixture.tokens:,} tokens")
            prepare(replace(part, max_tokens=limit, pieces=True), plan(files[name], options))
        with disk_errors(job.output_dir), locked(job.output_dir):
            made = _draw(job, partial, mixture, folders)
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)  # also after an earlier command that was interrupted here
    return made


def _draw(job: Job, partial: Path, mixture: Mixture, folders: dict[str, Path]) -> dict[str, Any]:
    from tqdm import tqdm

    tokenizer = job.tokenizer
    lengths = tokenizer.byte_lengths(tokenizer.vocab_size)
    (partial / JOURNAL).unlink(missing_ok=True)
    writer = ShardWriter(partial, job.layout(job.validation(mixture.tokens)), tokenizer.vocab_size)
    progress = Progress()
    drawn = [Drawn(source.weight) for source in mixture.sources.values()]
    streams = [_documents(folder, tokenizer.vocab_size, tokenizer.end_of_text) for folder in folders.values()]
    with tqdm(total=mixture.tokens, unit="tok", unit_scale=True, desc="mixing", disable=None) as bar:
        while progress.tokens < mixture.tokens:
            source = max(range(len(drawn)), key=lambda i: drawn[i].weight * progress.tokens - drawn[i].tokens)
            tokens = next(streams[source])[: mixture.tokens - progress.tokens]
            writer.add(tokens)
            progress.tokens += len(tokens)
            progress.documents += 1
            progress.text_bytes += int(lengths[tokens].sum())
            drawn[source].tokens += len(tokens)
            drawn[source].documents += 1
            bar.update(len(tokens))
    writer.close()
    sources = {}
    for name, row in zip(folders, drawn, strict=True):
        manifest = read_manifest(folders[name])
        assert manifest is not None
        progress.skipped.update(manifest["skipped"])
        sources[name] = asdict(replace(row, passes=-(-row.documents // manifest["documents"])))
    return publish(job, partial, progress, writer.files, {"sources": sources})


def _documents(folder: Path, vocab_size: int, end_of_text: int) -> Iterator[np.ndarray]:
    """Yields the documents of a prepared source, each with its end-of-text token, in an endless loop."""
    manifest = read_manifest(folder)
    assert manifest is not None
    if not manifest["tokens"]:
        raise UserError(f"{folder.name.removeprefix('source_')}: this source of the mixture contains no text")
    while True:
        rest = np.empty(0, np.uint32)
        for tokens in tokens_in([folder / row["name"] for row in manifest["files"]], vocab_size):
            tokens = np.concatenate((rest, tokens))
            starts = np.flatnonzero(tokens == end_of_text)
            yield from (tokens[a:b] for a, b in zip(starts, starts[1:], strict=False))
            rest = tokens[starts[-1] :]
        yield rest
