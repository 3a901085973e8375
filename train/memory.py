"""Planning of the memory of a training step on one rank, from the flags alone. docs/memory.md explains the parts.

The formulas follow the tensors of the code through a step, with the CUDA kernels: flash attention, fused RMSNorm and
AdamW. Tests compare them with a simulation of the real code (scripts/bench/simulate_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

import torch

from cfg.config import Config
from cfg.lora import module_sizes, parse_lora_targets
from model.lora import is_trained
from model.loss import chunk_rows_for
from train.parameter_counts import count, largest_partition, shapes
from util.ranks import Ranks

# Memory that tensors cannot use: the CUDA context with its libraries and NCCL's buffers, and fragmentation.
CONTEXT_BYTES, FRAGMENTATION = 1.5e9, 0.05
LATER_BYTES = 0.5e9  # the part of the context that is allocated after the process starts to use its GPU
MOST_ROWS, MOST_ROWS_ON_CPU = 64, 4  # the largest choices of --batch_size=0
MUON_STEP_BYTES = 13  # that a step of Muon needs in addition, per element of the largest matrix, on CUDA
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
Parts = dict[str, int]  # part → bytes; a part that is missing has none


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most. Parts peak at different times, so `peak` is at most their sum."""

    parts: Parts  # the largest value of each part within a step
    peak: int  # the largest sum at one time
    peak_at: str  # the part of the step with the peak
    host: int  # in CPU memory, with --cpu_offload


def element_size(config: Config) -> int:
    """Returns the bytes of an element in the compute dtype."""
    return 4 if config.dtype == "float32" else 2


def cast_size(config: Config, trained: bool = True) -> int:
    """Returns the bytes of an element of a weight that is cast for matrix products, 0 if it is not."""
    needed = config.dtype != ("float32" if trained or not config.lora_rank else config.base_dtype)
    return element_size(config) if needed else 0


def stream_size(config: Config) -> int:
    """Returns the bytes of an element of the residual stream."""
    return 2 if config.residual_dtype == "bfloat16" else 4


def block_activations(config: Config, checkpointing: str) -> int:
    """Returns the bytes per token that one block saves for its backward pass.

    `checkpointing` is a value of --activation_checkpointing. The norms save the residual stream (4 bytes, or 2 with
    --residual_dtype=bfloat16) at the start and in the middle of the block. The rest is in the compute dtype: each
    matrix product saves its input, attention saves q, k, v, its output, and fp32 log-sums. torch.compile saves the
    output of attention's projection instead of the middle of the stream, and does not save the silu of SwiGLU, as the
    output of its partitioner shows.
    """
    c, e, stream = config, element_size(config), stream_size(config)
    C, q, kv = c.n_embd, c.n_head * c.head_size, c.n_kv_head * c.head_size
    qkv, wide = q + 2 * kv, c.mlp_hidden
    fc = 2 * wide if c.mlp == "swiglu" else wide
    if checkpointing == "block":
        return stream * C
    inputs, adapters = lora_activations(config, checkpointing)
    if checkpointing == "selective":  # saves the outputs of attention and of all matrix products
        last = 0 if c.compile else e * C
        return stream * C + e * (qkv + q + C + fc) + 4 * c.n_head + last + adapters
    attention = e * (C + q + qkv) + 4 * c.n_head
    if c.positions == "rotary" or c.qk_norm:
        attention += e * (q + kv)  # copies of q and k; v is a view of qkv
    if c.positions == "rotary":
        attention += e * q  # a copy of the output, heads side by side
    if c.qk_norm and not c.compile and e < 4:
        attention += 4 * (q + kv)
    middle = e * C if c.compile else stream * C
    mlp = e * (C + fc + wide)
    if c.mlp == "swiglu" and not c.compile:
        mlp += e * wide
    dropout = 2 * C if c.dropout else 0  # a byte per element
    return stream * C + attention + middle + mlp + dropout + adapters - inputs


def lora_activations(config: Config, checkpointing: str) -> tuple[int, int]:
    """Returns bytes per token of a block: inputs of frozen matrices, which are not saved, and what adapters save.

    A frozen matrix saves its input only for an adapter's A. (The output of attention is saved by attention.) An adapter
    saves its product with A, and the mask of its dropout unless that is recomputed.
    """
    if not config.lora_rank:
        return 0, 0
    e, sizes, targets = element_size(config), module_sizes(config), parse_lora_targets(config.lora_targets)
    frozen = sum(e * i for name, (i, _) in sizes.items() if name not in targets and name != "attn.c_proj")
    dropout = config.lora_dropout and checkpointing == "none"
    masks = sum(sizes[name][0] for name in targets) if dropout else 0
    return frozen, e * config.lora_rank * len(targets) + masks


