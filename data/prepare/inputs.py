"""The input of a command that reads text: which files, of which kind, and how they are read.

A file is .txt or .md (text), .jsonl, .ndjson or .json (JSON lines, or one JSON list), or .parquet. All but .parquet may
be compressed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from util.errors import UserError, quote, user_errors
from util.files import find_paths

KINDS = {
    **dict.fromkeys((".txt", ".md"), "txt"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
NO_TEXT = (  # files that rawgpt and the Hugging Face hub put beside data; they are skipped in folders
    *("README.md", "manifest.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("dataset_info.json", "dataset_infos.json", "metrics.jsonl", "status.json"),
)
HASH_BLOCK, HASH_BLOCKS = 2**16, 64  # bytes, and how many blocks of a file are hashed

REMOTE = re.compile(r"(hf|https?|s3|gs)://(?!.*\.\.)[\x21-\x7e]+")


@dataclass(frozen=True)
class ReadOptions:
    """The flags that decide which documents a file contains."""

    text_key: str = "text"
    skip_bad: bool = False
    format: str = ""  # a value of KINDS; "": by the file's name
    document_separator: str = ""  # "": <|endoftext|> where it stands between documents; "none": none


class Damaged(UserError):
    """Text that is damaged, which --skip_bad skips. The message ends before the advice."""

    def __str__(self) -> str:
        return f"{super().__str__()}; repair it, or skip damaged text with --skip_bad"


def add_reading_flags(parser: Any) -> None:
    """Adds the flags of ReadOptions to a parser or a group of flags."""
    parser.add_argument(
        "--text_key", default="text", help="JSON field or parquet column; a.b: field b of a (default: text)"
    )
    parser.add_argument(
        "--format", choices=sorted(set(KINDS.values())), help="the kind of all files, whatever their names say"
    )
    parser.add_argument(
        "--document_separator",
        metavar="TEXT",
        help="what divides a .txt or .md file into documents; \\n: a line break; none: a file is one document"
        " (default: <|endoftext|>, except within a sentence)",
    )
    parser.add_argument("--skip_bad", action="store_true", help="skip damaged text, and count it")


def read_options(args: argparse.Namespace) -> ReadOptions:
    """Returns the options that the flags of `add_reading_flags` give."""
    if args.document_separator == "":
        raise UserError("--document_separator: is empty; give a text, or none")
    separator = (args.document_separator or "").replace("\\n", "\n").replace("\\t", "\t")
    return ReadOptions(args.text_key, args.skip_bad, args.format or "", separator)


def is_remote(path: str) -> bool:
    """Returns whether reading the input needs the network. A data set is local if its address begins with a path."""
    return "://" in path or (is_dataset(path) and path[3:4] not in ("/", ".", "~"))


def is_dataset(path: str) -> bool:
    """Returns whether the input is a data set of the hub, hf:OWNER/NAME (data/prepare/hub.py)."""
    return path.startswith("hf:") and not path.startswith("hf://")


def kind_of(path: str, format: str = "") -> str:
    """Returns a value of KINDS: `format`, or else what the file's name says, or "" if it says nothing."""
    stem, suffix = os.path.splitext(path.lower())
    return format or KINDS.get(os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix, "")


def input_files(patterns: list[str], format: str = "") -> list[str]:
    """Expands paths, globs and folders to files of text, in the order given, each file once. Keeps remote addresses."""
    paths = find_files(patterns, format)
    for path in paths:
        if not is_remote(path) and not is_dataset(path) and not kind_of(path, format):
            compressed = ", ".join(COMPRESSED)
            raise UserError(
                f"{path}: only {', '.join(KINDS)} files are read, also as {compressed}; say what it is with"
                f" --format={'|'.join(sorted(set(KINDS.values())))}"
            )
    return paths


