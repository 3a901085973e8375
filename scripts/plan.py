"""Planning of a run before a machine is rented: the memory of each strategy, time, cost, and a recommendation.

    python scripts/plan.py --cfg=llama3-8b --gpu=H100 --gpus=64 --price=2.5

All other flags are those of train_gpt.py. Flags of the strategy (--zero_stage, --replicas, --activation_checkpointing,
--cpu_offload, --sync_every_microbatch, --batch_size) narrow the choice. GB are 10^9 bytes, on the rank that needs most.
docs/memory.md explains the columns. Everything is computed from formulas, so no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from cfg.config import Config, load_config
from model.formats.pretrained import open_pretrained
from util.command import parse_first
from util.errors import CommandParser, UserError, closest, run_command
from util.gpus import GPU_MEMORY_GB, peak_flops

OLD_GPUS = ("V100", "T4")  # without bfloat16 and flash attention
ENOUGH_TOKENS = 4096  # in a micro-step; with fewer the GPU is not fully used


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line. Returns the flags of this command, and the rest, which are train_gpt.py's."""
    p = CommandParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--gpu", default="H100", help=f"one of {', '.join(GPU_MEMORY_GB)} (default H100)")
    p.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    p.add_argument("--gpus_per_node", type=int, default=8, help="GPUs with fast links between them (default 8)")
    p.add_argument("--memory_gb", type=float, help="memory of a GPU (default: from the table)")
    p.add_argument("--mfu", type=float, default=0.4, help="share of the peak FLOP/s that is reached (default 0.4)")
    p.add_argument("--price", type=float, help="price of a GPU hour")
    p.add_argument("--tokens", type=int, help="tokens to train on (default num_iterations*total_batch_size)")
    p.add_argument("--markdown", action="store_true", help="print only the table, as in docs/memory.md")
    args, flags = p.parse_known_args(argv)
    known = {name.lower(): name for name in GPU_MEMORY_GB}
    if args.gpu.lower() not in known:
        near = closest(args.gpu.lower(), known)
        hint = f"did you mean {known[near]!r}?" if near else f"known GPUs: {', '.join(GPU_MEMORY_GB)}"
        raise UserError(f"--gpu={args.gpu}: not in the table of GPUs; {hint}")
    args.gpu = known[args.gpu.lower()]
    for name, least, most in (("gpus", 1, 2**20), ("gpus_per_node", 1, 2**20), ("mfu", 0, 1)):
        value = getattr(args, name)
        if not least <= value <= most or not value:
            raise UserError(f"--{name}={value} must be {'at least 1' if least else 'above 0 and at most 1'}")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise UserError(f"--gpus={args.gpus} must be a multiple of --gpus_per_node={args.gpus_per_node}, or fewer")
    for name in ("memory_gb", "price", "tokens"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name}={getattr(args, name)} must be a number above 0")
    return args, flags


# Before torch is imported, so that --help and typos are answered at once.
PARSED = parse_first(__name__, parse)

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from data.tokenizers.load import tokenizer_size
from model.gpt import GPT
from train.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    PARTS,
    Memory,
    fitting_batch_size,
    micro_steps,
    planned_bytes,
    usable_bytes,
)

CHOICES = ("zero_stage", "replicas", "activation_checkpointing", "cpu_offload", "sync_every_microbatch", "batch_size")
# (activation checkpointing, reduce every micro-step), cheapest first. "selective" recomputes no matrix products.
COSTS = [("none", 0), ("selective", 0), ("none", 1), ("selective", 1), ("block", 0), ("block", 1)]


@dataclass(frozen=True)
class Setting:
    """A strategy, its memory, whether it fits, and the largest micro-batch that fits (0: none)."""

    config: Config
    memory: Memory
    fits: bool
    largest: int


def capacity(args: argparse.Namespace) -> float:
    """Returns the bytes of memory of one GPU."""
    return 1e9 * (args.memory_gb or GPU_MEMORY_GB[args.gpu])


