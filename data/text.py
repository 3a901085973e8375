"""`python data/text.py FILE_OR_GLOB... --output_dir DIR`: shards from .txt, .jsonl and .parquet files.

A .txt file is one document, a line of .jsonl and a row of .parquet one each (their field --text_key).
The first tokens become DIR/NAME_val_000000.bin, the rest DIR/NAME_train_%06d.bin.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cfg.errors import CommandParser, UserError, run_command
from cfg.files import file_sha256
from data import prepare
from data.tokenizer import load_tokenizer

SUFFIXES = (".txt", ".jsonl", ".parquet")


def input_files(patterns: list[str]) -> list[Path]:
    """Files that the patterns name, in the order given, each once. Raises UserError for one that matches nothing."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        found = sorted(Path(p) for p in matches if Path(p).is_file())
        if not found:
            raise UserError(f"{pattern}: no such file")
        paths |= dict.fromkeys(found)
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: only {', '.join(SUFFIXES)} files are read")
    return list(paths)


def documents(path: Path, text_key: str) -> Iterator[str]:
    """The documents of one file. Raises UserError naming the file and the line or column that is wrong."""
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield _field(path, number, line, text_key)
        else:
            yield from _parquet_column(path, text_key)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from e
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from e


def _field(path: Path, number: int, line: str, text_key: str) -> str:
    try:
        text = json.loads(line)[text_key]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: line {number} is not a JSON object with a field {text_key!r}; see --text_key") from e
    if not isinstance(text, str):
        raise UserError(f"{path}: line {number}: field {text_key!r} is not text")
    return text


def _parquet_column(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException, types

    try:
        file = pq.ParquetFile(path)
        if text_key not in file.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_key!r}; it has {', '.join(file.schema_arrow.names)}; see --text_key"
            )
        kind = file.schema_arrow.field(text_key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise UserError(f"{path}: column {text_key!r} holds {kind}, not text; see --text_key")
        for rows in file.iter_batches(batch_size=prepare.DOCUMENTS_AT_ONCE, columns=[text_key]):
            yield from (text for text in rows.column(0).to_pylist() if text is not None)
    except ArrowException as e:
        raise UserError(f"{path}: not a readable parquet file ({e})") from e


def write_shards(args: argparse.Namespace, files: list[Path], partial: Path) -> tuple[list[prepare.ShardWriter], int]:
    """Tokenizes all documents into a validation shard and training shards; returns their writers and the count.

    Validation gets the first `val_tokens` tokens, but never more than a tenth of the whole, so the
    first ten times that many are held back until it is known how many there are.
    """
    import numpy as np
    from tqdm import tqdm

    tokenizer = load_tokenizer()
    val = prepare.ShardWriter(partial, f"{args.name}_val", tokenizer.n_vocab, max(args.val_tokens, 1))
    train = prepare.ShardWriter(partial, f"{args.name}_train", tokenizer.n_vocab, args.shard_size, first=1)
    held: list[np.ndarray] | None = []
    held_tokens = count = 0

    def release(pieces: list[np.ndarray]) -> None:
        tokens = np.concatenate(pieces)
        cut = min(args.val_tokens, len(tokens) // 10)
        val.add(tokens[:cut])
        val.close()
        train.add(tokens[cut:])

    stream = (text for path in files for text in documents(path, args.text_key) if text)
    with tqdm(unit="tok", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for tokens in prepare.encode_documents(stream, tokenizer):
            count += 1
            bar.update(len(tokens))
            if held is None:
                train.add(tokens)
                continue
            held.append(tokens)
            held_tokens += len(tokens)
            if held_tokens >= 10 * args.val_tokens:
                release(held)
                held = None
    if held:
        release(held)
    if not count:
        raise UserError("the input holds no text")
    return [val, train], count


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="FILE_OR_GLOB")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--name", default="", help="first part of the shards' names (default: that of the folder)")
    parser.add_argument("--text_key", default="text", help="jsonl field or parquet column (default: text)")
    parser.add_argument("--shard_size", type=int, default=10**8, help="tokens per shard (default: 100,000,000)")
    parser.add_argument(
        "--val_tokens", type=int, default=10**7, help="validation tokens, at most a tenth of all (default: 10,000,000)"
    )
    args = parser.parse_args()
    if not 1 <= args.shard_size < 2**31 or not 0 <= args.val_tokens < 2**31:
        raise UserError(
            "--shard_size must be from 1 and --val_tokens from 0 to 2,147,483,647, which a header can count"
        )
    args.name = args.name or args.output_dir.resolve().name
    if Path(args.name).name != args.name:
        raise UserError(f"--name={args.name} must be a name, not a path")

    files = input_files(args.inputs)
    recipe = {
        "source": [{"name": p.name, "sha256": file_sha256(p)} for p in files],
        "tokenizer": "gpt2",
        **{key: getattr(args, key) for key in ("name", "text_key", "shard_size", "val_tokens")},
    }
    partial = prepare.begin(args.output_dir, recipe)
    if partial is None:
        print(f"{args.output_dir}: already there")
        return
    writers, count = write_shards(args, files, partial)
    facts = {"recipe": recipe, "tokenizer": "gpt2", "vocab_size": writers[0].vocab_size, "documents": count}
    prepare.finish(args.output_dir, writers, facts)
    val, train = writers
    print(f"{args.output_dir}: {count:,} documents, {train.tokens:,} training and {val.tokens:,} validation tokens")


if __name__ == "__main__":
    run_command(main)
