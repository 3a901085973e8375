"""The feed-forward layers, the normalisation switch and the rotary position encoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfg.checks import parse_rope_scaling
from cfg.flags import ModelConfig

# Norms compute in the dtype of their input. FSDP gathers weights in 16 bits while the residual stream is fp32, and
# torch's norms refuse two dtypes or leave their fused kernels.


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016), or without parameters (as in OLMo, Groeneveld et al. 2024)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019), or without parameters (as in nanochat, Karpathy 2025)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Returns the norm of --norm: LayerNorm as in GPT-2, or RMSNorm as in Llama."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, config.norm_eps, config.norm_weight)
    return LayerNorm(width, config.norm_eps, config.norm_weight, config.bias)


class MLP(nn.Module):
    """Feed-forward: GELU (Hendrycks and Gimpel 2016), squared ReLU (So et al. 2021) or SwiGLU (Shazeer 2020).

    "gelu" is GPT-2's tanh approximation, "gelu_exact" the exact function, as in nanoGPT since May 2023. SwiGLU
    keeps gate and value in one matrix, `c_fc`: the first `mlp_hidden` rows are the gate.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        width = 2 * config.mlp_hidden if config.mlp == "swiglu" else config.mlp_hidden
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate="none" if self.kind == "gelu_exact" else "tanh")
        return self.dropout(self.c_proj(x))


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Returns the angle in radians by which each pair of a head's dimensions turns per position, (head_size/2,) fp32.

    RoFormer (Su et al. 2021): 1 / base^(2i/head_size) for pair i. With linear scaling (Chen et al. 2023) all pairs
    turn FACTOR times slower. With Llama 3.1's scaling (Grattafiori et al. 2024; formula of meta-llama/llama-models,
    models/llama3/model.py) only pairs with fewer than LOW turns within POSITIONS do; pairs with more than HIGH turns
    stay as they are, and between LOW and HIGH the factor is interpolated.
    """
    exponents = torch.arange(0, config.head_size, 2, device=device, dtype=torch.float32) / config.head_size
    frequencies = config.rope_base**-exponents
    kind, numbers = parse_rope_scaling(config.rope_scaling)
    if kind == "linear":
        return frequencies / numbers[0]
    if kind == "llama3":
        factor, low, high, positions = numbers
        turns = positions * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies
    return frequencies


def rotary_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the rotary angles of `positions`, each (*positions.shape, head_size/2), fp32.

    They are computed in each forward pass: it is little work compared with a block, and no buffer has to be sharded,
    cast or enlarged.
    """
    angles = positions.float()[..., None] * rotary_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, H, T, D) by position; cos and sin are (T, D/2) or (B, 1, T, D/2).

    Dimension i is paired with i + D/2, as in Llama's released weights.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