def loss_bytes(config: Config, capacity: float) -> int:
    """Returns the bytes of the chunked loss: two gradients and the logits of a chunk (model/loss.py)."""
    e, head = element_size(config), prod(shapes(config)["wte.weight"])
    vocabulary, tokens = head // config.n_embd, config.batch_size * config.sequence_length
    rows = min(tokens, chunk_rows_for(vocabulary, "cuda", capacity))
    # Logits, their fp32 copy, log-softmax, and its gradient in the compute dtype. With a softcap, five fp32 tensors.
    eager = e + 20 if config.logit_softcap else 8 if e == 4 else 2 * e + 8
    per_logit = 2 * e if config.compile else eager  # compiled: logits and their gradient
    gradient = 4 * head if is_trained("lm_head.weight", config) else 0
    return e * tokens * config.n_embd + gradient + rows * vocabulary * per_logit


def micro_steps(config: Config, world_size: int) -> int:
    """Returns the number of micro-steps per step."""
    return config.total_batch_size // (config.batch_size * config.sequence_length * world_size)


def backward_bytes(config: Config) -> int:
    """Returns the bytes that the backward pass of a block allocates: gradients of the stream and within the MLP."""
    e, tokens = element_size(config), config.batch_size * config.sequence_length
    within = (2 if config.mlp == "swiglu" else 1) * e * config.mlp_hidden
    return tokens * (stream_size(config) * config.n_embd + within)


def loss_activations(config: Config) -> int:
    """Returns the bytes of all activations: of the blocks, and the input, output and cast output of the last norm.

    A norm after the token embedding keeps its input until the end of the backward pass.
    """
    e, tokens = element_size(config), config.batch_size * config.sequence_length
    kept = config.n_layer * block_activations(config, config.activation_checkpointing) + embedded_bytes(config)
    return tokens * (kept + config.n_embd * (stream_size(config) + 4 + (e if e < 4 else 0)))


def embedded_bytes(config: Config) -> int:
    """Returns the bytes per token that a norm after the token embedding saves."""
    return stream_size(config) * config.n_embd if config.embedding_norm else 0


def backward_activations(config: Config, blocks: int) -> int:
    """Returns the bytes of the activations of the first `blocks` blocks while the last of them runs backward."""
    tokens, kind = config.batch_size * config.sequence_length, config.activation_checkpointing
    kept, whole = block_activations(config, kind), block_activations(config, "none")
    return tokens * (blocks * kept + max(0, whole - kept) + embedded_bytes(config)) + backward_bytes(config)


def sharded_peaks(config: Config, world_size: int, capacity: float) -> dict[str, Parts]:
    """Returns the bytes that are alive at possible peaks of the last micro-step, for stages 2 and 3.

    FSDP2 gathers a block into a flat buffer and copies it out. The buffer lives until the next block is gathered.
    Gradients are copied into a flat fp32 buffer, which lives until the gradients of the next block are copied.
    Embeddings, last norm and head are one group. It is gathered during the whole step and reduced at its end. The
    gradients of earlier micro-steps are fp32 and unsharded, or with --sync_every_microbatch reduced and sharded.
    """
    c, e, counts = config, element_size(config), count(config, world_size // config.replicas)
    n, t = counts.all, counts.trained
    L, several, on_device = c.n_layer, micro_steps(c, world_size) > 1, 0 if c.cpu_offload else 4
    wait = several and not c.sync_every_microbatch and not c.cpu_offload
    states = dict.fromkeys(("parameters", "optimizer"), 0)
    if not c.cpu_offload:
        states = {"parameters": counts.held, "optimizer": counts.states}
    before = 4 * t.total if wait else on_device * t.own if several else 0
    at_work = e * (t.head + t.widest)  # of the head, which is reduced with the embeddings, and of the current block
    at_end = max(on_device * t.own_blocks, 0 if wait else before)
    keeps = c.zero_stage == 2  # all blocks stay gathered
    gathered = e * (n.total if keeps else n.root + n.block)
    peaks = {
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
            # With unsharded gradients, the buffer replaces the gradients of the last block.
            "buffers": gathered + (-e if keeps else e) * n.block + (0 if wait else 4 * t.block),
        },
        "backward of the first block": {
            "gradients": at_end + at_work + (4 * (t.root + t.block) if wait else 0),
            "activations": backward_activations(c, 1),
            "buffers": e * (n.root + n.block) + 4 * t.block,
        },
        "reduction of the embeddings": {
            "gradients": at_end + (4 if wait else e) * t.root,
            "buffers": 4 * t.root,
        },
        "optimizer": {"gradients": on_device * t.own},
    }
    return {name: states | parts for name, parts in peaks.items()}


