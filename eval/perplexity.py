"""Loss, perplexity and bits per byte: `python eval/perplexity.py --checkpoint RUN --input FILES`, or --hf FOLDER.

The input is token shards (.bin), which are concatenated to one long text, as in training; or documents from the files
that data/text.py reads, in the same way. Files of unknown kinds are read as text. A document starts with the
model's BOS token, or with end-of-text if there is none. A folder of shards stands for its validation shards.

Every token except the first of a text is scored once. The model sees --window tokens at a time. Each window starts
--stride tokens after the previous one and scores only the tokens that the previous one did not reach. So each token has
at least window - stride tokens of context, unless the text starts there. The default stride, half a window, costs two
forward passes per token. A stride of a whole window is the fastest and equals validation during training, but the first
tokens of each window have little context. A smaller stride gives a lower loss. Losses are comparable only with the same
window, stride and tokenizer. Bits per byte are comparable between tokenizers.

loss           the mean over scored tokens, in nats
perplexity     exp(loss)
bits per byte  the summed loss in bits, divided by the number of UTF-8 bytes: for documents their bytes, for
               shards the bytes of the scored tokens. End-of-text tokens in shards cost bits but have no bytes

A model trained with --doc_mask=1 sees no earlier documents, and neither does it here. Under torchrun the ranks share
the work, and the results are bit-identical to those of one process. The strided window is described in Hugging Face's
"Perplexity of fixed-length models". There a window of N tokens predicts N - 1 tokens, here it predicts N.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.prepare.inputs import add_reading_flags, read_options
from eval import cli
from util.command import parse_first
from util.errors import CommandParser, UserError, run_command


def parser() -> CommandParser:
    parser = cli.eval_parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="FILE", help="shards or text; or globs"
    )
    add_reading_flags(parser)
    parser.add_argument(
        "--window", type=int, default=0, help="tokens of context (default: as many as the model can see)"
    )
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: half a window)")
    parser.add_argument("--max_tokens", type=int, default=0, help="score only the first N tokens; 0: all")
    return parser


def check(args: Namespace) -> None:
    """Checks the flags, before anything is loaded."""
    cli.check(args)
    for flag, least in (("window", 0), ("stride", 1), ("max_tokens", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag}={value} must be at least 1{'' if least else ', or 0 for all'}")
    if args.window and args.stride and args.stride > args.window:
        raise UserError(f"--stride={args.stride} exceeds --window={args.window}, so tokens would be skipped")


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, lambda: parser().parse_args(), check)

import numpy as np

from data.masks import SUFFIX
from data.prepare.sources import describe_skipped
from eval.model import EvalModel, load_eval_model
from eval.scoring import Request, score_requests
from eval.texts import BLOCK, Text, byte_lengths_for, count_bytes, find_inputs, open_texts, truncate

SEGMENT = 2**22  # tokens of the requests that are scored at a time; limits the memory for long texts


@dataclass(frozen=True)
class Result:
    """The summed loss of the scored tokens in nats, their number, and the bytes of their text, if known."""

    loss_sum: float
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
    """Yields (start, first, end) of each window: tokens [first, end) of the text are scored given [start, first).

    The model's input is [start, end - 1): `window` tokens, or all of a shorter text. The last window moves by less than
    a stride and keeps its length, as in lm-evaluation-harness.
    """
    first, end = 1, min(window + 1, length)
    while first < length:
        yield max(0, end - window - 1), first, end
        first, end = end, min(end + stride, length)


def split_by_document(ids: np.ndarray, context: int, separator: int) -> Iterator[Request]:
    """Yields one request per document of a window's ids (n,). The first `context` tokens are not scored.

    The separator that starts a document is predicted at the end of the previous one, as in training.
    """
    starts = [0, *(i for i in np.flatnonzero(ids[:-1] == separator).tolist() if i)]
    for start, last in zip(starts, [*starts[1:], len(ids) - 1], strict=True):
        first = max(context, start + 1)
        if first <= last:
            yield Request(ids[start:first].tolist(), [ids[first : last + 1].tolist()])


def to_requests(text: Text, window: int, stride: int, separator: int | None) -> Iterator[Request]:
    """Yields the requests that score a text, in order. With `separator` no context crosses a document boundary."""
    block, base = np.empty(0, np.int32), 0  # the ids that are in memory, and the place of the first
    for start, first, end in strided_windows(text.length, window, stride):
        if end > base + len(block):
            base, block = start, text.read(start, min(text.length, max(end, start + BLOCK)))
        ids = block[start - base : end - base]
        if separator is None:
            yield Request(ids[: first - start].tolist(), [ids[first - start :].tolist()])
        else:
            yield from split_by_document(ids, first - start, separator)


def segments(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Groups the requests into lists of at least `size` tokens, except the last list."""
    segment: list[Request] = []
    tokens = 0
    for request in requests:
        segment.append(request)
        tokens += len(request.context) + len(request.continuations[0])
        if tokens >= size:
            yield segment
            segment, tokens = [], 0
    if segment:
        yield segment


