"""HellaSwag beside the usual loop: `python scripts/bench/hellaswag.py`, on GPT-2 124M with its initial weights.

The usual loop, written here for the comparison, takes one example at a time: four rows of context and ending, padded
to the longest, the logits of all positions, their cross-entropy. Ours is `eval/scoring.py`. Both score the same
examples with the same model in the same precision, from text on, completion style, and take turns on parts of them,
so that a noisy machine disturbs both alike. Fails unless both choose the same endings; prints one JSON line.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import json
import statistics
import time
from argparse import Namespace

import torch
import torch.nn.functional as F

from cfg.config import load_config
from cfg.errors import CommandParser, UserError, run_command
from data.hellaswag import DEFAULT_OUTPUT, Example, find_source
from data.tokenizer import Tokenizer, load_tokenizer
from eval.hellaswag import completion_question, read_examples
from eval.scoring import follow_on, gpt_forward, merge, score
from eval.subject import BATCH_TOKENS, GPU_BATCH_TOKENS, drain, in_dtype
from model.device import choose_device
from model.gpt import GPT, init_weights

Losses = list[list[float]]  # of each example's endings, mean per token, in nats


@torch.inference_mode()
def usual_loop(
    model: GPT, examples: list[Example], tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> Losses:
    found = []
    for example in examples:
        context = tokenizer.encode(example.context)
        rows = [context + tokenizer.encode(" " + ending) for ending in example.endings]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        counts = torch.zeros(tokens.shape)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            counts[i, len(context) : len(row)] = 1
        tokens, counts = tokens.to(device), counts.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(tokens)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        counts = counts[:, 1:]
        found.append(((losses.view(len(rows), -1) * counts).sum(1) / counts.sum(1)).tolist())
    return found


def ours(
    model: GPT, examples: list[Example], tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype, tokens: int
) -> Losses:
    asked = [completion_question(e, tokenizer.encode, follow_on(tokenizer.encode)) for e in examples]
    requests = [question.request for question in asked]
    forward = in_dtype(gpt_forward(model), device, dtype)
    pieces = drain(score(forward, requests, model.config.n_positions, tokens, device), lambda rows: None)
    return [
        [s.loss / n for s, n in zip(scores, q.lengths, strict=True)]
        for scores, q in zip(merge(pieces, requests), asked, strict=True)
    ]


def choices(losses: Losses) -> list[int]:
    return [row.index(min(row)) for row in losses]


def main(args: Namespace) -> None:
    if min(args.examples, args.rounds) < 1:
        raise UserError("--examples and --rounds must be at least 1")
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    examples = read_examples(find_source(args.input, DEFAULT_OUTPUT), args.examples * args.rounds)
    tokenizer = load_tokenizer()
    model = GPT(load_config([], world_size=1)).eval()
    init_weights(model, 0)
    model.to(device)
    batch_tokens = args.batch_tokens or BATCH_TOKENS.get(device.type, GPU_BATCH_TOKENS)
    common = (tokenizer, device, dtype)
    ours(model, examples[:8], *common, batch_tokens), usual_loop(model, examples[:8], *common)  # both warm
    rates: dict[str, list[float]] = {"ours": [], "usual": []}
    differing, largest = 0, 0.0
    for start in range(0, len(examples), args.examples):
        part = examples[start : start + args.examples]
        begin = time.perf_counter()
        a = ours(model, part, *common, batch_tokens)
        middle = time.perf_counter()
        b = usual_loop(model, part, *common)
        rates["ours"].append(len(part) / (middle - begin))
        rates["usual"].append(len(part) / (time.perf_counter() - middle))
        differing += sum(x != y for x, y in zip(choices(a), choices(b), strict=True))
        largest = max(largest, *(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)))
        print({side: round(values[-1], 2) for side, values in rates.items()}, file=sys.stderr)
    result = {
        "torch": torch.__version__,
        "device": str(device),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "examples": len(examples),
        "batch_tokens": batch_tokens,
        **{f"{side}_per_s": statistics.median(values) for side, values in rates.items()},
        "ratio": statistics.median(o / u for o, u in zip(*rates.values(), strict=True)),
        "differing_choices": differing,
        "largest_difference_nats": largest,
    }
    print(json.dumps(result))
    if differing and dtype == torch.float32:
        raise UserError(f"{differing} of {len(examples)} choices differ")


if __name__ == "__main__":
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", default="", help="a copy of hellaswag_val.jsonl")
    parser.add_argument("--examples", type=int, default=100, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, default=0, help="ours: tokens in one forward pass; 0: as in eval/")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    run_command(lambda: main(parser.parse_args()))
