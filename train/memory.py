"""How many bytes a training step takes on one rank, from the flags alone: docs/memory.md explains the parts.

The formulas follow the code's own tensors through a step. They are held against a simulation of the real code
(scripts/bench/simulate_memory.py) by tests. CUDA's kernels are meant: flash attention, fused RMSNorm and AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod

import torch

from cfg.config import Config, ModelConfig
from model.gpt import GPT
from model.loss import chunk_rows_for
from util.ranks import Ranks

# Not for tensors: the CUDA context with its libraries and NCCL's buffers, and gaps between blocks of memory.
CONTEXT_BYTES, FRAGMENTATION = 1.5e9, 0.05
LATER_BYTES = 0.5e9  # of the context, what comes after a process has begun to use its GPU
MOST_ROWS, MOST_ROWS_ON_CPU = 64, 4  # of --batch_size=0
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
Parts = dict[str, int]  # bytes of each of PARTS that there is


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank. Parts do not all peak at once, so `peak` is at most their sum.

    parts: each where it is largest within a step. peak: the largest sum at one time, `moment` says when. host: what
    --cpu_offload keeps in host memory instead.
    """

    parts: Parts
    peak: int
    moment: str
    host: int


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. `own` is this rank's part of everything and `own_blocks` of the blocks, where sharded."""

    total: int
    block: int  # of one block
    products: int  # of one block, what autocast casts: all but its norms
    widest: int  # the largest matrix of a block
    root: int  # embeddings, last norm, head: what is gathered around the blocks
    head: int  # rows with padding × width
    own: int
    own_blocks: int


@lru_cache(maxsize=8)
def shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter's name and shape, from the model itself."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(model).named_parameters()}


def model_config(config: Config) -> ModelConfig:
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})