def replicated_peaks(config: Config, world_size: int, capacity: float) -> dict[str, Parts]:
    """Returns the bytes that are alive at possible peaks of the last micro-step, for stages 0 and 1 and one process.

    The gradients of DDP are its buckets, which live as long as the run. Autocast keeps the cast weights of each block
    until the end of the forward pass, and matrix products keep theirs until their backward pass.
    """
    c, counts = config, count(config, 1)
    n, t = counts.all, counts.trained
    L, ddp = c.n_layer, world_size > 1
    own = largest_partition(c, world_size) if c.zero_stage == 1 and ddp else counts.states
    states = {"parameters": counts.held, "optimizer": own}
    before = 4 * t.total if ddp or micro_steps(c, world_size) > 1 else 0
    cast = cast_size(c)  # of trained weights
    products = cast * t.products + cast_size(c, trained=False) * (n.products - t.products)
    head = cast_size(c, is_trained("lm_head.weight", c)) * n.head
    recomputes = c.activation_checkpointing != "none"
    tied = 4 * t.head if c.tie_embeddings else 0  # of the head, added to the embeddings' at the end
    at_work = tied + (cast + 4) * t.widest
    peaks = {
        "loss": {
            "gradients": before,
            "activations": loss_activations(c),
            "logits": loss_bytes(c, capacity),
            "buffers": head + (0 if c.compile and recomputes else L * products),
        },
        "backward of the last block": {
            "gradients": before + at_work,
            "activations": backward_activations(c, L),
            "buffers": products * (1 if recomputes else L),
        },
        "backward of the first block": {
            "gradients": 4 * (t.total if before else t.total - t.root) + at_work,
            "activations": backward_activations(c, 1),
            "buffers": products,
        },
        "gradients of the embeddings": {"gradients": 4 * (t.total if before else t.total - t.root + t.head) + tied},
        "optimizer": {"gradients": 4 * t.total},
    }
    return {name: states | parts for name, parts in peaks.items()}


def possible_peaks(config: Config, world_size: int, capacity: float = inf) -> dict[str, Parts]:
    """Returns the bytes by part at each possible peak of a step, on the rank that needs most."""
    peaks = (sharded_peaks if config.zero_stage >= 2 else replicated_peaks)(config, world_size, capacity)
    if config.optimizer == "muon":
        peaks["optimizer"]["buffers"] = MUON_STEP_BYTES * count(config, 1).all.widest
    return peaks


def planned_bytes(config: Config, world_size: int, capacity: float = inf) -> Memory:
    """Returns the memory of a training step on the rank that needs most, as torch.cuda.max_memory_allocated counts it.

    The CUDA context and fragmentation are not included. `config` must be resolved for this world size. `capacity` is
    the total memory of a GPU in bytes; the size of the loss chunks depends on it.
    """
    peaks = possible_peaks(config, world_size, capacity)
    highest = max(peaks, key=lambda name: sum(peaks[name].values()))
    parts = {part: max(alive.get(part, 0) for alive in peaks.values()) for part in PARTS}
    n = count(config, world_size // config.replicas)
    host = n.held + 4 * n.trained.own + n.states if config.cpu_offload else 0  # parameters, gradients, optimizer states
    return Memory(parts, sum(peaks[highest].values()), highest, host)


def usable_bytes(capacity: float) -> float:
    """Returns the bytes of a GPU that tensors can use."""
    return (1 - FRAGMENTATION) * capacity - CONTEXT_BYTES


def fitting_batch_size(config: Config, world_size: int, capacity: float | None, usable: float = 0) -> int:
    """Returns the micro-batch size that --batch_size=0 chooses, in sequences.

    It is the largest power of two, at most 64, that divides the rank's sequences per step and whose plan fits into
    `usable` bytes (default: all that tensors can use) of a GPU with `capacity` bytes. Without a capacity, as on a CPU,
    it is at most 4. Returns 1 if nothing fits.
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
    """Replaces --batch_size=0 with the size that fits the GPU with the least free memory, for all ranks."""
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
            line += "" if peak <= usable else ", which does not fit; scripts/plan.py suggests what fits"
        print(line)
    return config


def deviation(config: Config, world_size: int, measured: int) -> float:
    """Returns the relative error of the plan against a measured peak: 0.1 means that the plan is 10% too high.

    `measured` is the largest torch.cuda.max_memory_allocated of all ranks after a few steps. With one rank it is
    `memory_bytes` in metrics.jsonl.
    """
    return planned_bytes(config, world_size).peak / measured - 1
