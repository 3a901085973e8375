"""The decoder: GPT-2 by default; switches turn it into a Llama or a modern small GPT.

Parameter names are GPT-2's: wte, wpe, h.0.attn.c_attn, ... ln_f.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cfg.flags import ModelConfig
from model.attention import CausalSelfAttention, Mask, Rotary, UpdateCache, document_mask
from model.kv_cache import KVCache
from model.layers import MLP, make_norm, rotary_table
from model.lora import VOCABULARY, adapter_value, is_adapter
from model.loss import IGNORE_INDEX, ChunkLoss, chunk_loss_and_grad, linear_cross_entropy, token_losses

INIT_STD = 0.02  # GPT-2's
FLEX_TILE = 128  # FlexAttention skips whole tiles: shorter rows have none to skip, and use its kernel for decoding

# What selective activation checkpointing saves: most of a block's arithmetic for a part of its memory.
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def save_products_and_attention(rank: int = 0) -> Any:
    """Returns contexts for `checkpoint` that save matrix products and attention (Korthikanti et al. 2022).

    The outputs of LoRA adapters of this `rank` (0: none) are as large as those of the matrices, but cost little to
    recompute.
    """
    return create_selective_checkpoint_contexts(_policy(PRODUCTS | ATTENTION, rank))


def save_products(rank: int = 0) -> Any:
    """Returns contexts for `checkpoint` that save matrix products only, for training with dropout.

    Attention draws dropout inside its kernel. If its output were saved and not recomputed, the RNG would not advance,
    and later dropouts would differ between forward and recompute.
    """
    return create_selective_checkpoint_contexts(_policy(PRODUCTS, rank))


def _policy(saved: set[Any], rank: int) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        adapter = rank and op is torch.ops.aten.mm.default and args[1].shape[0] == rank  # low (N, rank) times Bᵀ
        return CheckpointPolicy.MUST_SAVE if op in saved and not adapter else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `activation_checkpointing` says what the backward pass recomputes: nothing ("none"), the whole block ("block"), or
    everything but matrix products and attention ("selective").
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.activation_checkpointing = "none"
        self.lora_rank = 0

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Mask | None = None, update_cache: UpdateCache | None = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        # Here and not in a wrapper: parameter names stay clean, and blocks are compiled and sharded with it inside.
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self.residual(x, rotary, mask, update_cache)
        contexts = save_products if self.attn.dropout else save_products_and_attention
        options = (
            {"context_fn": partial(contexts, self.lora_rank)} if self.activation_checkpointing == "selective" else {}
        )
        return checkpoint(self.residual, x, rotary, mask, use_reentrant=False, **options)

    def residual(
        self, x: Tensor, rotary: Rotary | None, mask: Mask | None, update_cache: UpdateCache | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, mask, update_cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer.

    With tied embeddings the output head is `wte.weight` and there is no `lm_head`: the optimizer, the checkpoint and
    sharding see one parameter under one name.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.residual_dtype = torch.float32
        self.chunk_loss: ChunkLoss = chunk_loss_and_grad
        self.flex = False  # use FlexAttention for document masks; only if the blocks are compiled
        padded = -(-config.vocab_size // config.vocab_pad) * config.vocab_pad
        self.wte = nn.Embedding(padded, config.n_embd)
        self.ln_emb = make_norm(config, config.n_embd) if config.embedding_norm else None
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.positions == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, padded, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output head, (V_padded, C)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns the final normalised hidden states (B, T, C) of token ids (B, T).

        `positions` (B, T) are the positions of the tokens within their documents, from 0 on and below T: attention
        then stays within documents. Without them a row is one document. A `mask` (B or 1, 1, T, T), bool, replaces the
        mask that follows from the positions. With a `cache` the ids follow the tokens in it and are added to it, at
        its next positions or at `positions`, which start earlier in shorter rows. Raises ValueError if the ids are not
        (B, T), do not fit into the position table or the cache, or the positions have another shape.
        """
        if idx.dim() != 2:
            raise ValueError(f"token ids must be (batch, time), not {tuple(idx.shape)}")
        if positions is not None and positions.shape != idx.shape:
            raise ValueError(f"positions are {tuple(positions.shape)}, token ids {tuple(idx.shape)}")
        start = cache.used if cache is not None else 0
        x, rotary = self.embed(idx, start, positions, check=mask is None)
        attention_mask = self.attention_mask(idx, positions, mask, cache)
        for i, block in enumerate(self.h):
            x = block(x, rotary, attention_mask, None if cache is None else partial(cache.add, i))
        return self.ln_f(x)

    def attention_mask(
        self, idx: Tensor, positions: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> Mask | None:
        """Returns the attention mask, or None for plain causal attention. Arguments: see `hidden`."""
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
        if positions is None and window:  # FlexAttention needs a row of positions for each row of the batch
            positions = torch.arange(T, device=idx.device).expand(len(idx) if flex else 1, T)
        return None if positions is None else document_mask(positions, flex, window)

    def embed(self, idx: Tensor, start: int, positions: Tensor | None, check: bool) -> tuple[Tensor, Rotary | None]:
        """Returns the residual stream (B, T, C) before the first block, and the angles of rotary positions.

        Positions count from `start` unless given. `check`: raise ValueError if start + T exceeds the position table.
        """
        end, shared = start + idx.size(1), positions is None
        positions = torch.arange(start, end, device=idx.device) if positions is None else positions
        x = self.wte(idx).to(self.residual_dtype)  # by default fp32, also where FSDP gathers weights in 16 bits
        if self.ln_emb is not None:
            x = self.ln_emb(x).to(x.dtype)  # autocast computes norms in fp32
        rotary = None
        if self.wpe is not None:
            if check and end > self.wpe.num_embeddings:
                raise ValueError(f"{end} tokens, but the position table has {self.wpe.num_embeddings} rows")
            x = x + self.wpe(positions).to(x.dtype)
        else:
            cos, sin = rotary_table(positions, self.config)
            rotary = (cos, sin) if shared else (cos[:, None], sin[:, None])  # (T, D/2), or (B, 1, T, D/2)
        return self.drop(x), rotary

    def loss(self, idx: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the summed loss in nats and the number of targets, for ids and targets (B, T)."""
        x = self.hidden(idx, positions)
        c = self.config
        flat = x.flatten(0, 1), self.head_weight, targets.flatten()
        return linear_cross_entropy(*flat, c.vocab_size, c.logit_softcap, chunk_loss=self.chunk_loss)

    def scores(
        self, idx: Tensor, targets: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss in nats of each valid target, in order, and whether it is the likeliest token: (N,) each.

        Computes no gradient. Only the positions of valid targets go through the output head.
        """
        x = self.hidden(idx, positions, mask)
        valid = targets != IGNORE_INDEX
        c = self.config
        return token_losses(x[valid], self.head_weight, targets[valid], c.vocab_size, c.logit_softcap)

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
        """Returns the loss if there are targets, otherwise the logits.

        The loss is (sum, number of targets), or with `each` the loss of every target, see `scores`. Logits are
        (B, T, vocab_size), or (B, vocab_size) if `last` (B,) gives one position of each row. `positions`, `mask` and
        `cache`: see `hidden`. Losses and logits go through this one method because FSDP gathers weights around it.
        """
        if targets is not None:
            return self.scores(idx, targets, positions, mask) if each else self.loss(idx, targets, positions)
        x = self.hidden(idx, positions, mask, cache)
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last]
        head = self.head_weight
        if not torch.is_autocast_enabled(x.device.type):
            head = head.to(x.dtype)  # a head that is frozen may be in bfloat16
        # The padding is sliced off after the product, so that the matrix keeps its aligned shape.
        logits = nn.functional.linear(x, head)[..., : self.config.vocab_size]
        if c := self.config.logit_softcap:
            logits = c * torch.tanh(logits / c)
        return logits

    def sizes(self) -> dict[str, int]:
        """Returns the number of elements of each parameter, without vocabulary padding."""
        padded = self.wte.num_embeddings
        return {
            name: p.numel() // padded * self.config.vocab_size if name in VOCABULARY else p.numel()
            for name, p in self.named_parameters()
        }

    def num_params(self, trained: bool = False) -> int:
        """Returns the number of parameters: tied weights once, without vocabulary padding (GPT-2 124M: 124,439,808).

        With `trained`, of those that are not frozen.
        """
        sizes = self.sizes()
        return sum(sizes[name] for name, p in self.named_parameters() if p.requires_grad or not trained)

    def flops_per_token(self, sequence_length: int) -> int:
        """Returns the training FLOPs (forward and backward) per token: 6·N + 4·F + 12·L·H·Q·T.

        PaLM (Chowdhery et al. 2022), appendix B. N counts the trained parameters that are multiplied: not the embedding
        and position look-ups, but the output head even when tied. F counts the frozen ones, for which no gradient is
        computed. L layers, H heads of size Q, T attended positions (at most a sliding window), without halving for the
        causal mask. Recomputation does not count.
        """
        c, sizes = self.config, self.sizes()
        lookups = ("wpe.weight",) if self.lm_head is None else ("wpe.weight", "wte.weight")
        flops = {name: (6 if p.requires_grad else 4) * sizes[name] for name, p in self.named_parameters()}
        seen = min(sequence_length, c.sliding_window or sequence_length)
        products = sum(n for name, n in flops.items() if name not in lookups)
        return products + 12 * c.n_layer * c.n_head * c.head_size * seen


def parameter_shapes(config: ModelConfig, padded: bool = False) -> dict[str, torch.Size]:
    """Returns the shape of every parameter by name, without adapters. `padded`: with vocabulary padding."""
    with torch.device("meta"):
        model = GPT(config if padded else config.model_copy(update={"vocab_pad": 1}))
        return {n: p.shape for n, p in model.named_parameters()}


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Returns the initial value of one parameter, fp32 on the CPU.

    It depends on seed, name and shape only: each parameter has its own generator, so ranks, sharding and the order of
    construction do not change it. The distribution is GPT-2's: N(0, 0.02²) for weights, scaled by 1/√(2·n_layer) at
    the end of a residual branch; biases 0; norms 1. --embedding_std, --head_init and --zero_init change it. LoRA
    adapters: see `adapter_value`.
    """
    if is_adapter(name):
        return adapter_value(name, shape, seed)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    ends_branch = name.endswith("c_proj.weight")
    if (ends_branch and config.zero_init) or (name == "lm_head.weight" and config.head_init == "zero"):
        return torch.zeros(shape)
    std = config.embedding_std if name == "wte.weight" else INIT_STD
    if ends_branch:
        std /= (2 * config.n_layer) ** 0.5
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


InitialValue = Callable[[str, torch.Size], Tensor]  # name and shape of a parameter -> its value


def random_values(config: ModelConfig, seed: int) -> InitialValue:
    """Returns a function of name and shape that draws the initial value."""
    return lambda name, shape: initial_value(name, shape, config, seed)


@torch.no_grad()
def init_weights(
    model: GPT, value: InitialValue | int, assign: Callable[[Tensor, Tensor], Any] = torch.Tensor.copy_
) -> None:
    """Fills the parameters one by one with `value(name, shape)`; an int is the seed of random values.

    `assign(parameter, value)` may copy only its shard.
    """
    value = random_values(model.config, value) if isinstance(value, int) else value
    for name, parameter in model.named_parameters():
        assign(parameter, value(name, parameter.shape))
