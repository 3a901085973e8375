"""AdamW with GPT-2's habits, and its state keyed by parameter name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from cfg.config import Config


def make_optimizer(model: nn.Module, config: Config, world_size: int) -> tuple[Optimizer, str]:
    """AdamW (Loshchilov and Hutter 2019) and a line that describes it.

    Weight decay acts on parameters of two or more dimensions only: matrices and embeddings, not
    biases and norms. Fused into one kernel, which torch has on CPU, CUDA and MPS. In stage 1 each rank
    keeps the moments of some parameters, steps those, and broadcasts them.
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
    optimizer: Optimizer
    if config.zero_stage == 1 and world_size > 1:
        # As views of one buffer per rank, parameters go out in one broadcast per rank.
        optimizer = ZeroRedundancyOptimizer(groups, AdamW, parameters_as_bucket_view=True, **settings)
    else:
        optimizer = AdamW(groups, **settings)
    line = (
        f"AdamW (fused): {sum(p.numel() for p in matrices):,} parameters decayed"
        f" by {config.weight_decay}, {sum(p.numel() for p in vectors):,} not"
    )
    return optimizer, line


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def named_states(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state that this rank holds, as `{parameter name}/{state name}` → tensor.

    Empty before the first step. The tensors are the optimizer's own; those of a sharded parameter are DTensors.
    """
    own = _own(optimizer)
    names = _names(own, model)
    state = own.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def make_states(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """As `named_states`, after giving an optimizer that has not stepped yet a state of zeros, for a load to fill."""
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
    # load_state_dict puts each moment on its parameter's device, and `step` where fused wants it (pytorch#124133).
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})
    return named_states(optimizer, model)


def forget_states(optimizer: Optimizer) -> None:
    """Makes the optimizer one that has not stepped yet."""
    _own(optimizer).state.clear()


def _own(optimizer: Optimizer) -> Optimizer:
    """The optimizer of this rank's partition in stage 1, otherwise the optimizer itself."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Parameter names in the optimizer's own order."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
