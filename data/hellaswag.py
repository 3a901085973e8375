"""`python data/hellaswag.py`: HellaSwag's validation set (Zellers et al. 2019), as text and as GPT-2 tokens.

Writes data/hellaswag/hellaswag_val.jsonl, the official file, and hellaswag_val.bin, the examples in llm.c's format:
a header of 256 little-endian int32 ([0] magic 20240522, [1] version 1, [2] number of examples, [3] bytes of the longest
example), then the examples in uint16. An example is 65535, its size in bytes, its index, its label, the number of
endings, and for the context and each ending a count and the tokens. An ending is encoded with a space before it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from util.ctrl_c import exit_on_ctrl_c

    exit_on_ctrl_c()

import numpy as np

from data import assets
from data.tokenizers.load import load_tokenizer
from util.errors import CommandParser, UserError, quote, refuse_broken_link, run_command, user_errors
from util.files import write_atomically
from util.values import user_path

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "hellaswag"
OFFICIAL = "hellaswag_val.jsonl"
FIELDS, PARTS = ("ctx", "endings", "label"), ("activity_label", "ctx_a", "ctx_b")
ENDINGS = 4
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
MAGIC, VERSION = 20240522, 1
START_OF_EXAMPLE = 2**16 - 1  # not a valid token id in this format
EXAMPLE_HEAD = 5  # start, bytes, index, label, number of endings


@dataclass(frozen=True)
class Example:
    """A context and its possible endings. `label` is the index of the correct one."""

    context: str
    endings: list[str]
    label: int
    parts: tuple[str, str, str] | None = None  # activity label and both sentences of the context, with `with_parts`


@dataclass(frozen=True)
class TokenExample:
    """An example in tokens. The first token of an ending includes a leading space."""

    context: list[int]
    endings: list[list[int]]
    label: int


def read_hellaswag(path: Path, with_parts: bool = False) -> Iterator[Example]:
    """Reads the examples of a .jsonl file with the fields `ctx`, `endings` and `label` of the official file.

    With `with_parts` it also reads `activity_label`, `ctx_a` and `ctx_b`, from which lm-evaluation-harness makes its
    context. An error names the file and the line.
    """
    with user_errors(path):
        lines = path.read_bytes().splitlines()
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: contains no examples")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _example(line, PARTS if with_parts else ())
            except ValueError as e:
                raise UserError(f"{path}, line {number}: {e}") from e


def _example(line: bytes, parts: tuple[str, ...]) -> Example:
    """Parses a line. Raises ValueError with what is wrong."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError("not JSON") from e
    if not isinstance(row, dict):
        raise ValueError("not an object {...}")
    if missing := [field for field in (*FIELDS, *parts) if field not in row]:
        raise ValueError(f"no field {missing[0]!r}; an example has {', '.join((*FIELDS, *parts))}")
    context, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        raise ValueError(f"endings must be a list of {ENDINGS}")
    for text in (context, *endings):
        if not isinstance(text, str) or not text.strip():
            raise ValueError("ctx and endings must be texts that are not empty")
        text.encode()  # fails for half a surrogate pair; UnicodeEncodeError is a ValueError
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise ValueError(f"label {quote(label)!r} is not a number from 0 to {ENDINGS - 1}")
    texts = [row[part] for part in parts]
    for part, text in zip(parts, texts, strict=True):  # the second sentence may be empty
        if not isinstance(text, str):
            raise ValueError(f"{part} is not text")
        text.encode()
    return Example(context, endings, label, (texts[0], texts[1], texts[2]) if parts else None)


def encode_example(example: Example, encode: Callable[[str], list[int]]) -> TokenExample:
    """Encodes an example."""
    return TokenExample(encode(example.context), [encode(" " + e) for e in example.endings], example.label)


def write_eval_file(path: Path, examples: list[TokenExample]) -> None:
    """Writes llm.c's evaluation file atomically. Numbers that do not fit into uint16 are an error."""
    if not 0 < len(examples) < 2**16:
        raise UserError(f"{path}: {len(examples)} examples; the format allows 1 to {2**16 - 1}")
    streams = [_stream(path, index, example) for index, example in enumerate(examples)]
    header = np.zeros(HEADER_INTS, "<i4")
    header[:4] = MAGIC, VERSION, len(streams), 2 * max(map(len, streams))
    write_atomically(path, header.tobytes() + np.array(list(chain(*streams)), "<u2").tobytes())


def _stream(path: Path, index: int, example: TokenExample) -> list[int]:
    stream = [START_OF_EXAMPLE, 0, index, example.label, len(example.endings)]
    for tokens in (example.context, *example.endings):
        stream += [len(tokens), *tokens]
    size = 2 * len(stream)
    if size >= 2**16:
        raise UserError(
            f"{path}: example {index} takes {size} bytes, but the format allows less than {2**16}; remove it"
        )
    if not 0 <= example.label < len(example.endings):
        raise ValueError(f"example {index}: label {example.label} is not the index of an ending")
    if any(not 0 <= token < START_OF_EXAMPLE for tokens in (example.context, *example.endings) for token in tokens):
        raise UserError(f"{path}: example {index} has a token id outside of uint16; the format is for GPT-2's tokens")
    stream[1] = size
    return stream


