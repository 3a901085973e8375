"""`python data/tiny_shakespeare.py`: tinyshakespeare as GPT-2 tokens, 90% to train on and 10% to validate.

Writes data/tinyshakespeare/tiny_shakespeare_{train,val}.bin. The split is by characters, as in
nanoGPT, and each half is one document.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cfg.errors import CommandParser, run_command
from data import assets, prepare
from data.tokenizer import load_tokenizer

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "tinyshakespeare"


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", default="", help="a copy of tinyshakespeare.txt, if it cannot be fetched")
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()

    recipe = {
        "source": "tinyshakespeare.txt",
        "sha256": assets.ASSETS["tinyshakespeare.txt"].sha256,
        "tokenizer": "gpt2",
    }
    partial = prepare.begin(args.output_dir, recipe)
    if partial is None:
        print(f"{args.output_dir}: already there")
        return
    text = assets.fetch("tinyshakespeare.txt", args.input).read_text()
    tokenizer = load_tokenizer()
    cut = int(0.9 * len(text))
    writers = []
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        writer = prepare.ShardWriter(partial, f"tiny_shakespeare_{split}", tokenizer.n_vocab, 10**8, numbered=False)
        for tokens in prepare.encode_documents([part], tokenizer):
            writer.add(tokens)
        writers.append(writer)
    facts = {"recipe": recipe, "tokenizer": "gpt2", "vocab_size": tokenizer.n_vocab, "documents": 2}
    prepare.finish(args.output_dir, writers, facts)
    print(f"{args.output_dir}: {writers[0].tokens:,} training and {writers[1].tokens:,} validation tokens")


if __name__ == "__main__":
    run_command(main)
