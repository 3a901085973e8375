"""Training speed and memory compared with a plain loop: `python scripts/bench/train.py [--nanogpt DIR]`.

The reference is a minimal trainer, written here for the comparison: a GPT-2 of the same shape with
scaled_dot_product_attention, full logits, F.cross_entropy, and torch's AdamW. With a copy of nanoGPT in DIR its
model.py and its optimizer are measured too. All run eagerly, in the same precision and on the same batch. Each run is a
separate process, and they alternate, so that a noisy machine slows all equally. Prints one JSON line: the median of the
rounds, and our results relative to the others.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfg.config import Config, load_config
from model.gpt import GPT, init_weights
from scripts.bench.nanogpt import load_nanogpt
from train.optim import make_optimizer
from util.device import peak_memory
from util.errors import CommandParser, run_command


class ReferenceBlock(nn.Module):
    """A transformer block of the reference."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Reference(nn.Module):
    """A minimal GPT-2."""

    def __init__(self, vocab: int, length: int, layers: int, heads: int, width: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(ReferenceBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(idx) + self.places(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


Loss = Callable[[Tensor, Tensor], Tensor]


def build(
    side: str, config: Config, device: torch.device, nanogpt: Path | None
) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    """Returns a model, its optimizer, and the function that computes the loss of a batch."""
    padded = -(-config.vocab_size // config.vocab_pad) * config.vocab_pad
    if side == "ours":
        ours = GPT(config)
        init_weights(ours, 0)
        ours.to(device)

        def mean_loss(x: Tensor, y: Tensor) -> Tensor:
            loss_sum, count = ours(x, y)
            return loss_sum / count

        return ours, make_optimizer(ours, config, world_size=1), mean_loss
    if side == "nanogpt":
        assert nanogpt is not None
        module = load_nanogpt(nanogpt)
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        shape |= {"vocab_size": padded, "block_size": config.sequence_length}
        theirs = module.GPT(module.GPTConfig(dropout=0.0, bias=True, **shape)).to(device)
        return theirs, theirs.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type), lambda x, y: theirs(x, y)[1]
    reference = Reference(padded, config.sequence_length, config.n_layer, config.n_head, config.n_embd).to(device)
    return reference, torch.optim.AdamW(reference.parameters(), lr=6e-4, weight_decay=0.1), reference


def measure(side: str, config: Config, steps: int, nanogpt: Path | None) -> dict[str, Any]:
    """Trains on random tokens. Returns tokens per second (median step) and the peak memory of this process."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    torch.manual_seed(0)
    batch = torch.randint(config.vocab_size, (config.batch_size, config.sequence_length + 1), device=device)
    x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    model, optimizer, loss_of = build(side, config, device, nanogpt)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    return {"tok_per_s": x.numel() / statistics.median(seconds[1:]), "peak_mib": peak_memory(device) / 2**20}


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--side", choices=["ours", "reference", "nanogpt"], help="measure only this one, in this process"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a copy of nanoGPT, to measure its model.py too")
    args, flags = parser.parse_known_args()
    defaults = ["--n_layer=6", "--n_head=6", "--n_embd=384", "--batch_size=8", "--sequence_length=512"]
    config = load_config(defaults + flags, world_size=1)
    if args.side:
        print(json.dumps(measure(args.side, config, args.steps, args.nanogpt)))
        return
    results: dict[str, list[dict[str, float]]] = {"ours": [], "reference": []}
    more: list[str] = []
    if args.nanogpt:
        load_nanogpt(args.nanogpt)  # check the path now
        results["nanogpt"], more = [], [f"--nanogpt={args.nanogpt}"]
    for _ in range(args.rounds):
        for side, rows in results.items():
            command = [sys.executable, __file__, f"--side={side}", f"--steps={args.steps}", *more, *flags]
            rows.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            )
            print(side, rows[-1], file=sys.stderr)
    median = {s: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for s, rows in results.items()}
    ratios = {s: {k: median["ours"][k] / median[s][k] for k in median[s]} for s in results if s != "ours"}
    named = {"ratio" if s == "reference" else f"ratio to {s}": ratio for s, ratio in ratios.items()}
    print(json.dumps({"torch": torch.__version__, "flags": defaults + flags, **median, **named}))


if __name__ == "__main__":
    run_command(main)