def read_eval_file(path: Path) -> list[TokenExample]:
    """Reads and checks llm.c's evaluation file."""
    with user_errors(path):
        content = path.read_bytes()
    if len(content) < HEADER_BYTES:
        raise UserError(f"{path}: {len(content)} bytes are less than a header of {HEADER_BYTES}; make it again")
    magic, version, count, longest = np.frombuffer(content, "<i4", 4).tolist()
    if magic != MAGIC:
        raise UserError(f"{path}: magic {magic} is not the magic of an evaluation file ({MAGIC})")
    if version != VERSION:
        raise UserError(f"{path}: version {version} is not supported, only {VERSION}")
    if len(content) % 2:
        raise UserError(f"{path}: odd number of bytes ({len(content)}), but the format is uint16; truncated?")
    stream = np.frombuffer(content, "<u2", offset=HEADER_BYTES).tolist()
    examples, at, largest = [], 0, 0
    for index in range(count):
        size = stream[at + 1] // 2 if at + 1 < len(stream) else 0
        if at + max(size, EXAMPLE_HEAD) > len(stream):
            raise UserError(f"{path}: truncated: ends within example {index} of {count}; make it again")
        example = _parse(stream[at : at + size], index)
        if example is None:
            raise UserError(f"{path}: example {index} is damaged, at byte {HEADER_BYTES + 2 * at}; make it again")
        examples.append(example)
        at, largest = at + size, max(largest, 2 * size)
    if at != len(stream):
        raise UserError(f"{path}: too long: {2 * (len(stream) - at)} bytes after the last of {count} examples")
    if not examples or largest != longest:
        raise UserError(
            f"{path}: the header says {count} examples of up to {longest} bytes, but the largest has {largest};"
            f" make it again"
        )
    return examples


def _parse(stream: list[int], index: int) -> TokenExample | None:
    """Parses the tokens of example `index`. Returns None if they are damaged."""
    if len(stream) < EXAMPLE_HEAD:
        return None
    start, size, its_index, label, completions = stream[:EXAMPLE_HEAD]
    parts, at = [], EXAMPLE_HEAD
    while at < len(stream):
        parts.append(stream[at + 1 : at + 1 + stream[at]])
        at += 1 + stream[at]
    whole = at == len(stream) and len(parts) == 1 + completions and size == 2 * len(stream)
    if (start, its_index) != (START_OF_EXAMPLE, index) or not whole or label >= completions:
        return None
    return TokenExample(parts[0], parts[1:], label)


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--input", default="", help=f"a copy of {OFFICIAL} if it cannot be downloaded, or your own .jsonl"
    )
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()

    refuse_broken_link(args.output_dir, "output_dir")
    source = find_source(args.input, args.output_dir)
    if source.name != OFFICIAL:
        print(f"{source}: not verified; results are comparable with HellaSwag's only if it is {OFFICIAL}")
    jsonl = args.output_dir / f"{source.stem}.jsonl"
    binary = jsonl.with_suffix(".bin")
    examples = list(read_hellaswag(source))
    content = source.read_bytes()
    if jsonl.exists() and jsonl.read_bytes() != content:
        raise UserError(f"{jsonl} exists and differs from {source}; choose another --output_dir or remove it")
    if jsonl.exists() and binary.exists():
        if len(read_eval_file(binary)) != len(examples):
            raise UserError(f"{binary} was not made from {jsonl}; remove it")
        print(f"{args.output_dir}: already there")
        return
    encode = load_tokenizer().encode
    with user_errors(f"--output_dir={args.output_dir}"):
        write_eval_file(binary, [encode_example(example, encode) for example in examples])
        write_atomically(jsonl, content)  # last, so that the .bin exists if the .jsonl does
    print(f"{args.output_dir}: {len(examples):,} examples in {jsonl.name} and {binary.name}")


def find_source(given: str, output_dir: Path, flag: str = "input") -> Path:
    """Returns the file to read, which may be `given` with --`flag`.

    A file with the official name must be the official file. A file with another name is the user's own.
    """
    written = output_dir / OFFICIAL
    if given and Path(given).name != OFFICIAL:
        if not (path := user_path(given)).is_file():
            raise UserError(f"--{flag}={given}: no such file")
        return path
    if not given and written.is_file() and assets.ASSETS[OFFICIAL].matches(written.read_bytes()):
        return written
    return assets.fetch(OFFICIAL, given, flag)


if __name__ == "__main__":
    run_command(main)
