"""Generation with a key-value cache compared with a loop without one: `python scripts/bench/generate.py`.

GPT-2 124M with random weights, greedy. The loop without a cache runs the model over the whole sequence for every token,
as small trainers do, but computes the logits of the last position only. The two alternate token by token, so that a
noisy machine slows both equally, and must give the same tokens. Prints one JSON line: tokens per second over all rows,
including the prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import json
import time

import torch

from cfg.config import load_config
from eval.generate import Sampling, generate
from model.gpt import GPT, init_weights
from util.device import choose_device
from util.errors import CommandParser, UserError, run_command

PROMPT_TOKENS = 16


@torch.no_grad()
def cacheless_step(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Returns the token ids (B, T) with the next token appended, (B, T + 1)."""
    seen = idx[:, -model.config.n_positions :]
    last = torch.full((len(idx),), seen.size(1) - 1, device=idx.device)
    return torch.cat((idx, model(seen, last=last).argmax(-1, keepdim=True)), dim=1)


def measure(model: GPT, prompts: list[list[int]], samples: int, new_tokens: int) -> dict[str, float]:
    """Returns the seconds that each of the two took for `new_tokens` steps of all rows."""
    seconds = {"cached": 0.0, "cacheless": 0.0}
    steps = generate(model, prompts, new_tokens, Sampling(temperature=0), samples=samples)
    idx = torch.tensor(prompts, device=next(model.parameters()).device).repeat_interleave(samples, dim=0)
    for step in range(new_tokens):
        start = time.perf_counter()
        tokens = next(steps)
        middle = time.perf_counter()
        idx = cacheless_step(model, idx)
        expected = idx[:, -1].tolist()  # waits for the device
        end = time.perf_counter()
        assert tokens == expected, f"token {step} differs"
        seconds["cached"] += middle - start
        seconds["cacheless"] += end - middle
    return seconds


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=1, help=f"prompts of {PROMPT_TOKENS} tokens in one batch")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    if min(args.new_tokens, args.prompts, args.samples) < 1:
        raise UserError("--new_tokens, --prompts and --samples must be at least 1")
    device = choose_device(args.device)
    config = load_config([], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    model.to(device).eval()
    numbers = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (args.prompts, PROMPT_TOKENS), generator=numbers).tolist()
    measure(model, prompts, args.samples, 4)  # warm-up
    seconds = measure(model, prompts, args.samples, args.new_tokens)
    speeds = {name: args.prompts * args.samples * args.new_tokens / s for name, s in seconds.items()}
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(args), "device": str(device)}
    print(json.dumps({**about, "tok_per_s": speeds, "ratio": speeds["cached"] / speeds["cacheless"]}))


if __name__ == "__main__":
    run_command(main)
