"""HellaSwag (Zellers et al. 2019): `python eval/hellaswag.py --checkpoint RUN`, or --hf FOLDER.

Which of four endings of a text is the most likely one? Two styles of asking are always reported together:
completion  context and endings as they are; acc_norm divides the loss of an ending by its number of tokens
            (as in nanoGPT's family: karpathy/build-nanogpt)
lm_eval     "activity label: context", without WikiHow's markup; acc_norm divides by the number of characters
            (EleutherAI's lm-evaluation-harness, task hellaswag version 1)
Under torchrun the ranks share the examples. The file is the official one, which is downloaded if needed, or --input.
"""

from __future__ import annotations

import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from util.command import parse_first
from util.errors import CommandParser, UserError, run_command


def parser() -> CommandParser:
    parser = cli.eval_parser(__doc__)
    parser.add_argument("--input", default="", help="a copy of hellaswag_val.jsonl, or another .jsonl with its fields")
    parser.add_argument("--limit", type=int, default=0, help="evaluate only the first N examples; 0: all")
    return parser


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, lambda: parser().parse_args(), cli.check)

from data.hellaswag import DEFAULT_OUTPUT, OFFICIAL, Example, find_source, read_hellaswag
from eval.encoding import Encode, TextEncoder, encode_pair
from eval.model import load_eval_model
from eval.reference import GPT2
from eval.scoring import Request, Score, score_requests

Style = Literal["completion", "lm_eval"]
Metric = Literal["acc", "acc_norm"]
STYLES: tuple[Style, ...] = ("completion", "lm_eval")
METRICS: tuple[Metric, ...] = ("acc", "acc_norm")


@dataclass(frozen=True)
class Question:
    """One example, encoded in one style."""

    request: Request
    lengths: list[int]  # of each ending, in tokens or characters: acc_norm divides by them
    label: int

    def choices(self, scores: list[Score]) -> dict[Metric, int]:
        """Returns the ending that each metric chooses: the most likely one, or the first of several."""
        losses = [score.loss for score in scores]
        if not all(map(math.isfinite, losses)):
            return dict.fromkeys(METRICS, -1)  # a diverged model is wrong about everything
        # An ending that cleaning has emptied is never chosen (lm_eval divides by zero there).
        normalized = [loss / n if n else math.inf for loss, n in zip(losses, self.lengths, strict=True)]
        return {"acc": losses.index(min(losses)), "acc_norm": normalized.index(min(normalized))}


Questions = dict[Style, list[Question]]  # all examples, in each style


def completion_question(example: Example, encode: Encode, encode_continuation: Encode) -> Question:
    """Encodes an example in the completion style."""
    endings = [encode_continuation(" " + ending) for ending in example.endings]
    return Question(Request(encode(example.context), endings), [len(e) for e in endings], example.label)


def lm_eval_question(example: Example, encode: Encode, bos_tokens: list[int]) -> Question:
    """Encodes an example in the lm_eval style. `bos_tokens` replace a context that cleaning has emptied."""
    assert example.parts is not None, "read with its parts"
    activity, first, second = example.parts
    context = clean(f"{activity}: {first} {second.capitalize()}")
    endings = [clean(ending) for ending in example.endings]
    pairs = [encode_pair(context, " " + ending, encode) for ending in endings]
    request = Request(pairs[0][0] or bos_tokens, [continuation for _, continuation in pairs])
    return Question(request, [len(e) for e in endings], example.label)


