"""The first and the last lines that a run prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from torch.optim import Optimizer

from cfg.checks import unused_rate_message, unused_rates
from cfg.config import Config
from data.fingerprint import tokenizer_in_manifest
from data.loader import Loader
from data.mixed_loader import MixedLoader
from data.shards import Shard
from train import optim
from train.disk_space import warn_of_little_room
from train.metrics import read_records
from train.parallel import ParallelModel
from train.plot import Plots
from util.device import device_name
from util.ranks import Ranks

# Measured with --cfg=shakespeare and --cfg=overfit in float32 on two cores with AVX-512.
CPU_CORE_FLOPS = 50e9


def print_banner(
    config: Config,
    ranks: Ranks,
    model: ParallelModel,
    optimizer: Optimizer,
    train_data: Loader | MixedLoader,
    val_data: Loader | None,
) -> None:
    """Prints model, hardware, batch and optimizer of a run, and warnings."""
    if not ranks.is_main:
        return
    micro_steps = config.total_batch_size // (config.batch_size * config.sequence_length * ranks.world_size)
    source = "" if config.init_from == "scratch" else f" of {config.init_from}"
    if config.lora_rank:
        trained = model.gpt.num_params(trained=True)
        source += (
            f", {trained:,} of them trained ({trained / model.gpt.num_params():.2%}, LoRA of rank {config.lora_rank})"
        )
    counted = f", {train_data.counted_tokens():,} of them counted" if train_data.has_masks else ""
    print(
        f"{model.gpt.num_params():,} parameters{source}, {config.dtype},"
        f" {ranks.world_size} × {device_name(ranks.device)}{model.strategy()}\n"
        f"{sum(shard.count for shard in train_data.shards):,} training tokens{counted};"
        f" {config.total_batch_size:,} a step = {config.batch_size} × {config.sequence_length}"
        f" × {ranks.world_size} ranks × {micro_steps} micro-steps\n"
        f"{optim.describe(optimizer, config)}"
    )
    if isinstance(train_data, MixedLoader):
        print(train_data.describe(config.num_iterations))
    found = warnings(config, ranks.device, train_data.shards, val_data.shards if val_data else [])
    if train_data.has_masks and not config.doc_mask:
        found.append("--doc_mask=0: the conversations in a window attend to each other; add --doc_mask=1")
    if ranks.device.type == "cpu":
        cores = torch.get_num_threads() * ranks.world_size
        found += cpu_warnings(config, model.gpt.flops_per_token(config.sequence_length), cores)
    for warning in filter(None, [*found, warn_of_little_room(config, model.gpt)]):
        print(f"warning: {warning}")


def warnings(config: Config, device: torch.device, train: list[Shard], val: list[Shard]) -> list[str]:
    """Returns warnings about settings that are valid but probably a mistake."""
    found = []
    if config.warmup_iters >= config.num_iterations and config.warmup_iters:
        found.append(
            f"--warmup_iters={config.warmup_iters} does not end within --num_iterations={config.num_iterations}"
        )
    unused = sorted(unused_rates(config))  # of a preset; flags have been checked
    if name := next((n for n in unused if getattr(config, n) != Config.model_fields[n].default), None):
        found.append(unused_rate_message(config, name))
    if config.dtype == "float16" and device.type == "cpu":
        found.append("float16 on a CPU is slow and meant for trying out what a GPU does; float32 is faster")
    if config.lora_rank and config.resize_embeddings and not config.lora_embeddings:
        found.append(
            "--resize_embeddings=1: the embeddings of new tokens are not trained, and stay the mean of others; add"
            " --lora_embeddings=1"
        )
    if both := {s.path.resolve() for s in train} & {s.path.resolve() for s in val}:
        found.append(f"{min(both)} is used for both training and validation")
    for folder in dict.fromkeys(s.path.parent for s in train):
        largest = max(s.largest_id for s in train if s.path.parent == folder)
        if config.vocab_size > 2 * (largest + 1) and tokenizer_in_manifest(folder) is None:
            found.append(
                f"--vocab_size={config.vocab_size}, but the largest token id found in {folder} is {largest}; were these"
                f" shards made with --tokenizer={config.tokenizer}?"
            )
    if config.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        found.append("this GPU only emulates bfloat16; --dtype=float16 is faster")
    return found


def cpu_warnings(config: Config, flops_per_token: int, cores: int) -> list[str]:
    """Returns warnings about a run that takes long on a CPU. The time is FLOPs / (cores × CPU_CORE_FLOPS)."""
    found = []
    flops = config.num_iterations * config.total_batch_size * flops_per_token
    hours = flops / (cores * CPU_CORE_FLOPS) / 3600
    if hours >= 1:
        time = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
        found.append(
            f"{config.num_iterations:,} steps would take about {time} on this CPU (estimate:"
            f" {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s per core × {cores}); use a GPU, or a small model such as"
            f" --cfg=shakespeare"
        )
    if config.compile:
        found.append("--compile on a CPU: the first step takes up to three minutes longer; --compile=0 starts at once")
    return found


def print_summary(config: Config, ranks: Ranks, first_step: int, step: int, skipped: int, reason: str) -> None:
    """Prints what the run did and how to resume it, and draws its plots. `reason` is why it stopped early, or ""."""
    if not ranks.is_main:
        return
    output_dir, last = Path(config.output_dir), config.num_iterations
    if reason:
        print(f"stopped by {reason} after step {step} of {last}; run the same command again to resume")
    elif first_step > last:
        print(f"nothing left to do: the checkpoint is at step {first_step - 1} of --num_iterations={last}")
    losses = [r["loss"] for r in read_records(output_dir / "metrics.jsonl") if isinstance(r["loss"], int | float)]
    if losses:
        also = f", {skipped} skipped" if skipped else ""
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps{also}")
        print(f"report: python scripts/report.py {shlex.quote(config.output_dir)} (curves; takes several runs)")
    curve = Plots(config).draw()
    checkpoint = output_dir / "checkpoints" / f"step_{step:08d}"
    print(f"checkpoint: {checkpoint}" + (f", loss curve: {curve}" if curve else ""))
