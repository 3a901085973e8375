"""Causal self-attention, with grouped-query heads, rotary positions and QK-norm as switches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cfg.flags import ModelConfig
from model.layers import RMSNorm, apply_rotary

Rotary = tuple[Tensor, Tensor]
Mask: TypeAlias = Tensor | BlockMask
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # `KVCache.add` of one layer


def document_mask(positions: Tensor, flex: bool, window: int = 0) -> Mask:
    """Returns the causal mask within documents: a token attends to itself and to earlier tokens of its document.

    `positions` (B, T) count from the start of each document. With a `window` a token attends to at most that many
    tokens, itself included (Mistral 7B, Jiang et al. 2023). The mask is (B, 1, T, T) bool, query × key, True for
    attention; with `flex` a mask for FlexAttention (Dong et al. 2024), which skips empty tiles.
    """
    B, T = positions.shape
    index = torch.arange(T, device=positions.device)
    starts = index - positions
    if window:
        starts = torch.maximum(starts, index - window + 1)

    def attends(b: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return (starts[b, query] <= key) & (key <= query)

    if flex:
        return create_block_mask(attends, B, None, T, T, device=positions.device)
    return attends(torch.arange(B, device=positions.device)[:, None, None, None], None, index[:, None], index)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention, or attention under a given mask.

    `c_attn` holds query, key and value in that order. With `n_kv_head < n_head` each key/value head serves
    n_head / n_kv_head query heads (GQA, Ainslie et al. 2023). QK-norm is an RMSNorm on each query and key head before
    the rotation (Henry et al. 2020; placed as in Qwen3).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_size
        self.flash = config.flash
        self.dropout = config.dropout
        heads = self.n_head + 2 * self.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, heads * self.head_dim, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps, config.norm_weight)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps, config.norm_weight)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Mask | None = None, update_cache: UpdateCache | None = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        sizes = [self.n_head * self.head_dim] + [self.n_kv_head * self.head_dim] * 2
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(sizes, dim=-1))
        if self.qk_norm:  # q (B, H, T, D), k (B, H_kv, T, D); in fp32
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # attention kernels need one dtype
        if update_cache is not None:
            k, v = update_cache(k, v)
        causal = mask is None and T > 1  # a single token attends to all cached ones
        dropout = self.dropout if self.training else 0.0
        gqa = self.n_kv_head != self.n_head
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
        elif self.flash:
            if gqa and mask is not None and q.is_cuda:  # the CUDA kernel for masks does not support GQA
                k, v, gqa = *(t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v)), False
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=gqa)
        else:
            y = masked_softmax_attention(q, k, v, dropout, mask)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


def masked_softmax_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None) -> Tensor:
    """Returns softmax(QKᵀ/√D, mask) V, (B, H, T, D), with softmax in fp32, for q (B, H, T, D), k and v (B, H_kv, S, D).

    `mask`: see `document_mask`. None is causal: the T queries are at the last T of the S positions.
    """
    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return F.dropout(weights, dropout).to(v.dtype) @ v
