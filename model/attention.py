"""Causal self-attention, with grouped-query heads, rotary positions and QK-norm as switches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfg.config import ModelConfig
from model.layers import apply_rotary

Rotary = tuple[Tensor, Tensor]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before.

    `c_attn` holds query, key and value in that order. With `n_kv_head < n_head` each key/value head
    serves n_head / n_kv_head query heads (GQA, Ainslie et al. 2023). QK-norm is an RMSNorm on each
    query and key head before the rotation (Henry et al. 2020; placed as in Qwen3).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.flash = config.flash
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        sizes = [self.n_head * self.head_dim] + [self.n_kv_head * self.head_dim] * 2
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(sizes, dim=-1))
        if self.qk_norm:  # q (B, H, T, D), k (B, H_kv, T, D); in fp32, the dtype of the norms' weights
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # attention wants one dtype
        dropout = self.dropout if self.training else 0.0
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=self.n_kv_head != self.n_head
            )
        else:
            y = masked_softmax_attention(q, k, v, dropout)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def masked_softmax_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(QKᵀ/√D, causal) V written out, softmax in fp32. Shapes as in the class; returns (B, H, T, D)."""
    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    future = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return F.dropout(weights, dropout).to(v.dtype) @ v
