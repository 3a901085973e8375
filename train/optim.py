"""AdamW as GPT-2 uses it, its state keyed by parameter name, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from cfg.config import Config


def make_optimizer(model: nn.Module, config: Config, world_size: int) -> Optimizer:
    """Returns AdamW (Loshchilov and Hutter 2019), fused into one kernel.

    Weight decay acts on parameters of two or more dimensions: matrices and embeddings, not biases and norms. In
    stage 1 each rank keeps the moments of some parameters, updates those, and broadcasts them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
        "fused": True,
    }
    if config.zero_stage == 1 and world_size > 1:
        # As views of one buffer per rank, parameters are sent in one broadcast per rank.
        return ZeroRedundancyOptimizer(groups, AdamW, parameters_as_bucket_view=True, **settings)
    return AdamW(groups, **settings)


def describe(optimizer: Optimizer, config: Config) -> str:
    """Returns the banner's line about the optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    matrices = sum(p.numel() for p in parameters if p.dim() >= 2)
    vectors = sum(p.numel() for p in parameters if p.dim() < 2)
    return f"AdamW (fused): {matrices:,} parameters decayed by {config.weight_decay}, {vectors:,} not"


def learning_rate(step: int, config: Config) -> float:
    """Returns the learning rate of update number `step`, counted from 1 to --num_iterations.

    It is a pure function of the step, so no scheduler state has to be saved. Linear warm-up over `warmup_iters`
    updates, then `schedule` from the peak down to the floor `learning_rate_decay_frac * learning_rate`, which the last
    update reaches: cosine (Loshchilov and Hutter 2017), linear, constant (no floor), or wsd (Hu et al. 2024: constant,
    then linear over the last `cooldown_frac` of the run).
    """
    c, num_iterations = config, config.num_iterations
    peak, floor = c.learning_rate, c.learning_rate * c.learning_rate_decay_frac
    if step <= c.warmup_iters:
        return peak * step / c.warmup_iters
    if c.schedule == "constant":
        return peak
    start = float(c.warmup_iters)
    if c.schedule == "wsd":
        start = max(start, num_iterations * (1 - c.cooldown_frac))
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / (num_iterations - start)) if num_iterations > start else 1.0
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if c.schedule == "cosine" else 1 - progress
    return floor + remaining * (peak - floor)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def named_states(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Returns the optimizer state that this rank holds, as `{parameter name}/{state name}` → tensor.

    It is empty before the first step. The tensors are not copies; for a sharded parameter they are DTensors.
    """
    own = _own(optimizer)
    names = _names(own, model)
    state = own.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def make_states(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Fills the optimizer with zero states, into which a checkpoint can be loaded, and returns `named_states`."""
    own = _own(optimizer)
    params = [p for group in own.param_groups for p in group["params"]]
    state = {
        i: {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        for i, p in enumerate(params)
    }
    # load_state_dict moves each moment to its parameter's device, and `step` where fused AdamW needs it
    # (pytorch#124133).
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})
    return named_states(optimizer, model)


def forget_states(optimizer: Optimizer) -> None:
    """Drops all optimizer state."""
    _own(optimizer).state.clear()


def _own(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer of this rank's partition in stage 1, otherwise the optimizer itself."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns the parameters' names in the optimizer's order."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
