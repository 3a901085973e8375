"""Loss, perplexity and bits per byte: `python eval/perplexity.py --checkpoint RUN --input FILES`, or --hf FOLDER.

Texts are token shards (.bin), all of them end to end one long text, as in training; plain text, of which each file is
a document; or .jsonl, of which each line is one. A document begins with the end-of-text token.

Every token but a text's first is scored once. The model sees --window of them at a time, and each window goes on
--stride tokens further than the one before, to score these alone: each token has at least window - stride tokens
before it, where there are as many. With a stride of half the window, the default, it costs two forwards a token. A
stride of the whole window is the fastest, has little context for the first tokens of each window, and is how
validation in training is done; a smaller one comes nearer to what the model can do. Losses compare only at the same
window and stride, and of models with one tokenizer; bits per byte compare across tokenizers.

loss           the mean over scored tokens, in nats
perplexity     exp(loss)
bits per byte  the summed loss in bits, divided by the bytes of the text as UTF-8: for text files those of the file, for
               shards those that the scored tokens stand for. End-of-text tokens in shards cost bits and have no bytes

A model trained with --doc_mask=1 sees nothing of the documents before; here neither. Under torchrun ranks share the
work, and the numbers are those of one process to the last digit. (A strided window: Hugging Face's "Perplexity of
fixed-length models". Their window of N tokens predicts N - 1, ours N.)
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from util.errors import CommandParser, UserError, one_line_errors, run_command


def parser() -> CommandParser:
    parser = cli.subject_parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="FILE", help="shards, text, .jsonl; or globs"
    )
    parser.add_argument("--text_key", default="text", help="the field of a .jsonl line that is the text")
    parser.add_argument("--window", type=int, default=0, help="tokens seen at once (default: all that the model can)")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: half a window)")
    parser.add_argument("--max_tokens", type=int, default=0, help="score the first N tokens only; 0: all")
    return parser


def check(args: Namespace) -> None:
    cli.check(args)
    for flag, least in (("window", 0), ("stride", 1), ("max_tokens", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag}={value} must be at least 1{'' if least else ', or 0 for all'}")
    if args.window and args.stride and args.stride > args.window:
        raise UserError(f"--stride={args.stride} exceeds --window={args.window}, so tokens would be passed over")


if __name__ == "__main__":
    with one_line_errors():
        args = parser().parse_args()  # before torch is imported, so that --help and mistakes are answered at once
        check(args)

import numpy as np

from eval.model import Subject, open_subject
from eval.scoring import Request
from eval.texts import BLOCK, Text, byte_lengths_for, count_bytes, cut, find_inputs, open_texts

SEGMENT = 2**22  # tokens in rows that are planned at a time: what bounds memory, whatever the length of the texts


@dataclass(frozen=True)
class Measured:
    """What a subject makes of texts."""

    loss_sum: float  # nats
    tokens: int
    bytes: int | None

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if not self.loss > 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else None


def strided_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of each window of a text: its tokens [first, end) are scored after its tokens [start, first).

    The model's inputs are [start, end - 1), `window` of them but in a text that is shorter. The last window starts
    earlier than a stride after the one before it rather than be shorter, as in lm-evaluation-harness.
    """
    first, end = 1, min(window + 1, length)
    while first < length:
        yield max(0, end - window - 1), first, end
        first, end = end, min(end + stride, length)


def by_document(ids: np.ndarray, context: int, end_of_text: int) -> Iterator[Request]:
    """A window's ids (n,) as one request for each document, of the tokens from number `context` on.

    The end-of-text token that begins a document is predicted at the end of the one before, as in training.
    """
    starts = [0, *(i for i in np.flatnonzero(ids[:-1] == end_of_text).tolist() if i)]
    for start, last in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        first = max(context, start + 1)
        if first <= last:
            yield Request(ids[start:first].tolist(), [ids[first : last + 1].tolist()])


def requests_of(text: Text, window: int, stride: int, end_of_text: int | None) -> Iterator[Request]:
    """All that is to be scored of a text, in order; with `end_of_text` no context crosses from document to document."""
    held, base = np.empty(0, np.int32), 0
    for start, first, end in strided_windows(text.length, window, stride):
        if end > base + len(held):
            base, held = start, text.read(start, min(text.length, max(end, start + BLOCK)))
        ids = held[start - base : end - base]
        if end_of_text is None:
            yield Request(ids[: first - start].tolist(), [ids[first - start :].tolist()])
        else:
            yield from by_document(ids, first - start, end_of_text)


def segments(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """The requests in lists of at least `size` tokens of context and endings, but for the last."""
    held: list[Request] = []
    tokens = 0
    for request in requests:
        held.append(request)
        tokens += len(request.context) + len(request.endings[0])
        if tokens >= size:
            yield held
            held, tokens = [], 0
    if held:
        yield held


def measure(subject: Subject, texts: list[Text], window: int, stride: int, segment: int = SEGMENT) -> tuple[float, int]:
    """Summed loss in nats of all tokens but the first of each text, and how many these are. Every rank gets both."""
    from tqdm import tqdm

    end_of_text = subject.end_of_text if (subject.flags or {}).get("doc_mask") else None
    requests = chain.from_iterable(requests_of(text, window, stride, end_of_text) for text in texts)
    losses, tokens = [], sum(text.length - 1 for text in texts)
    hidden = True if cli.my_rank()[0] else None
    with tqdm(total=tokens, desc="perplexity", unit=" tokens", unit_scale=True, disable=hidden) as bar:
        for part in segments(requests, segment):
            mean = sum(len(request.endings[0]) for request in part) / len(part)
            scores = subject.score(part, "", partial(advance, bar, mean))
            losses.append(math.fsum(score.loss for (score,) in scores))
    return math.fsum(losses), tokens


def advance(bar: Any, tokens_per_row: float, rows: int) -> None:
    bar.update(rows * tokens_per_row)


def check_window(args: Namespace, limit: int) -> tuple[int, int]:
    """(window, stride). Raises UserError for what does not fit the model."""
    window = args.window or limit
    if window > limit:
        raise UserError(f"--window={window} exceeds the {limit} tokens that the model sees at once")
    stride = args.stride or max(1, window // 2)
    if stride > window:
        raise UserError(f"--stride={stride} exceeds the window of {window} tokens, so some would be passed over")
    return window, stride


def main(args: Namespace) -> None:
    shards, files = find_inputs(args.input)
    subject = open_subject(args, text=bool(files))
    window, stride = check_window(args, subject.limit)
    texts = cut(open_texts(shards, files, args.text_key, subject), args.max_tokens)
    if not texts:
        raise UserError(f"--input={' '.join(args.input)}: too little to score; a text of two tokens is the shortest")
    count = count_bytes(texts, byte_lengths_for(shards, subject))
    found = Measured(*measure(subject, texts, window, stride), count)
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    shown = (
        f"{subject.name} on {' '.join(args.input)}\n"
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, bits per byte {bits}\n"
        f"{found.tokens:,} tokens, {'unknown' if count is None else f'{count:,}'} bytes,"
        f" window {window:,}, stride {stride:,}"
    )
    results = {"subject": subject.name, "input": args.input, "dtype": args.dtype, "window": window, "stride": stride}
    numbers = {name: getattr(found, name) for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}
    cli.finish(args.output, results | numbers, shown)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