def strategies(config: Config, given: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the strategies that agree with the config and with the flags `given`, as changes to the config."""
    replica_counts = {given["replicas"]} if "replicas" in given else {1, max(1, args.gpus // args.gpus_per_node)}
    stages = (0, 1, 2, 3) if args.gpus > 1 else (0, 3)
    for stage in (s for s in stages if s < 2 or config.compile != "model"):  # FSDP compiles blocks only
        for replicas in sorted(replica_counts) if stage >= 2 else [1]:
            for offload in (False, True) if stage >= 2 else (False,):
                for checkpointing in ("none", "selective", "block"):
                    values = (stage, replicas, checkpointing, offload)
                    changes = dict(zip(CHOICES, values, strict=False))
                    useless = args.gpus == 1 and stage == 3 and not offload  # one rank has nothing to shard
                    if not useless and all(given.get(name, value) == value for name, value in changes.items()):
                        yield changes


def explore(config: Config, given: dict[str, Any], args: argparse.Namespace) -> list[list[Setting]]:
    """Returns the settings of every strategy: gradients reduced once per step and, if it differs, every micro-step."""
    found = []
    for changes in strategies(config, given, args):
        several = changes["zero_stage"] >= 2 and "sync_every_microbatch" not in given
        syncs = [False, True] if several else [given.get("sync_every_microbatch", False)]
        found.append([measure(config.model_copy(update=changes | {CHOICES[4]: s}), given, args) for s in syncs])
    if not found:
        raise UserError("no strategy on this number of GPUs agrees with these flags; leave some out")
    return found


def measure(config: Config, given: dict[str, Any], args: argparse.Namespace) -> Setting:
    """Plans the memory of a config, and finds the largest micro-batch that fits."""
    gpu_bytes = capacity(args)
    usable, memory = usable_bytes(gpu_bytes), planned_bytes(config, args.gpus, gpu_bytes)
    rows = config.total_batch_size // (config.sequence_length * args.gpus)  # of one rank per step: the upper limit
    sizes = [config.batch_size] if "batch_size" in given else [b for b in range(rows, 0, -1) if rows % b == 0]
    candidates = (config.model_copy(update={"batch_size": b}) for b in sizes)
    largest = next((c.batch_size for c in candidates if planned_bytes(c, args.gpus, gpu_bytes).peak <= usable), 0)
    return Setting(config, memory, memory.peak <= usable, largest)


def cheapest_reduction(settings: list[Setting]) -> Setting:
    """Returns the setting with the least communication that fits, of those that differ in how they reduce gradients."""
    fitting = [s for s in settings if s.fits] or [s for s in settings if s.largest] or settings[-1:]
    return fitting[0]


def preference(setting: Setting, args: argparse.Namespace) -> tuple:
    """Returns a sort key, best first: no offload, large micro-steps, little recomputation and communication."""
    c = setting.config
    too_small = c.batch_size * c.sequence_length < ENOUGH_TOKENS
    sync = c.sync_every_microbatch and micro_steps(c, args.gpus) > 1
    across = args.gpus > args.gpus_per_node and c.replicas == 1  # weights are gathered between nodes
    cost = COSTS.index((c.activation_checkpointing, int(sync)))
    return c.cpu_offload, too_small, cost, c.zero_stage, across, -c.batch_size


def recommend(found: list[list[Setting]], args: argparse.Namespace) -> Setting | None:
    """Returns the best setting that fits, with its largest micro-batch, or None."""
    settings = []
    for setting in (s for group in found for s in group if s.largest):
        config = setting.config.model_copy(update={"batch_size": setting.largest})
        if micro_steps(config, args.gpus) == 1 and config.sync_every_microbatch:
            continue  # with one micro-step the flag changes nothing
        settings.append(Setting(config, planned_bytes(config, args.gpus, capacity(args)), True, setting.largest))
    return min(settings, key=lambda s: preference(s, args), default=None)


HEAD = ("stage", "recompute", "offload", "reduce", *PARTS, "peak", "fits", "largest batch")


def row(setting: Setting, gpus: int) -> list[str]:
    """Formats the cells of a setting."""
    c, memory = setting.config, setting.memory
    stage = f"{c.zero_stage} × {c.replicas}" if c.replicas > 1 else f"{c.zero_stage}"
    each = (c.sync_every_microbatch or c.cpu_offload) and micro_steps(c, gpus) > 1
    words = [stage, c.activation_checkpointing, "yes" if c.cpu_offload else "no", "micro-step" if each else "step"]
    numbers = [f"{n / 1e9:.1f}" for n in (*(memory.parts[part] for part in PARTS), memory.peak)]
    return [*words, *numbers, "yes" if setting.fits else "no", str(setting.largest or "none")]


def table(settings: list[Setting], gpus: int, markdown: bool) -> str:
    """Formats one line per strategy, for a terminal or as Markdown."""
    rows = [list(HEAD), *(row(s, gpus) for s in settings)]
    if markdown:
        rows.insert(1, ["---"] * len(HEAD))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in rows
    )


def expectation(config: Config, args: argparse.Namespace) -> str:
    """Describes what does not depend on the strategy: size, FLOPs, time and cost."""
    with torch.device("meta"):
        model = GPT(config)
    peak = peak_flops(args.gpu)
    assert peak is not None, f"{args.gpu} is missing from PEAK_TFLOPS"
    flops = model.flops_per_token(config.sequence_length) * config.total_batch_size
    seconds = flops / (args.gpus * peak * args.mfu)
    hours = seconds * config.num_iterations / 3600
    tokens = config.num_iterations * config.total_batch_size
    cost = f", {hours * args.gpus * args.price:,.0f} for {args.price:g} per GPU hour" if args.price else ""
    size, usable = capacity(args) / 1e9, usable_bytes(capacity(args)) / 1e9
    return (
        f"{model.num_params():,} parameters on {args.gpus} × {args.gpu}, {size:g} GB each, {usable:.1f} of them"
        f" usable (less {FRAGMENTATION:.0%} for fragmentation, {CONTEXT_BYTES / 1e9:g} for the CUDA context and NCCL)\n"
        f"{config.total_batch_size:,} tokens and {flops:.3g} FLOPs per step; {config.num_iterations:,} steps,"
        f" {tokens / 1e9:.1f} billion tokens\n"
        f"at an MFU of {args.mfu:.0%} of {peak / 1e12:g} TFLOP/s: {seconds:.3g} s per step,"
        f" {config.total_batch_size / seconds:,.0f} tokens/s, {hours / 24:.3g} days,"
        f" {hours * args.gpus:,.0f} GPU hours{cost}"
    )


def parse_flags(flags: list[str]) -> dict[str, str]:
    """Returns the flags of a command line by name, from `--name=value`, `--name value`, or `--name` for 1."""
    found, last = {}, ""
    for word in flags:
        if word.startswith("--"):
            last, _, value = word[2:].partition("=")
            found[last] = value if "=" in word else "1"
        else:
            found[last] = word
    return found


def command(config: Config, base: Config, flags: list[str], args: argparse.Namespace) -> str:
    """Returns the command line of a setting: the flags that were given, and those that the setting changes."""
    launch = f"torchrun --standalone --nproc_per_node={args.gpus}" if args.gpus > 1 else "python"
    if args.gpus > args.gpus_per_node:
        launch = f"torchrun --nnodes={args.gpus // args.gpus_per_node} --nproc_per_node={args.gpus_per_node}"
        launch += " --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    changed = {}
    for name in (*CHOICES, "dtype", "residual_dtype", "num_iterations"):
        value = getattr(config, name)
        if value != getattr(base, name):
            changed[name] = str(int(value) if isinstance(value, bool) else value)
    return (
        f"{launch} train_gpt.py {shlex.join(f'--{k}={v}' for k, v in (parse_flags(flags) | changed).items())}".rstrip()
    )


def recommendation(best: Setting, base: Config, flags: list[str], args: argparse.Namespace) -> str:
    """Describes the best setting, with notes and its command line."""
    c, steps = best.config, micro_steps(best.config, args.gpus)
    host = f"; {best.memory.host * min(args.gpus, args.gpus_per_node) / 1e9:.0f} GB of host memory per node"
    notes = []
    if c.activation_checkpointing == "block":
        notes.append("every forward pass is computed twice; a third more work lowers the MFU")
    if c.cpu_offload:
        notes.append("the optimizer runs on the CPU, which is slow")
    if args.gpus > args.gpus_per_node:
        notes.append("run it on every node; HOST is the first node; scripts/launch/ has scripts for SLURM and restarts")
    if c.lora_rank and c.init_from == "scratch":
        notes.append("add --init_from: adapters need a pretrained model")
    if c.dtype != base.dtype:
        notes.append(f"{args.gpu} has no bfloat16")
    if (args.gpu.split()[0] in OLD_GPUS or c.dtype == "float32") and c.n_kv_head != c.n_head:
        notes.append("grouped-query attention has no fused kernel here, so T × T scores need additional memory")
    return (
        f"recommended: stage {c.zero_stage}"
        + (f" × {c.replicas} replicas" if c.replicas > 1 else "")
        + f", {c.batch_size} × {c.sequence_length} tokens × {steps} micro-step{'s' * (steps > 1)},"
        f" {best.memory.peak / 1e9:.1f} GB at the peak ({best.memory.peak_at})"
        + (host if c.cpu_offload else "")
        + "".join(f"\n({note})" for note in notes)
        + f"\n{command(c, base, flags, args)}"
    )


def suggestions(config: Config, given: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Returns changes that make the run fit: fewer restrictions, more GPUs, larger GPUs, shorter sequences."""

    def fits(config: Config = config, given: dict[str, Any] = given, **changes: Any) -> bool:
        changed = argparse.Namespace(**(vars(args) | changes))
        rows, rest = divmod(config.total_batch_size, config.sequence_length * changed.gpus)
        replicas = given.get("replicas", 1) if given else 1
        if rest or not rows or changed.gpus % replicas:
            return False
        size = {"batch_size": math.gcd(rows, config.batch_size)}
        return recommend(explore(config.model_copy(update=size), given, changed), changed) is not None

    found = []
    if given and fits(given={}):
        found.append(f"leaving out {', '.join('--' + name for name in given)}")
    found += [f"--gpus={n}" for n in (args.gpus * 2**k for k in range(1, 11)) if fits(gpus=n)][:1]
    larger = sorted(
        (gb, name) for name, gb in GPU_MEMORY_GB.items() if gb > (args.memory_gb or GPU_MEMORY_GB[args.gpu])
    )
    found += [f"--gpu={shlex.quote(name)}" for _, name in larger if fits(gpu=name, memory_gb=None)][:1]
    shorter = (config.sequence_length // 2**k for k in range(1, 6))
    for length in shorter:
        if length >= 128 and fits(config.model_copy(update={"sequence_length": length})):
            return [*found, f"--sequence_length={length}"]
    return found


def main(args: argparse.Namespace, flags: list[str]) -> None:
    base = load_config(flags, args.gpus, open_pretrained, tokenizer_size)
    if not base.flash:
        raise UserError("--flash=0: its T × T scores are not part of the plan; use --flash=1")
    if base.num_epochs and not args.tokens:
        raise UserError("--num_epochs: the plan does not read the shards; give --tokens, or --num_iterations instead")
    changes: dict[str, Any] = {}
    if args.tokens:
        changes["num_iterations"] = math.ceil(args.tokens / base.total_batch_size)
    if args.gpu.split()[0] in OLD_GPUS and base.dtype == "bfloat16":
        changes |= {"dtype": "float16", "residual_dtype": "float32"}
    config = base.model_copy(update=changes)
    given = {name: getattr(config, name) for name in CHOICES if name in parse_flags(flags)}
    if not config.batch_size:
        given.pop("batch_size", None)
        config = config.model_copy(update={"batch_size": fitting_batch_size(config, args.gpus, capacity(args))})
    found = explore(config, given, args)
    settings = table([cheapest_reduction(group) for group in found], args.gpus, args.markdown)
    if args.markdown:
        print(settings)
        return
    print(expectation(config, args))
    print(f"\nGB on the fullest rank with {config.batch_size} × {config.sequence_length} tokens in a micro-step:")
    print(f"{settings}\n")
    best = recommend(found, args)
    if best is None:
        least = min((s for group in found for s in group), key=lambda s: s.memory.peak)
        alternatives = suggestions(config, given, args) or ["a smaller model"]
        raise UserError(
            f"nothing fits {args.gpus} × {args.gpu} with {usable_bytes(capacity(args)) / 1e9:.1f} usable GB;"
            f" the smallest plan needs {least.memory.peak / 1e9:.1f} GB. Try: {'; '.join(alternatives)}"
        )
    print(recommendation(best, base, flags, args))


if __name__ == "__main__":
    run_command(lambda: main(*PARSED))
