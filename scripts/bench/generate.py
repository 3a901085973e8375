"""Generation beside the usual loop without a cache: `python scripts/bench/generate.py`.

GPT-2 124M with random weights, greedy. The usual loop runs the same model over the whole sequence for every token,
as small trainers do, but takes the logits of the last position only. The two take turns, and must give the same
tokens. Prints one JSON line: tokens per second over all rows, the median of the rounds, reading the prompt included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import json
import statistics
import time

import torch

from cfg.config import load_config
from cfg.errors import CommandParser, UserError, run_command
from eval.generate import Sampling, generate
from model.device import choose_device
from model.gpt import GPT, init_weights

PROMPT_TOKENS = 16

Texts = list[list[int]]  # token ids, row by row


def cached(model: GPT, prompts: Texts, samples: int, new_tokens: int, device: torch.device) -> Texts:
    steps = list(generate(model, prompts, new_tokens, Sampling(temperature=0), samples=samples))
    return [list(row) for row in zip(*steps, strict=True)]


@torch.no_grad()
def cacheless(model: GPT, prompts: Texts, samples: int, new_tokens: int, device: torch.device) -> Texts:
    idx = torch.tensor(prompts, device=device).repeat_interleave(samples, dim=0)
    for _ in range(new_tokens):
        seen = idx[:, -model.config.n_positions :]
        last = torch.full((len(idx),), seen.size(1) - 1, device=device)
        idx = torch.cat((idx, model(seen, last=last).argmax(-1, keepdim=True)), dim=1)
    return idx[:, PROMPT_TOKENS:].tolist()


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=1, help=f"prompts of {PROMPT_TOKENS} tokens in one batch")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    if min(args.new_tokens, args.prompts, args.samples, args.rounds) < 1:
        raise UserError("--new_tokens, --prompts, --samples and --rounds must be at least 1")
    device = choose_device(args.device)
    config = load_config([], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    model.to(device).eval()
    numbers = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (args.prompts, PROMPT_TOKENS), generator=numbers).tolist()

    sides: dict[str, Callable[..., Texts]] = {"cached": cached, "cacheless": cacheless}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(model, prompts, args.samples, 4, device)  # what is done once is not measured
    for _ in range(args.rounds):
        texts = []
        for name, side in sides.items():
            start = time.perf_counter()
            texts.append(side(model, prompts, args.samples, args.new_tokens, device))
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
        assert texts[0] == texts[1], "the two give different tokens"
    count = args.prompts * args.samples * args.new_tokens
    speeds = {name: count / statistics.median(times) for name, times in seconds.items()}
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(args), "device": str(device)}
    print(json.dumps({**about, "tok_per_s": speeds, "ratio": speeds["cached"] / speeds["cacheless"]}))


if __name__ == "__main__":
    run_command(main)