def measure(model: EvalModel, texts: list[Text], window: int, stride: int, segment: int = SEGMENT) -> tuple[float, int]:
    """Returns the summed loss in nats of all tokens except the first of each text, and their number, on every rank."""
    from tqdm import tqdm

    requests = chain.from_iterable(to_requests(text, window, stride, model.document_separator) for text in texts)
    losses, tokens = [], sum(text.length - 1 for text in texts)
    hidden = None if model.ranks.is_main else True  # None: shown on a terminal only
    with tqdm(total=tokens, desc="perplexity", unit=" tokens", unit_scale=True, disable=hidden) as bar:
        for part in segments(requests, segment):
            tokens_per_row = sum(len(request.continuations[0]) for request in part) / len(part)
            scores = score_requests(model, part, on_progress=partial(advance, bar, tokens_per_row))
            losses.append(math.fsum(score.loss for (score,) in scores))
    return math.fsum(losses), tokens


def advance(bar: Any, tokens_per_row: float, rows: int) -> None:
    """Advances a progress bar that counts tokens by a number of rows."""
    bar.update(rows * tokens_per_row)


def check_window(args: Namespace, n_positions: int) -> tuple[int, int]:
    """Returns (window, stride), checked against the context length of the model."""
    window = args.window or n_positions
    if window > n_positions:
        raise UserError(f"--window={window} exceeds the model's context of {n_positions} tokens")
    stride = args.stride or max(1, window // 2)
    if stride > window:
        raise UserError(f"--stride={stride} exceeds the window of {window} tokens, so tokens would be skipped")
    return window, stride


def main(args: Namespace) -> None:
    shards, files = find_inputs(args.input, args.format)
    model = load_eval_model(args, needs_tokenizer=bool(files))
    window, stride = check_window(args, model.n_positions)
    options, skipped = read_options(args), Counter[str]()
    texts = truncate(open_texts(shards, files, options, model, skipped), args.max_tokens)
    if not texts:
        raise UserError(f"--input={' '.join(args.input)}: too short; at least one text needs two tokens")
    count = count_bytes(texts, byte_lengths_for(shards, model))
    found = Result(*measure(model, texts, window, stride), count)
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    summary = (
        f"{model.name} on {' '.join(args.input)}\n"
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, bits per byte {bits}\n"
        f"{found.tokens:,} tokens, {'unknown' if count is None else f'{count:,}'} bytes,"
        f" window {window:,}, stride {stride:,}"
        f"{describe_skipped(skipped, options.document_separator)}"
    )
    if any(path.with_suffix(SUFFIX).exists() for path in shards):
        summary += "\nall tokens are scored: the masks of the shards are not read, unlike for the val_loss of training"
    results = {"subject": model.name, "input": args.input, "dtype": args.dtype, "window": window, "stride": stride}
    numbers = {name: getattr(found, name) for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}
    cli.write_results(args.output, results | numbers, summary)


if __name__ == "__main__":
    run_command(lambda: main(args), teardown=False)
