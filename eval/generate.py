"""Text from a model: `python eval/generate.py --checkpoint RUN_OR_CHECKPOINT --prompt "..."`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cfg.errors import CommandParser, UserError, one_line_errors, run_command

HOLE = "<FILL_ME>"
NONE = {"name": "none"}  # the tokenizer of a checkpoint that does not know it


def parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="an output_dir, or one checkpoint in it")
    parser.add_argument("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the run's)")
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument(
        "--infill",
        action="store_true",
        help=f"fill the one {HOLE} in the prompt (a model of --fim_rate)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser


if __name__ == "__main__":
    with one_line_errors():
        args = parser().parse_args()  # before torch is imported, so that --help and mistakes are answered at once

import torch
from torch import Tensor

from data.fim import infill_prompt
from data.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from model.device import choose_device
from model.gpt import GPT
from model.weights import find_checkpoint, load_model


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int, generator: torch.Generator
) -> Tensor:
    """Continues token ids (B, T) by `max_new_tokens` each, returning (B, T + max_new_tokens).

    The model sees at most the positions it was trained for. Draws on the CPU, so that a seed gives the
    same text whatever device computed the logits. temperature 0 is greedy.
    """
    limit = model.config.n_positions
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        logits = model(idx[:, -limit:])[:, -1].float().cpu()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, token.to(idx.device)), dim=1)
    model.train(was_training)
    return idx


def tokenizer_of(args: argparse.Namespace, found: Path, flags: dict[str, Any]) -> str:
    """The name or path to load: what --tokenizer says, else the checkpoint's own copy, else what the run was given."""
    if args.tokenizer:
        return str(args.tokenizer)
    name = str(found if (found / "tokenizer.json").is_file() else flags["tokenizer"])
    if name == "none":
        raise UserError(f"{args.checkpoint}: trained with --tokenizer=none; name its tokenizer with --tokenizer")
    return name


def main(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1 or args.num_samples < 1 or args.top_k < 0 or not 0 <= args.temperature < float("inf"):
        raise UserError("--max_new_tokens and --num_samples must be at least 1, --temperature and --top_k at least 0")
    device = choose_device(args.device)
    model, flags = load_model(args.checkpoint, device)
    found = find_checkpoint(args.checkpoint, lambda _: None)  # load_model has reported what it passed over
    assert found is not None, "load_model has found it"
    tokenizer = load_tokenizer(tokenizer_of(args, found, flags), model.config.vocab_size)
    check_same_tokenizer(json.loads((found / "state.json").read_text()).get("tokenizer", NONE), tokenizer.identity)
    around = args.prompt.split(HOLE) if args.infill else [args.prompt]
    if args.infill and len(around) != 2:
        raise UserError(f"--infill wants one {HOLE} in --prompt, which has {len(around) - 1}")
    ids = infill_prompt(around[0], around[1], tokenizer) if args.infill else tokenizer.encode(args.prompt)
    prompt = [tokenizer.end_of_text, *ids]
    if args.infill and len(prompt) + args.max_new_tokens > model.config.n_positions:
        raise UserError(
            f"--infill: a prompt of {len(prompt)} tokens and --max_new_tokens={args.max_new_tokens} exceed the"
            f" {model.config.n_positions} that the model sees; shorten one of the two"
        )
    idx = torch.tensor([prompt] * args.num_samples, device=device)
    generator = torch.Generator().manual_seed(args.seed)
    out = generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, generator)
    for row in out.tolist():
        print(filled(row[len(prompt) :], around, tokenizer) if args.infill else tokenizer.decode(row[1:]))
        print("-" * 40)


def filled(middle: list[int], around: list[str], tokenizer: Tokenizer) -> str:
    """The prompt with what the model wrote, up to the end of its document, in place of the hole."""
    end = middle.index(tokenizer.end_of_text) if tokenizer.end_of_text in middle else len(middle)
    return around[0] + tokenizer.decode(middle[:end]) + around[1]


if __name__ == "__main__":
    run_command(lambda: main(args))
