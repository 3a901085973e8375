"""AdamW with GPT-2's habits, and its state keyed by parameter name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cfg.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> tuple[Optimizer, str]:
    """AdamW (Loshchilov and Hutter 2019) and a line that describes it.

    Weight decay acts on parameters of two or more dimensions only: matrices and embeddings, not
    biases and norms. Fused into one kernel, which torch has on CPU, CUDA and MPS.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    line = (
        f"AdamW (fused): {sum(p.numel() for p in matrices):,} parameters decayed"
        f" by {config.weight_decay}, {sum(p.numel() for p in vectors):,} not"
    )
    return optimizer, line


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _names(optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Parameter names in the optimizer's own order."""
    name_of = {id(p): name for name, p in named_parameters}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `{parameter name}/{state name}` → tensor, for any strategy to read."""
    names = _names(optimizer, model.named_parameters())
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises KeyError if a parameter has no state.

    None at all is that of an optimizer that has not stepped yet. Hyper-parameters are not state: they
    come from the flags of this run.
    """
    if not tensors:
        return
    names = _names(optimizer, model.named_parameters())
    entries: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, state_name = key.rsplit("/", 1)
        entries.setdefault(name, {})[state_name] = tensor
    state = {i: entries[name] for i, name in enumerate(names)}
    # load_state_dict puts each moment on its parameter's device, and `step` where fused wants it.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
