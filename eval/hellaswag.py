"""HellaSwag (Zellers et al. 2019): `python eval/hellaswag.py --checkpoint RUN`, or --hf FOLDER.

Which of four endings does the model find likeliest? Two scorings, both always given by name:
completion  the context as it is, endings encoded by themselves; acc_norm divides an ending's loss by its tokens
            (the evaluation of nanoGPT's family: karpathy/build-nanogpt)
lm_eval     "activity label: context", cleaned of WikiHow's marks; acc_norm divides by characters
            (EleutherAI's lm-evaluation-harness, task hellaswag version 1)
Under torchrun ranks share the examples. The file is the official one, fetched if need be, or --input.
"""

from __future__ import annotations

import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from util.errors import CommandParser, UserError, one_line_errors, run_command


def parser() -> CommandParser:
    parser = cli.subject_parser(__doc__)
    parser.add_argument("--input", default="", help="a copy of hellaswag_val.jsonl, or a .jsonl of your own")
    parser.add_argument("--limit", type=int, default=0, help="evaluate the first N examples only; 0: all")
    return parser


if __name__ == "__main__":
    with one_line_errors():
        args = parser().parse_args()  # before torch is imported, so that --help and mistakes are answered at once
        cli.check(args)

from data.hellaswag import DEFAULT_OUTPUT, OFFICIAL, Example, find_source, read_hellaswag
from eval.model import Subject, open_subject
from eval.reference import GPT2
from eval.scoring import Encode, Request, Score, encode_pair

STYLES = ("completion", "lm_eval")
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Question:
    """An example as one of the scorings asks it."""

    request: Request
    lengths: list[int]  # of each ending, in tokens or characters: what acc_norm divides by
    label: int

    def choices(self, scores: list[Score]) -> dict[str, int]:
        """The ending that each metric takes for the likeliest; of equally likely ones the first."""
        losses = [score.loss for score in scores]
        if not all(map(math.isfinite, losses)):
            return dict.fromkeys(METRICS, -1)  # a model that has diverged is right about nothing
        # An ending of which cleaning has left nothing is never taken (lm_eval divides by zero there).
        per_unit = [loss / n if n else math.inf for loss, n in zip(losses, self.lengths, strict=True)]
        return {"acc": losses.index(min(losses)), "acc_norm": per_unit.index(min(per_unit))}


Asked = dict[str, list[Question]]  # style → all examples as it asks them


def completion_question(example: Example, encode: Encode, encode_more: Encode) -> Question:
    endings = [encode_more(" " + ending) for ending in example.endings]
    return Question(Request(encode(example.context), endings), [len(e) for e in endings], example.label)


def lm_eval_question(example: Example, encode: Encode, before_text: int) -> Question:
    assert example.parts is not None, "read with its parts"
    activity, first, second = example.parts
    context = clean(f"{activity}: {first} {second.capitalize()}")
    endings = [clean(ending) for ending in example.endings]
    pairs = [encode_pair(context, " " + ending, encode) for ending in endings]
    return Question(
        Request(pairs[0][0] or [before_text], [more for _, more in pairs]), [len(e) for e in endings], example.label
    )


def clean(text: str) -> str:
    """Takes WikiHow's marks out of a text, as lm-evaluation-harness does it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def questions(examples: list[Example], encode: Encode, encode_more: Encode, before_text: int) -> Asked:
    """Both scorings' questions. A context of which cleaning leaves nothing is `before_text`.

    Raises UserError for an ending that has no tokens of its own.
    """
    asked = {
        "completion": [completion_question(e, encode, encode_more) for e in examples],
        "lm_eval": [lm_eval_question(e, encode, before_text) for e in examples],
    }
    for style in STYLES:
        for number, question in enumerate(asked[style], 1):
            if not all(question.request.endings):
                raise UserError(f"HellaSwag, example {number}: an ending has no tokens in the {style} scoring")
    return asked


def requests(asked: Asked) -> list[Request]:
    """All requests of both scorings, one after the other, as `accuracies` expects their scores."""
    return [question.request for style in STYLES for question in asked[style]]


@dataclass(frozen=True)
class Accuracy:
    value: float
    stderr: float  # of the mean over examples


def accuracies(asked: Asked, scores: list[list[Score]]) -> dict[str, dict[str, Accuracy]]:
    """style → metric → accuracy."""
    found: dict[str, dict[str, Accuracy]] = {}
    for i, style in enumerate(STYLES):
        n = len(asked[style])
        choices = [q.choices(s) for q, s in zip(asked[style], scores[i * n : (i + 1) * n], strict=True)]
        found[style] = {}
        for metric in METRICS:
            mean = sum(c[metric] == q.label for c, q in zip(choices, asked[style], strict=True)) / n
            found[style][metric] = Accuracy(mean, cli.standard_error(mean, n))
    return found


def record_of(found: dict[str, dict[str, Accuracy]]) -> dict[str, float]:
    """Accuracies under the names that metrics.jsonl has them by: hellaswag_acc ... hellaswag_lm_eval_acc_norm."""
    return {
        "_".join(("hellaswag", *(["lm_eval"] if style == "lm_eval" else []), metric)): found[style][metric].value
        for style in STYLES
        for metric in METRICS
    }


def table(name: str, found: dict[str, dict[str, Accuracy]]) -> str:
    """The accuracies, and those of GPT-2 under them."""
    lines = [f"{'':24}{'completion':^32}{'lm_eval':^32}", f"{'':24}" + "".join(f"{m:<16}" for m in METRICS * 2)]
    cells = [f"{found[s][m].value:.4f} ± {found[s][m].stderr:.4f}" for s in STYLES for m in METRICS]
    lines.append(f"{name[-23:]:24}" + "".join(f"{cell:<16}" for cell in cells))
    for r in GPT2:
        published = (r.acc, r.acc_norm, r.lm_eval_acc, r.lm_eval_acc_norm)
        lines.append(f"{r.name:24}" + "".join(f"{'-' if v is None else format(v, '.4f'):<16}" for v in published))
    return "\n".join(line.rstrip() for line in lines)


def details(asked: Asked, scores: list[list[Score]]) -> list[dict[str, Any]]:
    """Of each example its label, and in each scoring the losses of its endings (nats) and what the metrics choose."""
    n = len(asked["completion"])
    return [
        {"label": asked["completion"][k].label}
        | {
            style: {"losses": [s.loss for s in scores[i * n + k]]} | asked[style][k].choices(scores[i * n + k])
            for i, style in enumerate(STYLES)
        }
        for k in range(n)
    ]


def read_examples(path: Path, limit: int) -> list[Example]:
    return list(read_hellaswag(path, with_parts=True))[: limit or None]


def main(args: Namespace) -> None:
    source = find_source(args.input, DEFAULT_OUTPUT)
    examples = read_examples(source, args.limit)
    subject: Subject = open_subject(args)
    asked = questions(examples, subject.encode, subject.encode_more, subject.before_text)
    scores = subject.score(requests(asked), "HellaSwag")
    found = accuracies(asked, scores)
    shown = f"HellaSwag, {len(examples):,} examples of {source.name}: {subject.name}\n{table(subject.label, found)}"
    if source.name != OFFICIAL or args.limit:
        shown += "\nGPT-2's figures are those of all 10,042 examples"
    results = {"subject": subject.name, "examples": len(examples), "dtype": args.dtype}
    by_style = {s: {m: vars(a) for m, a in by_metric.items()} for s, by_metric in found.items()}
    cli.finish(args.output, results | by_style | {"details": details(asked, scores)}, shown)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
