"""LAMBADA (Paperno et al. 2016): `python eval/lambada.py --checkpoint RUN --input FILE.jsonl`, or --hf FOLDER.

Does the model know the last word of a passage, which only its whole tells? The text is best OpenAI's, with case and
punctuation: lines with `text`, whose last word is asked for, or with `context` and `continuation`.

accuracy    examples of which every token of the last word is the likeliest where it stands
perplexity  exp of the mean over examples of the last word's loss, in nats and summed over its tokens

Both as in EleutherAI's lm-evaluation-harness, task lambada_openai. OpenAI's own figures of GPT-2 are better:
they count otherwise. Under torchrun ranks share the examples.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from util.errors import CommandParser, UserError, one_line_errors, run_command


def parser() -> CommandParser:
    parser = cli.subject_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="a .jsonl file of passages")
    parser.add_argument("--limit", type=int, default=0, help="evaluate the first N examples only; 0: all")
    return parser


if __name__ == "__main__":
    with one_line_errors():
        args = parser().parse_args()  # before torch is imported, so that --help and mistakes are answered at once
        cli.check(args)

from eval.model import Subject, open_subject
from eval.reference import LAMBADA_GPT2
from eval.scoring import Request, Score, encode_pair
from eval.texts import json_lines, text_field

OFFICIAL_EXAMPLES = 5153


@dataclass(frozen=True)
class Example:
    context: str
    word: str  # that follows after a space


def read_lambada(path: Path, limit: int = 0) -> list[Example]:
    """The passages of a .jsonl file, or the first `limit`. Raises UserError naming the file and the line at fault."""
    examples = []
    for number, row in json_lines(path):
        examples.append(example_of(row, f"{path}, line {number}"))
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def example_of(row: Any, where: str) -> Example:
    """Raises UserError, which says `where`, if a field is missing or there is no last word."""
    if isinstance(row, dict) and "text" in row:
        context, _, word = text_field(row, "text", where).rpartition(" ")
    elif isinstance(row, dict) and "continuation" in row:
        context, word = (text_field(row, key, where) for key in ("context", "continuation"))
    else:
        raise UserError(f"{where}: not an object with `text`, or with `context` and `continuation`")
    if not word.strip():
        raise UserError(f"{where}: there is no last word")
    return Example(context, word)


def ask(example: Example, encode: Callable[[str], list[int]], before_text: int) -> Request:
    """A passage that is but one word follows on the end-of-text token."""
    context, word = encode_pair(example.context, " " + example.word, encode)
    return Request(context or [before_text], [word])


@dataclass(frozen=True)
class Measured:
    accuracy: float
    stderr: float  # of the accuracy, as the mean of a sample
    perplexity: float


def summarize(scores: list[Score]) -> Measured:
    n = len(scores)
    accuracy = sum(score.greedy for score in scores) / n
    loss = math.fsum(score.loss for score in scores) / n
    return Measured(accuracy, cli.standard_error(accuracy, n), math.exp(loss) if not loss > 709 else math.inf)


def table(name: str, found: Measured) -> str:
    lines = [f"{'':24}{'accuracy':<16}  perplexity"]
    lines.append(f"{name[-23:]:24}{f'{found.accuracy:.4f} ± {found.stderr:.4f}':<16}  {found.perplexity:.2f}")
    lines += [f"{r.name:24}{r.accuracy:<16.4f}  {r.perplexity:.2f}" for r in LAMBADA_GPT2]
    return "\n".join(lines)


def main(args: Namespace) -> None:
    examples = read_lambada(args.input, args.limit)
    subject: Subject = open_subject(args)
    requests = [ask(example, subject.encode, subject.before_text) for example in examples]
    scores = [score for (score,) in subject.score(requests, "LAMBADA")]
    found = summarize(scores)
    shown = f"LAMBADA, {len(examples):,} examples of {args.input.name}: {subject.name}\n{table(subject.label, found)}"
    if len(examples) != OFFICIAL_EXAMPLES:
        shown += f"\nGPT-2's figures are those of all {OFFICIAL_EXAMPLES:,} examples"
    results = {"subject": subject.name, "examples": len(examples), "dtype": args.dtype}
    cli.finish(args.output, results | vars(found) | {"details": [vars(score) for score in scores]}, shown)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
