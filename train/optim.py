"""The optimizer with its parameter groups, its state keyed by parameter name, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from cfg.config import Config
from model.gpt import INIT_STD
from train.muon import Muon, empty_state


def make_optimizer(model: nn.Module, config: Config, world_size: int) -> Optimizer:
    """Returns the optimizer of --optimizer: AdamW (Loshchilov and Hutter 2019, fused into one kernel), or Muon.

    In stage 1 each rank keeps the states of some parameters, updates those, and broadcasts them.
    """
    kind: Any = Muon if config.optimizer == "muon" else AdamW
    groups = muon_groups(model, config) if config.optimizer == "muon" else adamw_groups(model, config)
    groups = [g for g in groups if g["params"]]
    settings: dict[str, Any] = {
        "lr": peak_rate(config),
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
        "fused": True,
    }
    if config.zero_stage == 1 and world_size > 1:
        # As views of one buffer per rank, parameters are sent in one broadcast per rank.
        return ZeroRedundancyOptimizer(groups, kind, parameters_as_bucket_view=True, **settings)
    return kind(groups, **settings)


def adamw_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Returns AdamW's groups. Weight decay acts on matrices and embeddings, not on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


# Ends of parameter names, in the order of Muon's groups. The first three are the hidden matrices; "" is the rest.
MUON_GROUPS = (
    "attn.c_attn.weight",
    "mlp.c_fc.weight",
    "c_proj.weight",
    "wte.weight",
    "wpe.weight",
    "lm_head.weight",
    "",
)
HIDDEN = MUON_GROUPS[:3]


def muon_group(name: str) -> str:
    """Returns the entry of MUON_GROUPS to which a parameter belongs.

    Parameters are chosen by name: the number of dimensions misleads where parameters are flat or sharded
    (DeepSpeed#8438).
    """
    return next(end for end in MUON_GROUPS if name.endswith(end))


def muon_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Returns Muon's groups: one for each kind of hidden matrix, and AdamW groups for the other parameters.

    Each group has its learning rate relative to --matrix_lr. That of an embedding is --embedding_lr times its initial
    standard deviation: with GPT-2's 0.02, steps of 0.3 would destroy it.
    """
    c = config
    parts = {
        "attn.c_attn.weight": [heads * c.head_size for heads in (c.n_head, c.n_kv_head, c.n_kv_head)],
        "mlp.c_fc.weight": [c.mlp_hidden] * (2 if c.mlp == "swiglu" else 1),  # gate and value
        "c_proj.weight": [c.n_embd],
    }
    rates = {
        "wte.weight": c.embedding_lr * c.embedding_std,
        "wpe.weight": c.embedding_lr * INIT_STD,
        "lm_head.weight": c.head_lr,
        "": c.scalar_lr,
    }
    groups: dict[str, dict[str, Any]] = {
        end: {"params": [], "parts": parts.get(end), "relative_rate": rates.get(end, c.matrix_lr) / c.matrix_lr}
        for end in MUON_GROUPS
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[muon_group(name)]["params"].append(p)
    assert all(p.dim() < 2 for p in groups[""]["params"]), "a matrix is in no group"
    return list(groups.values())


def describe(optimizer: Optimizer, config: Config) -> str:
    """Returns the banner's line about the optimizer."""
    if config.optimizer == "muon":
        matrices = sum(p.numel() for group in optimizer.param_groups if group["parts"] for p in group["params"])
        total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        return f"Muon: {matrices:,} parameters in hidden matrices; AdamW (fused): {total - matrices:,} others"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    matrices = sum(p.numel() for p in parameters if p.dim() >= 2)
    vectors = sum(p.numel() for p in parameters if p.dim() < 2)
    return f"AdamW (fused): {matrices:,} parameters decayed by {config.weight_decay}, {vectors:,} not"


def peak_rate(config: Config) -> float:
    """Returns the peak of the schedule: the learning rate of AdamW, or of Muon's matrices."""
    return config.matrix_lr if config.optimizer == "muon" else config.learning_rate


def learning_rate(step: int, config: Config) -> float:
    """Returns the learning rate of update number `step`, counted from 1 to --num_iterations.

    It is a pure function of the step, so no scheduler state has to be saved. Linear warm-up over `warmup_iters`
    updates, then `schedule` from the peak down to the floor `learning_rate_decay_frac` times the peak, which the last
    update reaches: cosine (Loshchilov and Hutter 2017), linear, constant (no floor), or wsd (Hu et al. 2024: constant,
    then linear over the last `cooldown_frac` of the run).
    """
    c, num_iterations = config, config.num_iterations
    peak, floor = peak_rate(c), peak_rate(c) * c.learning_rate_decay_frac
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


def set_schedules(optimizer: Optimizer, step: int, config: Config) -> float:
    """Sets every group's learning rate for this step, and returns it: AdamW's, or that of Muon's matrices.

    With Muon the rates of the other groups are proportional to it. Muon's momentum rises from 0.85 to 0.95 over the
    first 300 steps, and its weight decay falls linearly to 0.
    """
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("relative_rate", 1.0)
        if group.get("parts"):
            group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)
            group["weight_decay"] = config.weight_decay * (1 - step / config.num_iterations)
    return rate


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
    states = [empty_state(p, group) for group in own.param_groups for p in group["params"]]
    state = dict(enumerate(states))
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
