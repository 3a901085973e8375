"""LAMBADA (Paperno et al. 2016): `python eval/lambada.py --checkpoint RUN --input FILE.jsonl`, or --hf FOLDER.

Does the model predict the last word of a passage, which can only be guessed from the whole passage? Use OpenAI's
version of the text, with case and punctuation. Each line has `text`, whose last word is predicted, or `context` and
`continuation`.

accuracy    the share of examples in which every token of the last word is the most likely one
perplexity  exp of the mean loss of the last word, in nats and summed over its tokens

Both follow EleutherAI's lm-evaluation-harness, task lambada_openai. OpenAI published better results for GPT-2, because
it counts differently. Under torchrun the ranks share the examples.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from util.command import parse_first
from util.errors import CommandParser, UserError, run_command


def parser() -> CommandParser:
    parser = cli.eval_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="a .jsonl file of passages")
    parser.add_argument("--limit", type=int, default=0, help="evaluate only the first N examples; 0: all")
    return parser


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, lambda: parser().parse_args(), cli.check)

from data.prepare.inputs import Damaged
from data.prepare.text_files import open_binary, parse_line, read_errors
from eval.encoding import TextEncoder, encode_pair
from eval.model import load_eval_model
from eval.reference import LAMBADA_GPT2
from eval.scoring import Request, Score, score_requests
from util.files import refuse_lfs_pointer

OFFICIAL_EXAMPLES = 5153


@dataclass(frozen=True)
class Example:
    """A passage without its last word, and the word, which follows after a space."""

    context: str
    word: str


def read_lambada(path: Path, limit: int = 0) -> list[Example]:
    """Reads the first `limit` passages of a .jsonl file; 0: all."""
    examples = []
    for number, row in json_lines(path):
        examples.append(to_example(row, f"{path}, line {number}"))
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: contains no examples")
    return examples


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields number (from 1) and value of each line that is not blank."""
    refuse_lfs_pointer(path)
    try:
        with read_errors(str(path)), open_binary(str(path)) as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield number, parse_line(line)
                    except ValueError as e:
                        raise UserError(f"{path}, line {number}: not JSON") from e
    except Damaged as e:  # without its advice: all passages are needed
        raise UserError(*e.args) from e


def text_field(row: dict[str, Any], key: str, where: str) -> str:
    """Returns a field of a passage, which must be text."""
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: not an object with text in a field {key!r}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: field {key!r} contains an unpaired surrogate, which is not valid text") from e
    return value


def to_example(row: Any, where: str) -> Example:
    """Returns the example of a line's JSON value. `where` names the line in errors."""
    if isinstance(row, dict) and "text" in row:
        context, _, word = text_field(row, "text", where).rpartition(" ")
    elif isinstance(row, dict) and "continuation" in row:
        context, word = (text_field(row, key, where) for key in ("context", "continuation"))
    else:
        raise UserError(f"{where}: not an object with `text`, or with `context` and `continuation`")
    if not word.strip():
        raise UserError(f"{where}: the last word is missing")
    return Example(context, word)


def to_request(example: Example, encoder: TextEncoder) -> Request:
    """Encodes an example. The context of a passage of one word is BOS or end-of-text."""
    context, word = encode_pair(example.context, " " + example.word, encoder.encode)
    return Request(context or encoder.bos_tokens, [word])


@dataclass(frozen=True)
class Result:
    """Both metrics over all examples, and the standard error of the accuracy."""

    accuracy: float
    stderr: float
    perplexity: float


def summarize(scores: list[Score]) -> Result:
    """Computes the metrics from the scores of the last words."""
    n = len(scores)
    accuracy = sum(score.greedy for score in scores) / n
    loss = math.fsum(score.loss for score in scores) / n
    return Result(accuracy, cli.standard_error(accuracy, n), math.exp(loss) if not loss > 709 else math.inf)


def format_table(name: str, found: Result) -> str:
    """Formats the result as a table, with published ones of GPT-2 below."""
    lines = [f"{'':24}{'accuracy':<16}  perplexity"]
    lines.append(f"{name[-23:]:24}{f'{found.accuracy:.4f} ± {found.stderr:.4f}':<16}  {found.perplexity:.2f}")
    lines += [f"{r.name:24}{r.accuracy:<16.4f}  {r.perplexity:.2f}" for r in LAMBADA_GPT2]
    return "\n".join(lines)


def main(args: Namespace) -> None:
    examples = read_lambada(args.input, args.limit)
    model = load_eval_model(args)
    requests = [to_request(example, model.text) for example in examples]
    scores = [score for (score,) in score_requests(model, requests, "LAMBADA")]
    found = summarize(scores)
    summary = (
        f"LAMBADA, {len(examples):,} examples of {args.input.name}: {model.name}\n{format_table(model.label, found)}"
    )
    if len(examples) != OFFICIAL_EXAMPLES:
        summary += f"\nGPT-2's results are for all {OFFICIAL_EXAMPLES:,} examples"
    results = {"subject": model.name, "examples": len(examples), "dtype": args.dtype}
    cli.write_results(args.output, results | vars(found) | {"details": [vars(score) for score in scores]}, summary)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
