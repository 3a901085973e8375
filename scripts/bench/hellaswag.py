"""HellaSwag compared with the usual loop: `python scripts/bench/hellaswag.py`, on GPT-2 124M with initial weights.

The usual loop scores one example at a time: four rows of context and ending, padded to the longest, the logits of all
positions, their cross-entropy. It is written here for the comparison with eval/scoring.py. Both score the same examples
in the completion style with the same model and precision. They alternate after parts of the examples, so that a noisy
machine slows both equally. The time to encode the texts is not measured. Fails unless both choose the same endings;
in bfloat16 different choices are possible for near ties, and only counted. Prints one JSON line.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from cfg.config import load_config
from data.hellaswag import DEFAULT_OUTPUT, find_source
from data.tokenizers.load import load_tokenizer
from eval.encoding import continuation_encoder
from eval.hellaswag import completion_question, read_examples
from eval.model import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, in_dtype
from eval.scoring import Request, ScoringModel, gpt_forward, score_requests
from model.gpt import GPT, init_weights
from util.device import choose_device
from util.errors import CommandParser, UserError, run_command
from util.ranks import Ranks

WHOLE = 10_042  # examples of the validation set
Losses = list[list[float]]  # of each example's endings, mean per token, in nats


@torch.inference_mode()
def usual_loop(model: GPT, requests: list[Request], device: torch.device, dtype: torch.dtype) -> Losses:
    """Scores one example at a time, with padding and the logits of all positions."""
    found = []
    for request in requests:
        rows = [request.context + ending for ending in request.continuations]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        counts = torch.zeros(tokens.shape)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            counts[i, len(request.context) : len(row)] = 1
        tokens, counts = tokens.to(device), counts[:, 1:].to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(tokens)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        found.append(((losses.view(len(rows), -1) * counts).sum(1) / counts.sum(1)).tolist())
    return found


def ours(model: GPT, requests: list[Request], device: torch.device, dtype: torch.dtype, tokens: int) -> Losses:
    """Scores with eval/scoring.py."""
    forward = in_dtype(gpt_forward(model), device, dtype)
    scored = score_requests(ScoringModel(forward, Ranks(0, 0, 1, device), model.config.n_positions, tokens), requests)
    return [
        [s.loss / len(ending) for s, ending in zip(scores, request.continuations, strict=True)]
        for scores, request in zip(scored, requests, strict=True)
    ]


def random_requests(count: int, vocab_size: int) -> list[Request]:
    """Returns random ids with lengths like in the official file: contexts of 51 ± 25 tokens, endings of 31 ± 15."""
    numbers = np.random.default_rng(0)

    def ids(mean: float, deviation: float) -> list[int]:
        found: list[int] = numbers.integers(vocab_size, size=max(2, round(numbers.normal(mean, deviation)))).tolist()
        return found

    return [Request(ids(51, 25), [ids(31, 15) for _ in range(4)]) for _ in range(count)]


def official_requests(path: str, count: int) -> list[Request]:
    """Returns the first examples of the official file."""
    encode = load_tokenizer().encode
    examples = read_examples(find_source(path, DEFAULT_OUTPUT), count)
    return [completion_question(example, encode, continuation_encoder(encode)).request for example in examples]


def timed(work: Callable[[], Losses]) -> tuple[Losses, float]:
    """Returns the result of `work` and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def choices(losses: Losses) -> list[int]:
    """Returns the ending with the lowest loss of each example."""
    return [row.index(min(row)) for row in losses]


def main(args: Namespace) -> None:
    if min(args.examples, args.rounds) < 1:
        raise UserError("--examples and --rounds must be at least 1")
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    model = GPT(load_config([], world_size=1)).eval()
    init_weights(model, 0)
    model.to(device)
    total = args.examples * args.rounds
    count = WHOLE if args.whole else total
    requests = random_requests(count, model.config.vocab_size) if args.random else official_requests(args.input, count)
    tokens = args.batch_tokens or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)
    score_ours = partial(ours, model, device=device, dtype=dtype, tokens=tokens)
    score_usual = partial(usual_loop, model, device=device, dtype=dtype)
    score_ours(requests[:8]), score_usual(requests[:8])  # warm-up

    rates: dict[str, list[float]] = {"ours": [], "usual": []}
    differing, largest = 0, 0.0
    for start in range(0, total, args.examples):
        part = requests[start : start + args.examples]
        a, seconds = timed(partial(score_ours, part))
        b, usual_seconds = timed(partial(score_usual, part))
        rates["ours"].append(len(part) / seconds)
        rates["usual"].append(len(part) / usual_seconds)
        differing += sum(x != y for x, y in zip(choices(a), choices(b), strict=True))
        largest = max(largest, *(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)))
        print({side: round(values[-1], 2) for side, values in rates.items()}, file=sys.stderr)

    result = {
        "torch": torch.__version__,
        "device": str(device),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "examples": total,
        "batch_tokens": tokens,
        **{f"{side}_per_s": statistics.median(values) for side, values in rates.items()},
        "ratio": statistics.median(o / u for o, u in zip(*rates.values(), strict=True)),
        "differing_choices": differing,
        "largest_difference_nats": largest,
    }
    if args.whole:
        result["whole_set_s"] = timed(partial(score_ours, requests))[1]
    print(json.dumps(result))
    if differing and dtype == torch.float32:
        raise UserError(f"{differing} choices differ")


if __name__ == "__main__":
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", default="", help="a copy of hellaswag_val.jsonl")
    parser.add_argument("--random", action="store_true", help="use random ids, which need no file and no network")
    parser.add_argument("--examples", type=int, default=100, help="examples per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="finally measure eval/scoring.py on all 10,042 examples")
    parser.add_argument(
        "--batch_tokens", type=int, default=0, help="tokens in one forward pass of eval/scoring.py; 0: its default"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    run_command(lambda: main(parser.parse_args()))
