"""`python data/tiny_shakespeare.py`: tinyshakespeare as tokens, 90 % for training and 10 % for validation.

Writes data/tinyshakespeare/tiny_shakespeare_{train,val}.bin. The split is by characters, as in nanoGPT. Each half is
one document.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from util.ctrl_c import exit_on_ctrl_c

    exit_on_ctrl_c()

import numpy as np

from data import assets
from data.prepare.job import Job, disk_errors, locked, open_job, publish, tokenizer_recipe
from data.prepare.journal import Progress
from data.prepare.workers import EncodeOptions
from data.shards import ShardWriter
from data.tokenizers.load import load_tokenizer
from util.errors import CommandParser, run_command

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "tinyshakespeare"


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", default="", help="a copy of tinyshakespeare.txt if it cannot be downloaded")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--tokenizer", default="gpt2", help="name, or path of a tokenizer.json (default: gpt2)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    recipe = {"source": assets.ASSETS["tinyshakespeare.txt"].sha256, **tokenizer_recipe(tokenizer)}
    job = Job(args.output_dir, "tiny_shakespeare", recipe, tokenizer, EncodeOptions())
    partial = open_job(args.output_dir, recipe)
    if partial is None:
        print(f"{args.output_dir}: already there")
        return
    text = assets.fetch("tinyshakespeare.txt", args.input).read_text()
    cut = int(0.9 * len(text))
    halves = [np.array([*tokenizer.document_prefix, *tokenizer.encode(half)]) for half in (text[:cut], text[cut:])]
    names = [(f"tiny_shakespeare_{split}.bin", len(half)) for split, half in zip(("train", "val"), halves, strict=True)]
    with disk_errors(args.output_dir), locked(args.output_dir):
        writer = ShardWriter(partial, iter(names), tokenizer.vocab_size)
        for half in halves:
            writer.add(half)
        progress = Progress(1, sum(map(len, halves)), 2, len(text.encode()))
        publish(job, partial, progress, writer.files)
    print(f"{args.output_dir}: {len(halves[0]):,} training and {len(halves[1]):,} validation tokens")


if __name__ == "__main__":
    run_command(main)