def clean(text: str) -> str:
    """Removes WikiHow's markup from a text, as lm-evaluation-harness does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def make_questions(examples: list[Example], encoder: TextEncoder) -> Questions:
    """Encodes the examples in both styles. An ending without tokens is a user error."""
    encode = encoder.encode
    questions: Questions = {
        "completion": [completion_question(e, encode, encoder.encode_continuation) for e in examples],
        "lm_eval": [lm_eval_question(e, encode, encoder.bos_tokens) for e in examples],
    }
    for style in STYLES:
        for number, question in enumerate(questions[style], 1):
            if not all(question.request.continuations):
                raise UserError(f"HellaSwag, example {number}: an ending has no tokens in the {style} style")
    return questions


def to_requests(questions: Questions) -> list[Request]:
    """Returns the requests of all questions, style by style, in the order in which `accuracies` expects the scores."""
    return [question.request for style in STYLES for question in questions[style]]


@dataclass(frozen=True)
class Accuracy:
    """A mean over examples, with its standard error."""

    value: float
    stderr: float


Accuracies = dict[Style, dict[Metric, Accuracy]]


def accuracies(questions: Questions, scores: list[list[Score]]) -> Accuracies:
    """Returns the accuracy of each style and metric."""
    found: Accuracies = {}
    for i, style in enumerate(STYLES):
        n = len(questions[style])
        choices = [q.choices(s) for q, s in zip(questions[style], scores[i * n : (i + 1) * n], strict=True)]
        found[style] = {}
        for metric in METRICS:
            mean = sum(c[metric] == q.label for c, q in zip(choices, questions[style], strict=True)) / n
            found[style][metric] = Accuracy(mean, cli.standard_error(mean, n))
    return found


def to_record(found: Accuracies) -> dict[str, float]:
    """Returns the accuracies under their names in metrics.jsonl: hellaswag_acc ... hellaswag_lm_eval_acc_norm."""
    prefixes: dict[Style, str] = {"completion": "hellaswag", "lm_eval": "hellaswag_lm_eval"}
    return {f"{prefixes[style]}_{metric}": found[style][metric].value for style in STYLES for metric in METRICS}


def format_table(name: str, found: Accuracies) -> str:
    """Formats the accuracies as a table, with published ones of GPT-2 below."""
    lines = [f"{'':24}{'completion':^32}{'lm_eval':^32}", f"{'':24}" + "".join(f"{m:<16}" for m in METRICS * 2)]
    cells = [f"{found[s][m].value:.4f} ± {found[s][m].stderr:.4f}" for s in STYLES for m in METRICS]
    lines.append(f"{name[-23:]:24}" + "".join(f"{cell:<16}" for cell in cells))
    for r in GPT2:
        published = (r.acc, r.acc_norm, r.lm_eval_acc, r.lm_eval_acc_norm)
        lines.append(f"{r.name:24}" + "".join(f"{'-' if v is None else format(v, '.4f'):<16}" for v in published))
    return "\n".join(line.rstrip() for line in lines)


def details(questions: Questions, scores: list[list[Score]]) -> list[dict[str, Any]]:
    """Returns, for each example, its label, and for each style the losses (nats) and the choice of each metric."""
    n = len(questions["completion"])
    return [
        {"label": questions["completion"][k].label}
        | {
            style: {"losses": [s.loss for s in scores[i * n + k]]} | questions[style][k].choices(scores[i * n + k])
            for i, style in enumerate(STYLES)
        }
        for k in range(n)
    ]


def read_examples(path: Path, limit: int) -> list[Example]:
    """Reads the first `limit` examples of a file, 0: all, with the fields of both styles."""
    return list(read_hellaswag(path, with_parts=True))[: limit or None]


def main(args: Namespace) -> None:
    source = find_source(args.input, DEFAULT_OUTPUT)
    examples = read_examples(source, args.limit)
    model = load_eval_model(args)
    questions = make_questions(examples, model.text)
    scores = score_requests(model, to_requests(questions), "HellaSwag")
    found = accuracies(questions, scores)
    summary = (
        f"HellaSwag, {len(examples):,} examples of {source.name}: {model.name}\n{format_table(model.label, found)}"
    )
    if source.name != OFFICIAL or args.limit:
        summary += "\nGPT-2's accuracies are for all 10,042 examples"
    results = {"subject": model.name, "examples": len(examples), "dtype": args.dtype}
    by_style = {s: {m: vars(a) for m, a in by_metric.items()} for s, by_metric in found.items()}
    cli.write_results(args.output, results | by_style | {"details": details(questions, scores)}, summary)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
