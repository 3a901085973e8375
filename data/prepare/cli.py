"""Flags and main function shared by the commands that prepare data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.fingerprint import same_tokenizer
from data.prepare.hub import pin_datasets
from data.prepare.inputs import add_reading_flags, read_options
from data.prepare.job import Job, prepare, read_manifest, summary, tokenizer_recipe
from data.prepare.parts import checked_files, join_parts, parse_part, part_of
from data.prepare.sources import fingerprint, plan
from data.prepare.workers import EncodeOptions
from data.shards import open_shard
from data.tokenizers.load import load_tokenizer
from util.errors import UserError
from util.files import find_paths


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--shard_size", type=int, default=10**8, help="tokens per shard (default: 100,000,000)")
    output.add_argument("--max_tokens", type=int, default=0, help="stop after this many tokens; 0: no limit")
    output.add_argument("--tokenizer", default="gpt2", help="name, or path of a tokenizer.json (default: gpt2)")
    output.add_argument(
        "--fim_rate", type=float, default=0.0, help="share of documents rearranged for fill-in-the-middle"
    )
    output.add_argument("--fim_spm_rate", type=float, default=0.0, help="share of these in suffix-prefix-middle order")
    add_reading_flags(parser.add_argument_group("input"))
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=cores(), help="processes (default: one per core)")
    work.add_argument(
        "--encoder", default="auto", choices=["auto", "tiktoken"], help="auto: splintr if it agrees with tiktoken"
    )
    work.add_argument("--part", default="", metavar="K/N", help="prepare only part K of N, K from 1 to N")
    work.add_argument("--join", action="store_true", help="join all parts into one data set")
    work.add_argument("--check", action="store_true", help="verify the shards in --output_dir")


def check_flags(args: argparse.Namespace) -> None:
    """Checks ranges of flags and combinations of flags."""
    if not 1 <= args.shard_size < 2**31:
        raise UserError(
            f"--shard_size={args.shard_size} must be from 1 to 2,147,483,647, the limit of a shard's header"
        )
    for flag, least in (("max_tokens", 0), ("workers", 1)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag}={getattr(args, flag)} must be at least {least}")
    for flag in ("fim_rate", "fim_spm_rate"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"--{flag}={getattr(args, flag)} must be from 0 to 1")
    if args.fim_spm_rate and not args.fim_rate:
        raise UserError("--fim_spm_rate is a share of --fim_rate, which is 0")
    if args.part and args.join:
        raise UserError("--part prepares a part and --join joins all parts; give one of the two")


def run(args: argparse.Namespace, name: str, files: list[str], recipe: dict[str, Any], **job: Any) -> None:
    """Prepares a data set or a part of it, or joins all parts, and prints a summary."""
    tokenizer = load_tokenizer(args.tokenizer)  # first, so that a mistake in --tokenizer is reported at once
    if getattr(args, "mixture", ""):
        from data.prepare.mixture import mix, read_mixture  # imports pydantic, which the workers do not need

        mixture = read_mixture(Path(args.mixture))
    else:
        mixture = None
    reading = read_options(args)
    options = EncodeOptions(
        **vars(reading), fim_rate=args.fim_rate, fim_spm_rate=args.fim_spm_rate, fast=args.encoder == "auto"
    )
    files = pin_datasets(files, args.output_dir)
    fingerprints = {path: fingerprint(path) for path in files}
    # Defaults are left out, as in the manifests of versions without these flags.
    added = {key: getattr(reading, key) for key in ("format", "document_separator") if getattr(reading, key)}
    decisive = ("text_key", "skip_bad", "fim_rate", "fim_spm_rate", "shard_size", "max_tokens")
    whole = Job(
        output_dir=args.output_dir,
        name=name,
        recipe={
            "source": list(fingerprints.values()),
            **tokenizer_recipe(tokenizer),
            "name": name,
            **{key: getattr(args, key) for key in decisive},
            **added,
            **recipe,
        },
        tokenizer=tokenizer,
        options=options,
        shard_size=args.shard_size,
        max_tokens=args.max_tokens,
        workers=args.workers,
        fingerprints=fingerprints,
        **job,
    )
    if mixture and (args.part or args.join or args.max_tokens):
        raise UserError(
            "--mixture is prepared by one command, and its file gives the number of tokens;"
            " remove --part, --join, --max_tokens"
        )
    if mixture:
        made = mix(whole, mixture)
    elif args.join:
        made = join_parts(whole)
    elif args.part and (existing := read_manifest(whole.output_dir)) and existing["recipe"] == whole.recipe:
        made = None  # the parts have been joined already
    else:
        units = plan(files, options)
        if args.part:
            whole, units = part_of(whole, units, *parse_part(args.part))
        made = prepare(whole, units)
    print(summary(whole.output_dir, made) if made else f"{whole.output_dir}: already there")


def check(output_dir: Path, tokenizer_name: str) -> None:
    """Reads all shards of a folder, verifies hashes and ids, and prints their statistics."""
    from tqdm import tqdm

    manifest = read_manifest(output_dir)
    if manifest is None:
        print(f"{output_dir}: no manifest, hashes are not verified")
        paths = [Path(path) for path in find_paths(str(output_dir / "*.bin"))]
        if not paths:
            raise UserError(f"--output_dir={output_dir}: no shards to check; give the folder of shards")
    else:
        paths = checked_files(output_dir, manifest)
    tokenizer = load_tokenizer(tokenizer_name)
    if manifest and not same_tokenizer(manifest["tokenizer"], tokenizer.fingerprint):
        raise UserError(
            f"{output_dir} was made with tokenizer {manifest['tokenizer']['name']}, not {tokenizer.name};"
            f" give it as --tokenizer"
        )
    lengths = tokenizer.byte_lengths(tokenizer.vocab_size)
    tokens = documents = size = 0
    for path in tqdm(paths, unit="shard", disable=None):
        shard = open_shard(path, tokenizer.vocab_size, check_all=True)
        for start in range(0, shard.count, 2**22):
            ids = shard.read(start, min(2**22, shard.count - start))
            documents += int(np.count_nonzero(ids == tokenizer.end_of_text))
            size += int(lengths[ids].sum())
        tokens += shard.count
    if manifest and (manifest["tokens"], manifest["documents"]) != (tokens, documents):
        raise UserError(
            f"{output_dir} contains {tokens:,} tokens and {documents:,} documents, but its manifest says"
            f" {manifest['tokens']:,} and {manifest['documents']:,}; make it again"
        )
    print(
        f"{output_dir}: {len(paths):,} shards, all ids below {tokenizer.vocab_size:,}"
        f"{', hashes as in the manifest' if manifest else ''}\n{documents:,} documents, {tokens:,} tokens,"
        f" {tokens / max(1, documents):,.1f} tokens a document, {size / max(1, tokens):.2f} bytes a token"
    )
