"""The decoder: GPT-2 by default, the Llama family and the modern small-GPT choices by switches.

Parameter names are GPT-2's (wte, wpe, h.0.attn.c_attn, ... ln_f), so that a checkpoint reads like one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cfg.config import ModelConfig
from model.attention import CausalSelfAttention, Mask, Remember, Rotary, document_mask
from model.kv_cache import KVCache
from model.layers import MLP, make_norm, rotary_table
from model.loss import IGNORE_INDEX, ChunkLoss, chunk_loss_and_grad, linear_cross_entropy, token_losses

VOCABULARY = ("wte.weight", "lm_head.weight")  # the parameters that have a row for each token
INIT_STD = 0.02  # GPT-2's
FLEX_TILE = 128  # FlexAttention's: shorter rows leave nothing to skip, and go through a kernel meant for decoding


# What selective recomputation keeps: nearly all of a block's arithmetic, and a part of its memory.
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def keep_products() -> Any:
    """Contexts for `checkpoint` under which matrix products and attention are kept (Korthikanti et al. 2022)."""
    return create_selective_checkpoint_contexts(_policy(PRODUCTS | ATTENTION))


def keep_products_only() -> Any:
    """The same without attention, for training with dropout.

    Attention's kernels draw their own: what is kept does not run again, the generator would stay behind, and the
    dropouts after it would draw other masks in the backward pass than in the forward pass.
    """
    return create_selective_checkpoint_contexts(_policy(PRODUCTS))


def _policy(kept: set[Any]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `recompute` is what the backward pass computes again instead of having kept it: nothing ("none"), everything
    within the block ("block"), or everything but matrix products and attention ("selective").
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.recompute = "none"

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Mask | None = None, remember: Remember | None = None
    ) -> Tensor:  # (B, T, C) -> same
        # Here rather than in a wrapper: parameter names stay clean, and compiling or sharding a block comes on top.
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.residual(x, rotary, mask, remember)
        kept = keep_products_only if self.attn.dropout else keep_products
        keep = {"context_fn": kept} if self.recompute == "selective" else {}
        return checkpoint(self.residual, x, rotary, mask, use_reentrant=False, **keep)

    def residual(self, x: Tensor, rotary: Rotary | None, mask: Mask | None, remember: Remember | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, mask, remember)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer.

    With tied embeddings the output head *is* `wte.weight` and there is no `lm_head`: one parameter
    under one name for the optimizer, the checkpoint and any sharding.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.residual_dtype = torch.float32
        self.chunk_loss: ChunkLoss = chunk_loss_and_grad
        self.flex = False  # documents are kept apart by FlexAttention: only where the blocks are compiled
        padded = -(-config.vocab_size // config.vocab_pad) * config.vocab_pad
        self.wte = nn.Embedding(padded, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.positions == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, padded, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V_padded, C)"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Token ids (B, T) to the final normalised hidden states (B, T, C).

        `positions` (B, T) of each token in its document, from 0 on and below T, keep attention within documents;
        without them a row is one document. With a `mask` (B or 1, 1, T, T), bool, it alone says who sees whom, and
        positions are only that. With a `cache` the ids go on from what is in it, and are added to it: at its next
        positions, or at `positions`, which lie before those in rows that are shorter. Raises ValueError if the ids are
        not a (B, T) batch, do not fit into the position table or the cache, or the positions have another shape.
        """
        if idx.dim() != 2:
            raise ValueError(f"token ids must be (batch, time), not {tuple(idx.shape)}")
        if positions is not None and positions.shape != idx.shape:
            raise ValueError(f"positions are {tuple(positions.shape)}, token ids {tuple(idx.shape)}")
        start = cache.used if cache is not None else 0
        x, rotary = self.embed(idx, start, positions, check=mask is None)
        who = self.visible(idx, positions, mask, cache)
        for i, block in enumerate(self.h):
            x = block(x, rotary, who, None if cache is None else partial(cache.add, i))
        return self.ln_f(x)

    def visible(self, idx: Tensor, positions: Tensor | None, mask: Tensor | None, cache: KVCache | None) -> Mask | None:
        """Who sees whom, arguments as of `hidden`; None: each token all before it."""
        T, window = idx.size(1), self.config.sliding_window
        if cache is not None:
            return cache.advance(T, positions, idx.device, window)
        if window >= T:
            window = 0
        if mask is not None:
            if window:
                where = torch.arange(T, device=idx.device)[None] if positions is None else positions
                mask = mask & (where[:, None, :, None] - where[:, None, None, :] < window)
            return mask
        flex = self.flex and T >= FLEX_TILE
        if positions is None and window:  # FlexAttention looks up a row of its own for each row of the batch
            positions = torch.arange(T, device=idx.device).expand(len(idx) if flex else 1, T)
        return None if positions is None else document_mask(positions, flex, window)

    def embed(self, idx: Tensor, start: int, positions: Tensor | None, check: bool) -> tuple[Tensor, Rotary | None]:
        """Residual stream (B, T, C) at the first block, and the rotary angles if positions are rotary.

        Positions are `start` and on, unless given. `check`: they are below start + T, which must fit into the table.
        """
        end = start + idx.size(1)
        places = torch.arange(start, end, device=idx.device) if positions is None else positions
        x = self.wte(idx).to(self.residual_dtype)  # by default fp32, even where FSDP gathers weights in 16 bits
        rotary = None
        if self.wpe is not None:
            if check and end > self.wpe.num_embeddings:
                raise ValueError(f"{end} tokens, but the position table has {self.wpe.num_embeddings} rows")
            x = x + self.wpe(places).to(x.dtype)
        else:
            cos, sin = rotary_table(places, self.config)
            rotary = (cos, sin) if positions is None else (cos[:, None], sin[:, None])  # (B, 1, T, D/2), for all heads
        return self.drop(x), rotary

    def loss(self, idx: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summed loss in nats and number of targets, for ids and targets (B, T); see `linear_cross_entropy`."""
        x = self.hidden(idx, positions)
        c = self.config
        flat = x.flatten(0, 1), self.head_weight, targets.flatten()
        return linear_cross_entropy(*flat, c.vocab_size, c.logit_softcap, chunk_loss=self.chunk_loss)

    def scores(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss in nats of each target that counts, in order, and whether it is the likeliest token: (N,) each.

        Without gradient. Other positions than these never meet the output head.
        """
        x = self.hidden(idx, positions, mask)
        chosen = targets != IGNORE_INDEX
        c = self.config
        return token_losses(x[chosen], self.head_weight, targets[chosen], c.vocab_size, c.logit_softcap)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last: Tensor | None = None,
        each: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With targets: (loss sum, target count), or, of `each` one, what `scores` gives. Without: logits.

        These are (B, T, vocab_size), or (B, vocab_size) where `last` (B,) names the one position of a row they are
        wanted of. `positions`, `mask` and `cache` as in `hidden`. All goes through this one call, since it is where
        FSDP gathers weights.
        """
        if targets is not None:
            return self.scores(idx, targets, positions, mask) if each else self.loss(idx, targets, positions)
        x = self.hidden(idx, positions, mask, cache)
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last]
        # Slicing after the product keeps the matrix shape aligned; the padding is dropped here.
        logits = nn.functional.linear(x, self.head_weight)[..., : self.config.vocab_size]
        if c := self.config.logit_softcap:
            logits = c * torch.tanh(logits / c)
        return logits

    def num_params(self) -> int:
        """Parameters of the true model: tied weights once, vocabulary padding left out (GPT-2 124M: 124,439,808)."""
        padding = (self.wte.num_embeddings - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding * (1 if self.lm_head is None else 2)

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs (forward and backward) per token: 6·N + 12·L·H·Q·T.

        PaLM (Chowdhery et al. 2022), appendix B: N counts the parameters that are multiplied, so not
        the embedding and position look-ups but the output head even when tied; L layers, H heads of
        size Q, and T positions attended to (those of a sliding window), without halving for the causal
        mask. What is recomputed does not count, so this is the model's work, not the machine's.
        """
        c = self.config
        lookups = c.n_embd * (c.n_positions if self.wpe is not None else 0)
        lookups += c.n_embd * c.vocab_size * (0 if self.lm_head is None else 1)
        seen = min(sequence_length, c.sliding_window or sequence_length)
        return 6 * (self.num_params() - lookups) + 12 * c.n_layer * c.n_head * c.head_size * seen


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter's name and shape, the vocabulary without padding."""
    with torch.device("meta"):
        return {n: p.shape for n, p in GPT(config.model_copy(update={"vocab_pad": 1})).named_parameters()}


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The starting value of one parameter, fp32 on the CPU.

    A pure function of seed, name and shape: each parameter has a generator of its own, so neither
    ranks, nor sharding, nor the order of construction changes it. The distribution is GPT-2's:
    N(0, 0.02²) for weights, scaled by 1/√(2·n_layer) where a residual branch ends; biases 0; norms 1.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    ends_branch = name.endswith("c_proj.weight")
    if ends_branch and config.zero_init:
        return torch.zeros(shape)
    std = INIT_STD / (2 * config.n_layer) ** 0.5 if ends_branch else INIT_STD
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


InitialValue = Callable[[str, torch.Size], Tensor]  # of the parameter of that name and shape


def random_values(config: ModelConfig, seed: int) -> InitialValue:
    return lambda name, shape: initial_value(name, shape, config, seed)


@torch.no_grad()
def init_weights(
    model: GPT, value: InitialValue | int, assign: Callable[[Tensor, Tensor], Any] = torch.Tensor.copy_
) -> None:
    """Fills every parameter, one after the other, with its `value`; an int is the seed of random ones.

    `assign(parameter, value)` may take only its shard of it.
    """
    value = random_values(model.config, value) if isinstance(value, int) else value
    for name, parameter in model.named_parameters():
        assign(parameter, value(name, parameter.shape))
