"""LoRA: low-rank adapters beside the frozen matrices of a pretrained model (Hu et al. 2021).

A matrix W (out, in) with an adapter computes y = x Wᵀ + bias + (alpha/rank) · dropout(x) Aᵀ Bᵀ, with A (rank, in) and
B (out, rank). A and B are trained in fp32. All other parameters are frozen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfg.lora import LORA_MODULES, module_sizes, parse_lora_targets
from model.loss import in_autocast_dtype

if TYPE_CHECKING:
    from cfg.flags import Config
    from model.gpt import GPT

VOCABULARY = ("wte.weight", "lm_head.weight")  # the parameters that have a row for each token
EMBEDDINGS = (*VOCABULARY, "wpe.weight")  # trained with --lora_embeddings
A, B = ".lora_a", ".lora_b"  # ends of the adapters' names


class FrozenLinear(nn.Linear):
    """A linear layer with frozen weights in any dtype. It computes in the autocast dtype, or in the dtype of x."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(in_autocast_dtype(x))

    def base(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ + bias, in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LoRALinear(FrozenLinear):
    """A frozen linear layer with an adapter."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear)
        self.scale, self.dropout = alpha / rank, dropout
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)  # once for both products
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a.to(x.dtype))
        return self.base(x) + F.linear(low * self.scale, self.lora_b.to(x.dtype))


def add_adapters(model: GPT, config: Config) -> None:
    """Adds the adapters of --lora_rank to a model on the meta device, and freezes its other parameters.

    Frozen parameters get --base_dtype. With --lora_embeddings the embeddings and an untied head stay trained, in fp32.
    """
    frozen_dtype = getattr(torch, config.base_dtype)
    for name, parameter in model.named_parameters():
        if not is_trained(name, config):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(frozen_dtype)
    targets = parse_lora_targets(config.lora_targets)
    for block in model.h:
        block.lora_rank = config.lora_rank
        for module in LORA_MODULES:
            linear = block.get_submodule(module)
            if module in targets:
                replacement = LoRALinear(linear, config.lora_rank, config.lora_alpha, config.lora_dropout)
            else:
                replacement = FrozenLinear(linear)
            block.set_submodule(module, replacement)


def is_adapter(name: str) -> bool:
    """Returns whether a parameter of this name belongs to an adapter."""
    return name.endswith((A, B))


def matrix_of(name: str) -> str:
    """Returns the name of the matrix that an adapter's parameter belongs to."""
    return f"{name.removesuffix(A).removesuffix(B)}.weight"


def is_trained(name: str, config: Config) -> bool:
    """Returns whether a parameter of this name is trained."""
    return not config.lora_rank or is_adapter(name) or (config.lora_embeddings and name in EMBEDDINGS)


def saved_names(names: Iterable[str], config: Config) -> set[str]:
    """Returns which of the model's parameters a checkpoint holds: all, or with LoRA those that its base lacks.

    These are the trained ones, and embeddings and a head that --resize_embeddings has converted.
    """
    converted = VOCABULARY if config.resize_embeddings else ()
    return {name for name in names if is_trained(name, config) or name in converted}


def adapter_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Returns the initial value of A or B, fp32 on the CPU; it depends on seed, name and shape only.

    A ~ U(-1/√in, 1/√in), and B is zero, so the adapters change nothing at first. PEFT does the same.
    """
    if name.endswith(B):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapter_shapes(config: Config) -> dict[str, torch.Size]:
    """Returns the shapes of all adapters by name."""
    found = {}
    for i in range(config.n_layer):
        for module in parse_lora_targets(config.lora_targets) if config.lora_rank else ():
            inputs, outputs = module_sizes(config)[module]
            found[f"h.{i}.{module}{A}"] = torch.Size((config.lora_rank, inputs))
            found[f"h.{i}.{module}{B}"] = torch.Size((outputs, config.lora_rank))
    return found


def merge_adapter(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns the matrix that computes what `weight` computes with its adapter: W + scale · B A, in fp32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
