"""`python data/train_tokenizer.py FILE_OR_GLOB... --output DIR`: trains a byte-level BPE tokenizer on text.

Reads the files that data/text.py reads. Writes DIR/tokenizer.json and DIR/tokenizer_config.json, for --tokenizer=DIR
and for transformers' AutoTokenizer. Special tokens have the first ids. A twentieth of the text is held out; the bytes
per token on it are printed beside those of GPT-2's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from util.ctrl_c import exit_on_ctrl_c

    exit_on_ctrl_c()

from data.prepare.inputs import ReadOptions, add_reading_flags, input_files, read_options
from data.prepare.sources import describe_skipped, documents, plan
from data.tokenizers.hf_json import GPT4_PATTERN, TOKENIZER, TOKENIZER_CONFIG
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import END_OF_TEXT
from util.errors import CommandParser, UserError, refuse_broken_link, run_command
from util.files import write_atomically

if TYPE_CHECKING:
    import tokenizers

PIECE = 2**12  # characters; documents are split into pieces, so that a part of a long one can be held out
HOLD_OUT_EVERY, HELD_OUT_BYTES = 20, 2**24
SPECIAL_NAME = re.compile(r"<\|\w+\|>")  # the patterns split such a name, so merges cannot make it


def pieces(inputs: list[str], options: ReadOptions, max_bytes: int, skipped: Counter[str]) -> Iterator[str]:
    """Yields the text of all documents in pieces, up to `max_bytes` of UTF-8. Counts what `documents` skips."""
    used = 0
    for unit in plan(input_files(inputs, options.format), options):
        for document in documents(unit, options, skipped):
            for block in document.text:
                for start in range(0, len(block), PIECE):
                    piece = block[start : start + PIECE]
                    used += len(piece.encode())
                    if used > max_bytes:
                        return
                    yield piece


def train(texts: Iterator[str], vocab_size: int, special: list[str], pattern: str) -> tokenizers.Tokenizer:
    """Trains a tokenizer with `vocab_size` ids, or fewer if the text has no more pairs to merge."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if pattern == "gpt2":  # built into ByteLevel
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(GPT4_PATTERN), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def report(name: str, held_out: list[str]) -> None:
    """Prints the bytes per token on held-out text, and GPT-2's for comparison."""
    size = sum(len(text.encode()) for text in held_out)
    for other in (name, "gpt2") if held_out else ():
        try:
            tokenizer = load_tokenizer(other)
        except UserError as error:
            if other == name:
                raise
            print(f"no comparison with GPT-2's tokenizer: {error}")
            return
        tokens = sum(len(tokenizer.encode(text)) for text in held_out)
        print(f"{other}: {size / tokens:.3f} bytes per token on {size:,} held-out bytes")


def parse_special(names: str) -> list[str]:
    """Parses --special_tokens. The end-of-text token comes first."""
    special = list(dict.fromkeys([END_OF_TEXT, *(name for name in names.split(",") if name)]))
    for name in special:
        if not SPECIAL_NAME.fullmatch(name):
            raise UserError(f"--special_tokens: {name!r} must have the form <|name|>, which merges cannot produce")
    return special


def check_arguments(args: argparse.Namespace, special: list[str]) -> tuple[Path, Path]:
    """Checks the flags. Returns the paths of tokenizer.json and tokenizer_config.json, which must not exist."""
    if not 256 + len(special) <= args.vocab_size < 2**31:
        raise UserError(
            f"--vocab_size={args.vocab_size} must be at least {256 + len(special)}: 256 bytes and"
            f" {len(special)} special tokens"
        )
    if args.max_bytes < 1:
        raise UserError(f"--max_bytes={args.max_bytes} must be at least 1")
    output: Path = args.output
    refuse_broken_link(output, "output")
    file = output if output.suffix == ".json" else output / TOKENIZER
    paths = file, file.with_name(TOKENIZER_CONFIG)
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists already; choose another --output or remove it")
    return paths


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="FILE_OR_GLOB")
    parser.add_argument("--output", type=Path, required=True, help="a folder, or a file that ends in .json")
    parser.add_argument("--vocab_size", type=int, default=2**15, help="ids, including special tokens (default: 32768)")
    parser.add_argument(
        "--special_tokens", default="", help=f"in addition to {END_OF_TEXT}: <|fim_prefix|>,<|fim_middle|>,..."
    )
    parser.add_argument("--pattern", choices=["gpt4", "gpt2"], default="gpt4", help="how text is split before merging")
    add_reading_flags(parser)
    parser.add_argument("--max_bytes", type=int, default=10**9, help="text to use (default: 1,000,000,000)")
    args = parser.parse_args()
    special = parse_special(args.special_tokens)
    file, config = check_arguments(args, special)

    held_out: list[str] = []
    used = held = 0
    options, skipped = read_options(args), Counter[str]()

    def training_text() -> Iterator[str]:
        nonlocal used, held
        for number, piece in enumerate(pieces(args.inputs, options, args.max_bytes, skipped), 1):
            size = len(piece.encode())
            if number % HOLD_OUT_EVERY == 0 and held < HELD_OUT_BYTES:
                held_out.append(piece)
                held += size
            else:
                used += size
                yield piece

    trained = train(training_text(), args.vocab_size, special, args.pattern)
    if not used:
        raise UserError(f"the input contains no text within --max_bytes={args.max_bytes}")
    if trained.get_vocab_size() < args.vocab_size:
        raise UserError(
            f"{used:,} bytes of text give only {trained.get_vocab_size()} tokens, not --vocab_size={args.vocab_size};"
            f" give more text or lower --vocab_size"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(config, (json.dumps(settings, indent=1) + "\n").encode())
    write_atomically(file, trained.to_str(pretty=True).encode())
    notes = describe_skipped(skipped, options.document_separator)
    print(f"{file}: {args.vocab_size:,} tokens from {used:,} bytes{notes}")
    report(str(file), held_out)


if __name__ == "__main__":
    run_command(main)
