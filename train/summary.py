"""The first and the last lines that a run prints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim import Optimizer

from cfg.config import Config
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
    print(
        f"{model.gpt.num_params():,} parameters{source}, {config.dtype},"
        f" {ranks.world_size} × {device_name(ranks.device)}{model.strategy()}\n"
        f"{sum(shard.count for shard in train_data.shards):,} training tokens; {config.total_batch_size:,} a step ="
        f" {config.batch_size} × {config.sequence_length} × {ranks.world_size} ranks × {micro_steps} micro-steps\n"
        f"{optim.describe(optimizer, config)}"
    )
    if isinstance(train_data, MixedLoader):
        print(train_data.describe(config.num_iterations))
    found = warnings(config, ranks.device, train_data.shards, val_data.shards if val_data else [])
    for warning in filter(None, [*found, warn_of_little_room(config, model.gpt)]):
        print(f"warning: {warning}")


def warnings(config: Config, device: torch.device, train: list[Shard], val: list[Shard]) -> list[str]:
    """Returns warnings about settings that are valid but probably a mistake."""
    found = []
    if config.warmup_iters >= config.num_iterations and config.warmup_iters:
        found.append(
            f"--warmup_iters={config.warmup_iters} does not end within --num_iterations={config.num_iterations}"
        )
    if config.dtype == "float16" and device.type == "cpu":
        found.append("float16 on a CPU is slow and meant for trying out what a GPU does; float32 is faster")
    if both := {s.path.resolve() for s in train} & {s.path.resolve() for s in val}:
        found.append(f"{min(both)} is used for both training and validation")
    if config.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        found.append("this GPU only emulates bfloat16; --dtype=float16 is faster")
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
    curve = Plots(config).draw()
    checkpoint = output_dir / "checkpoints" / f"step_{step:08d}"
    print(f"checkpoint: {checkpoint}" + (f", loss curve: {curve}" if curve else ""))