def find_files(patterns: list[str], format: str = "") -> list[str]:
    """Expands paths, globs and folders to files. Of a folder it takes the files of text, or with `format` all files.

    Links are followed. A file that several paths name is returned once. Hidden files and folders are skipped, and so
    are the files of a folder that are in NO_TEXT, unless a pattern names them. Each kind is counted in a line.
    """
    found: dict[str, str] = {}  # the real path: the first path that names the file
    skipped: list[str] = []
    for pattern in patterns:
        if is_dataset(pattern):
            found[pattern] = pattern
        elif is_remote(pattern):
            if not REMOTE.fullmatch(pattern) or not pattern.endswith(".parquet"):
                what = "only remote .parquet files are read, from hf://, https://, http://, s3:// or gs://"
                raise UserError(f"{quote(pattern)}: {what}; download other files first")
            found[pattern] = pattern
        else:
            for path in _local_files(pattern, format, skipped):
                found.setdefault(os.path.realpath(path), path)
    if os.environ.get("RANK", "0") == "0":
        names = list(dict.fromkeys(path for path in map(os.path.normpath, skipped) if path not in found.values()))
        _print_skipped("hidden files or folders", [name for name in names if os.path.basename(name).startswith(".")])
        _print_skipped("files that describe data", [name for name in names if os.path.basename(name) in NO_TEXT])
    return list(found.values())


def _print_skipped(what: str, names: list[str]) -> None:
    if names:
        print(f"{what} skipped, {len(names)}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")


def _local_files(pattern: str, format: str, skipped: list[str]) -> list[str]:
    """Returns the files that one pattern names. Adds the skipped ones to `skipped`."""
    named = find_paths(pattern)
    for folder in {os.path.dirname(path) for path in named}:
        _refuse_loop(folder)
    found = []
    for path in named:
        if os.path.isdir(path):
            found += _files_below(path, format, skipped)
        elif os.path.isfile(path):
            found.append(str(Path(path)))
        else:
            _refuse_broken_link(path)
            raise UserError(f"{path}: not a regular file; copy it to one")
    head, tail = os.path.split(pattern)
    if tail[:1] in ("*", "?", "[") and not os.path.lexists(pattern):
        skipped += [path for path in find_paths(os.path.join(head, "." + tail)) if _is_text(path, format)]
    if not found:
        is_folder = any(os.path.isdir(path) for path in named)
        raise UserError(f"{pattern}: {'no text in this folder' if is_folder else 'no such file'}")
    return found


def _is_text(path: str, format: str) -> bool:
    return os.path.isdir(path) or bool(kind_of(path, format))


def _files_below(folder: str, format: str, skipped: list[str]) -> list[str]:
    """Returns the files of text below a folder, sorted. Adds the skipped ones to `skipped`."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    found = []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        _refuse_loop(root)
        paths = [os.path.join(root, name) for name in (*folders, *names)]
        skipped += [path for path in paths if os.path.basename(path).startswith(".") and _is_text(path, format)]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(root, name)
            if name in NO_TEXT and not format:
                skipped.append(path)
            elif not name.startswith(".") and kind_of(path, format):
                _refuse_broken_link(path)
                found += [path] if os.path.isfile(path) else []
    return [str(path) for path in sorted(map(Path, found))]


def _refuse_broken_link(path: str) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path}: a link to a file that does not exist ({os.readlink(path)}); remove it, or restore it")


def _refuse_loop(folder: str) -> None:
    """Refuses a path that leads through a link back to a folder that it has passed before."""
    above: set[str] = set()
    for place in [*reversed(Path(folder).parents), Path(folder)]:
        real = os.path.realpath(place)
        if real in above and os.path.islink(place):
            raise UserError(f"{place}: a link to {real}, which contains it, so the search would not end; remove it")
        above.add(real)


def file_fingerprint(path: str) -> dict[str, Any]:
    """Returns name, size and hash of a file. A remote file is identified by its address, which names a revision.

    Files above 4 MiB are hashed by sample, so that a repeated command returns quickly.
    """
    if is_remote(path):
        return {"name": path}
    digest = hashlib.sha256()
    with user_errors(path), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        for at in [*range(0, size, max(HASH_BLOCK, size // HASH_BLOCKS)), max(0, size - HASH_BLOCK)]:
            f.seek(at)  # the last block holds the metadata of a parquet file
            digest.update(f.read(HASH_BLOCK))
    return {"name": Path(path).name, "size": size, "hash": digest.hexdigest()}