def count(config: Config, shards: int) -> Counts:
    """FSDP cuts every parameter along its rows; the first rank's part is the largest, ⌈rows / shards⌉."""
    everything = shapes(model_config(config))
    blocks = {n: s for n, s in everything.items() if n.startswith("h.")}
    first = {n: prod(s) for n, s in blocks.items() if n.startswith("h.0.")}
    own = {n: -(-s[0] // shards) * prod(s[1:]) for n, s in everything.items()}
    total, block = sum(map(prod, everything.values())), sum(first.values())
    return Counts(
        total=total,
        block=block,
        products=sum(size for n, size in first.items() if "c_" in n),  # c_attn, c_proj, c_fc
        widest=max(first.values()),
        root=total - config.n_layer * block,
        head=prod(everything["wte.weight"]),
        own=sum(own.values()),
        own_blocks=sum(own[n] for n in blocks),
    )


def largest_partition(config: Config, world_size: int) -> int:
    """Parameters on the rank that gets most of them in stage 1.

    ZeroRedundancyOptimizer deals out whole parameters, the largest first, to the rank that has least so far; matrices
    and vectors are groups of their own, in this order.
    """
    loads = [0] * world_size
    everything = shapes(model_config(config)).values()
    for vectors in (False, True):
        for size in sorted((prod(s) for s in everything if (len(s) < 2) == vectors), reverse=True):
            loads[loads.index(min(loads))] += size
    return max(loads)


def element_size(config: Config) -> int:
    return 4 if config.dtype == "float32" else 2


def stream_size(config: Config) -> int:
    """Bytes of an element of the residual stream."""
    return 2 if config.residual_dtype == "bfloat16" else 4


def block_activations(config: Config, recompute: str) -> int:
    """Bytes that one block keeps of one token until its backward pass; `recompute` as --activation_checkpointing.

    The residual stream (4 bytes, or 2 with --residual_dtype=bfloat16) that enters a block and its middle are kept by
    the norms; the rest is in the compute dtype: each matrix product keeps its input, attention keeps q, k, v, its
    output, and fp32 log-sums. torch.compile keeps the output of attention's projection in place of the middle of the
    stream, and of SwiGLU not the silu. What it keeps was read off its partitioner.
    """
    c, e, stream = config, element_size(config), stream_size(config)
    C, q, kv = c.n_embd, c.n_head * c.head_size, c.n_kv_head * c.head_size
    qkv, wide = q + 2 * kv, c.mlp_hidden
    fc = 2 * wide if c.mlp == "swiglu" else wide
    if recompute == "block":
        return stream * C
    if recompute == "selective":  # the outputs of qkv, attention, its projection, both halves of the MLP
        last = 0 if c.compile else e * C
        return stream * C + e * (qkv + q + C + fc) + 4 * c.n_head + last
    attention = e * (C + q + qkv) + 4 * c.n_head
    if c.positions == "rotary" or c.qk_norm:
        attention += e * (q + kv)  # q and k anew; v stays a view of qkv
    if c.positions == "rotary":
        attention += e * q  # the output once more, heads side by side
    if c.qk_norm and not c.compile and e < 4:
        attention += 4 * (q + kv)
    middle = e * C if c.compile else stream * C
    mlp = e * (C + fc + wide)
    if c.mlp == "swiglu" and not c.compile:
        mlp += e * wide
    return stream * C + attention + middle + mlp + (2 * C if c.dropout else 0)  # dropout keeps a byte per element


def loss_bytes(config: Config, capacity: float) -> int:
    """Bytes of the chunked loss beside hidden states: the two gradients and the logits of a chunk (model/loss.py)."""
    e, head = element_size(config), prod(shapes(model_config(config))["wte.weight"])
    vocabulary, tokens = head // config.n_embd, config.batch_size * config.sequence_length
    rows = min(tokens, chunk_rows_for(vocabulary, "cuda", capacity))
    # Logits, their fp32 copy, log-softmax, its gradient cast back; capped, five in fp32.
    eager = e + 20 if config.logit_softcap else 8 if e == 4 else 2 * e + 8
    per_logit = 2 * e if config.compile else eager  # compiled, logits and their gradient
    return e * tokens * config.n_embd + 4 * head + rows * vocabulary * per_logit


def micro_steps(config: Config, world_size: int) -> int:
    return config.total_batch_size // (config.batch_size * config.sequence_length * world_size)


def backward_bytes(config: Config) -> int:
    """What a block's backward pass holds beside what was kept: gradients of the stream and within the MLP."""
    e, tokens = element_size(config), config.batch_size * config.sequence_length
    within = (2 if config.mlp == "swiglu" else 1) * e * config.mlp_hidden
    return tokens * (stream_size(config) * config.n_embd + within)


def loss_activations(config: Config) -> int:
    """All blocks' activations, and about the loss the last norm's input, its output, and that in the compute dtype."""
    e, tokens = element_size(config), config.batch_size * config.sequence_length
    kept = config.n_layer * block_activations(config, config.activation_checkpointing)
    return tokens * (kept + config.n_embd * (stream_size(config) + 4 + (e if e < 4 else 0)))


def backward_activations(config: Config, blocks: int) -> int:
    """Those of the first `blocks` blocks, while the last of them runs backward, computed again where need be."""
    tokens, kind = config.batch_size * config.sequence_length, config.activation_checkpointing
    kept, whole = block_activations(config, kind), block_activations(config, "none")
    return tokens * (blocks * kept + max(0, whole - kept)) + backward_bytes(config)


def sharded_moments(config: Config, world_size: int, capacity: float) -> dict[str, Parts]:
    """Stages 2 and 3: what is alive in the last micro-step at the times when most can be.

    FSDP2 gathers a block into a flat buffer and copies it out; the buffer lives until the next block is gathered.
    Gradients are copied into a flat fp32 buffer, which lives until the next block's are. Embeddings, last norm and
    head are one group, gathered through the whole step and reduced at its end. From earlier micro-steps gradients
    wait in fp32, unsharded, or with --sync_every_microbatch reduced and sharded.
    """
    c, e, n = config, element_size(config), count(config, world_size // config.replicas)
    L, several, on_device = c.n_layer, micro_steps(c, world_size) > 1, 0 if c.cpu_offload else 4
    wait = several and not c.sync_every_microbatch and not c.cpu_offload
    states = {"parameters": on_device * n.own, "optimizer": 2 * on_device * n.own}
    before = 4 * n.total if wait else on_device * n.own if several else 0
    at_work = e * (n.head + n.widest)  # the head's, reduced with the embeddings', and those of the block at work
    at_end = max(on_device * n.own_blocks, 0 if wait else before)
    keeps = c.zero_stage == 2  # all blocks gathered
    gathered = e * (n.total if keeps else n.root + n.block)
    moments = {
        "loss": {
            "gradients": before,
            "activations": loss_activations(c),
            "logits": loss_bytes(c, capacity),
            "buffers": gathered + (0 if keeps and several else e * n.block),
        },
        "backward of the last block": {
            "gradients": before + at_work,
            "activations": backward_activations(c, L),
            "buffers": gathered + (0 if keeps else e * n.block),
        },
        "backward of the block before the last": {
            "gradients": before + at_work,
            "activations": backward_activations(c, max(1, L - 1)),
            # Where gradients wait, the buffer has taken the place of the last block's.
            "buffers": gathered + (-e if keeps else e) * n.block + (0 if wait else 4 * n.block),
        },
        "backward of the first block": {
            "gradients": at_end + at_work + (4 * (n.root + n.block) if wait else 0),
            "activations": backward_activations(c, 1),
            "buffers": e * (n.root + n.block) + 4 * n.block,
        },
        "reduction of the embeddings": {
            "gradients": at_end + (4 if wait else e) * n.root,
            "buffers": 4 * n.root,
        },
        "optimizer": {"gradients": on_device * n.own},
    }
    return {name: states | parts for name, parts in moments.items()}


def replicated_moments(config: Config, world_size: int, capacity: float) -> dict[str, Parts]:
    """Stages 0 and 1, and one process: as `sharded_moments`.

    DDP's gradients are its buckets, which live as long as the run. Autocast keeps the cast weights of each block
    until the end of the forward pass, and products keep theirs until their backward pass.
    """
    c, e, n = config, element_size(config), count(config, 1)
    L, ddp = c.n_layer, world_size > 1
    own = largest_partition(c, world_size) if c.zero_stage == 1 and ddp else n.total
    states = {"parameters": 4 * n.total, "optimizer": 8 * own}
    before = 4 * n.total if ddp or micro_steps(c, world_size) > 1 else 0
    cast = e if e < 4 else 0
    recomputes = c.activation_checkpointing != "none"
    tied = 4 * n.head if c.tie_embeddings else 0  # the head's, added to the embeddings' at the end
    at_work = tied + (cast + 4) * n.widest
    moments = {
        "loss": {
            "gradients": before,
            "activations": loss_activations(c),
            "logits": loss_bytes(c, capacity),
            "buffers": cast * (n.head + (0 if c.compile and recomputes else L * n.products)),
        },
        "backward of the last block": {
            "gradients": before + at_work,
            "activations": backward_activations(c, L),
            "buffers": cast * n.products * (1 if recomputes else L),
        },
        "backward of the first block": {
            "gradients": 4 * (n.total if before else n.total - n.root) + at_work,
            "activations": backward_activations(c, 1),
            "buffers": cast * n.products,
        },
        "gradients of the embeddings": {"gradients": 4 * (n.total if before else n.total - n.root + n.head) + tied},
        "optimizer": {"gradients": 4 * n.total},
    }
    return {name: states | parts for name, parts in moments.items()}


def moments(config: Config, world_size: int, capacity: float = inf) -> dict[str, Parts]:
    """What is alive on the fullest rank at the times of a step when most can be; bytes by part."""
    return (sharded_moments if config.zero_stage >= 2 else replicated_moments)(config, world_size, capacity)


def planned_bytes(config: Config, world_size: int, capacity: float = inf) -> Memory:
    """The memory of a training step on the fullest of `world_size` ranks: what torch.cuda.max_memory_allocated counts.

    The CUDA context and the gaps between blocks of memory come on top. `config` must be resolved for this world size.
    `capacity` is the total memory of a GPU in bytes, on which the size of the loss's chunks depends.
    """
    at = moments(config, world_size, capacity)
    moment = max(at, key=lambda name: sum(at[name].values()))
    parts = {part: max(alive.get(part, 0) for alive in at.values()) for part in PARTS}
    host = 16 * count(config, world_size // config.replicas).own if config.cpu_offload else 0
    return Memory(parts, sum(at[moment].values()), moment, host)


def usable_bytes(capacity: float) -> float:
    """Returns the bytes of a GPU's memory that are left for tensors."""
    return (1 - FRAGMENTATION) * capacity - CONTEXT_BYTES


def fitting_batch_size(config: Config, world_size: int, capacity: float | None, usable: float = 0) -> int:
    """Returns the sequences of a micro-step that --batch_size=0 stands for.

    This is the largest power of two, at most 64, that divides the rank's sequences in a step and by the plan fits
    into `usable` bytes of a GPU with `capacity` bytes, on which the size of the loss's chunks depends. By default all
    is free that can be. Without a capacity, as on a CPU, it is at most 4. Returns 1 if nothing fits.
    """
    rows = config.total_batch_size // (config.sequence_length * world_size)
    size = MOST_ROWS if capacity else MOST_ROWS_ON_CPU
    while size > 1:
        settled = config.model_copy(update={"batch_size": size})
        fits = not capacity or planned_bytes(settled, world_size, capacity).peak <= (usable or usable_bytes(capacity))
        if rows % size == 0 and fits:
            break
        size //= 2
    return size


def choose_batch_size(config: Config, ranks: Ranks) -> Config:
    """Replaces --batch_size=0 by what fits the GPU with the least free memory, the same size on all ranks."""
    memory = torch.cuda.mem_get_info(ranks.device) if ranks.device.type == "cuda" else None  # free, total
    least = min((m for m in ranks.gather(memory) if m is not None), default=None)
    if least is None:
        capacity, usable = None, 0.0
    else:
        capacity, usable = least[1], (1 - FRAGMENTATION) * least[0] - LATER_BYTES
    size = fitting_batch_size(config, ranks.world_size, capacity, usable)
    config = config.model_copy(update={"batch_size": size})
    if ranks.is_main:
        line = f"--batch_size=0: micro-batch of {size}"
        if capacity:
            peak = planned_bytes(config, ranks.world_size, capacity).peak
            line += f", {peak / 1e9:.1f} GB planned of {usable / 1e9:.1f} GB free"
            line += "" if peak <= usable else ", which does not fit; scripts/plan.py says what would"
        print(line)
    return config


def deviation(config: Config, world_size: int, measured: int) -> float:
    """How far the plan lies from a measured peak, in parts of that: 0.1 is a plan of 10% too much.

    `measured` is the largest torch.cuda.max_memory_allocated of all ranks after some steps, `memory_bytes` in
    metrics.jsonl on one rank.
    """
    return planned_bytes(config, world_size).peak / measured - 1
