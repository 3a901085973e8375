"""Parts: a data set prepared by many commands, for example one per node, then joined into one set of shards."""

from __future__ import annotations

import re
import shutil
from bisect import bisect_left
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.job import Job, disk_errors, locked, open_job, publish, read_manifest, tokens_in
from data.prepare.journal import JOURNAL, Progress, same_pieces
from data.prepare.sources import WorkUnit
from data.prepare.workers import text_bytes
from data.shards import ShardWriter
from util.errors import UserError
from util.files import file_sha256


def parse_part(text: str) -> tuple[int, int]:
    """Parses `3/16` as (3, 16)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part={text} must be K/N with K from 1 to N, such as 3/16")
    return int(match[1]), int(match[2])


def part_of(job: Job, units: list[WorkUnit], k: int, n: int) -> tuple[Job, list[WorkUnit]]:
    """Returns the job and the units of part k of n: contiguous units with about an n-th of the text, or none."""
    ends = list(accumulate(unit.size for unit in units))
    total = ends[-1] if ends else 0
    cuts = [bisect_left(ends, i * total / n) for i in range(n)] + [len(units)]
    part = replace(
        job, output_dir=part_dir(job.output_dir, k, n), recipe={**job.recipe, "part": f"{k}/{n}"}, pieces=True
    )
    return part, units[cuts[k - 1] : cuts[k]]


def part_dir(output_dir: Path, k: int, n: int) -> Path:
    return output_dir / f"part_{k:0{len(str(n))}d}_of_{n}"


def find_parts(job: Job) -> list[tuple[Path, dict[str, Any]]]:
    """Returns folder and manifest of each part, in order."""
    names = [re.fullmatch(r"part_\d+_of_(\d+)", path.name) for path in job.output_dir.glob("part_*_of_*")]
    counts = {int(match[1]) for match in names if match}
    if not counts:
        raise UserError(f"--join: {job.output_dir} does not contain parts; prepare them with --part=1/N to --part=N/N")
    if len(counts) > 1:
        raise UserError(f"--join: {job.output_dir} holds parts of {' and of '.join(map(str, sorted(counts)))}")
    (n,) = counts
    parts = []
    for k in range(1, n + 1):
        folder = part_dir(job.output_dir, k, n)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"--join: part {k}/{n} is not finished; run its command with --part={k}/{n}")
        if not same_pieces(manifest, {**job.recipe, "part": f"{k}/{n}"}):
            raise UserError(
                f"--join: {folder} was made from other input or options; prepare it again with the options of --join"
            )
        parts.append((folder, manifest))
    return parts


def checked_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """Returns the paths of a manifest's shards after verifying their hashes."""
    paths = []
    for row in manifest["files"]:
        path = folder / row["name"]
        if not path.is_file():
            raise UserError(f"{path} is missing; its manifest lists it")
        if file_sha256(path) != row["sha256"]:
            raise UserError(f"{path} is not the file that its manifest describes; make it again")
        paths.append(path)
    return paths


def join_parts(job: Job) -> dict[str, Any] | None:
    """Joins all parts into one data set and removes them. Returns its manifest, or None if it existed already."""
    partial = open_job(job.output_dir, job.recipe)
    made = None if partial is None else _join(job, partial)
    for folder in job.output_dir.glob("part_*_of_*"):  # also after an earlier --join that was interrupted here
        manifest = read_manifest(folder)
        if manifest and same_pieces(manifest, {**job.recipe, "part": manifest["recipe"].get("part")}):
            shutil.rmtree(folder)
    return made


def _join(job: Job, partial: Path) -> dict[str, Any]:
    parts = find_parts(job)
    tokenizer = job.tokenizer
    whole = sum(manifest["tokens"] for _, manifest in parts)
    total = min(whole, job.max_tokens or whole)
    progress = Progress()
    with disk_errors(job.output_dir), locked(job.output_dir):
        if not total:
            raise UserError("--join: the parts contain no text")
        (partial / JOURNAL).unlink(missing_ok=True)
        writer = ShardWriter(partial, job.layout(job.validation(total)), tokenizer.vocab_size)
        for folder, manifest in parts:
            left = total - progress.tokens
            if not left:
                break
            progress.skipped.update(manifest["skipped"])
            complete = manifest["tokens"] <= left
            if complete:
                progress.documents += manifest["documents"]
                progress.text_bytes += manifest["text_bytes"]
            for tokens in tokens_in(checked_files(folder, manifest), tokenizer.vocab_size):
                tokens = tokens[: total - progress.tokens]
                writer.add(tokens)
                progress.tokens += len(tokens)
                if not complete:
                    progress.documents += int(np.count_nonzero(tokens == tokenizer.end_of_text))
                    progress.text_bytes += text_bytes(tokens, tokenizer)
        writer.close()
        return publish(job, partial, progress, writer.files)
