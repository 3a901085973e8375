"""From a model's description to one that trains on all ranks: docs/parallel.md tells what each stage divides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cfg.config import Config
from model.gpt import GPT, InitialValue, init_weights
from model.loss import compiled_chunk_loss
from util.ranks import Ranks


@dataclass(frozen=True)
class Parallel:
    """A model on all ranks: one set of parameters under two names."""

    model: GPT  # names the parameters, evaluates, samples
    train_model: torch.nn.Module  # the same, wrapped by DDP where there is DDP: this one trains
    mesh: DeviceMesh | None  # of stages 2 and 3: (shard,) or (replicate, shard)

    def describe(self, config: Config) -> str:
        """The strategy as the run's first line shows it."""
        if self.mesh is None:
            return ", ZeRO-1" if config.zero_stage == 1 and self.train_model is not self.model else ""
        shape = " × ".join(map(str, self.mesh.shape))
        return f", ZeRO-{config.zero_stage} on {shape}" + (", offloaded to the host" if config.cpu_offload else "")

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group in which a step communicates."""
        if self.mesh is None:
            return [dist.group.WORLD] if dist.is_initialized() else []
        return [dist.group.WORLD, *self.mesh.get_all_groups()]


def parallelize(config: Config, ranks: Ranks, initial_value: InitialValue | None = None) -> Parallel:
    """Builds the model with its initial weights, in the order recompute → compile each block → shard or replicate.

    It is built on the meta device, so that no rank ever holds all of a sharded model; each parameter is then drawn or
    read whole, one after the other, and every rank keeps its part: the same weights on any number of them. Without
    an `initial_value` they are drawn.
    """
    with torch.device("meta"):
        model = GPT(config)
    for block in model.h:
        block.activation_checkpointing = config.activation_checkpointing
    model.residual_dtype = getattr(torch, config.residual_dtype)
    if config.compile:
        compile_model(model, config, ranks.device)
    mesh = shard(model, config, ranks) if config.zero_stage >= 2 else None
    model.to_empty(device=torch.device("cpu") if config.cpu_offload else ranks.device)
    init_weights(model, config.seed if initial_value is None else initial_value, assign)
    train_model: torch.nn.Module = model
    if mesh is None and ranks.world_size > 1:
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        train_model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    return Parallel(model, train_model, mesh)


def compile_model(model: GPT, config: Config, device: torch.device) -> None:
    """Compiles the loss and, in place, each block's forward; with --compile=model the model's `hidden` instead.

    Per block, parameter names stay clean, the hooks that shard or replicate stay outside, and since blocks are alike
    the compiler does the work once. As a whole, norms and residual additions fuse across blocks; it takes longer to
    compile, and with several ranks gradients are reduced after the backward pass instead of during it.
    """
    # DDP's gradient hooks already fire block by block; splitting within a block would only break its fusion.
    torch._dynamo.config.optimize_ddp = False
    if config.compile == "model":
        cast(Any, model).hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False)
    else:
        for block in model.h:
            cast(Any, block).forward = torch.compile(block.forward)
    model.chunk_loss = compiled_chunk_loss()
    # FlexAttention has no dropout, and takes no head narrower than a tensor core's tile.
    flexible = config.flash and not config.dropout and config.head_size >= 16
    model.flex = device.type == "cuda" and flexible


def make_mesh(config: Config, world_size: int, device_type: str) -> DeviceMesh:
    """(shard,), or with --replicas (replicate, shard): neighbouring ranks, usually one node, share one copy."""
    if config.replicas == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (config.replicas, world_size // config.replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: GPT, config: Config, ranks: Ranks) -> DeviceMesh:
    """FSDP2 over each block, and over the rest (embeddings, last norm, head) as the root.

    Master weights, gradients and their reduction are fp32; what is gathered for computing is in --dtype. Stage 3
    drops a block's weights after its forward pass, but not the last one's, which backward needs at once.
    """
    mesh = make_mesh(config, ranks.world_size, ranks.device.type)
    compute = None if config.dtype == "float32" else getattr(torch, config.dtype)
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    common: dict[str, Any] = {
        "mesh": mesh,
        # Inputs are not cast: rotary angles must stay fp32, and autocast does the rest.
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "offload_policy": offload,
    }
    for i, block in enumerate(model.h):
        fully_shard(block, reshard_after_forward=config.zero_stage == 3 and i < len(model.h) - 1, **common)
    fully_shard(model, reshard_after_forward=False, **common)
    return mesh


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, a gradient or an optimizer state; all of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copies into a parameter the part of the whole `value` that this rank holds, without communication."""
    if isinstance(parameter, DTensor):
        value = local(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
    local(parameter).copy_(value)


def sync_gradients(parallel: Parallel, config: Config, last: bool) -> None:
    """Says before a micro-step's forward pass whether it is the `last`, after which gradients must be reduced.

    Before, since DDP decides there (huggingface/accelerate#1726). Gradients are reduced once a step, and stage 2
    gathers parameters once. With --sync_every_microbatch sharded gradients are reduced over the shards each time,
    and only over the replicas once; DDP's `no_sync` would do nothing here (pytorch#118298).
    """
    if isinstance(parallel.train_model, DistributedDataParallel):
        cast(Any, parallel.train_model).require_backward_grad_sync = last
    elif isinstance(parallel.model, FSDPModule):
        # Gradients that are offloaded must not wait for the last micro-step on the GPU.
        reduces = last or config.sync_every_microbatch or config.cpu_offload
        parallel.model.set_is_last_backward(reduces)  # else the last buffer lives through the next micro-step
        parallel.model.set_requires_gradient_sync(reduces)
        parallel.model.set_requires_all_reduce(last)
        if config.zero_stage == 2:
            parallel.model.set_reshard_after_backward(last)


def reshard(model: GPT) -> None:
    """Frees what a forward pass without a backward left gathered, so that parameters are this rank's part again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def norm_squared(gradients: list[Tensor], mesh: DeviceMesh | None, world_size: int) -> Tensor:
    """This rank's share of the squared norm of all gradients: summed over all ranks it is that of the whole model."""
    parts = [local(g) for g in gradients]
    if parts[0].device.type == "cpu":
        # There a norm adds up squares one after the other in fp32: over 10^8 of them it is percents off, and another
        # number for each way of sharding. In pieces it is right, and no slower.
        parts = [piece for part in parts for piece in part.flatten().split(2**16)]
    copies = world_size if mesh is None else mesh.size(0) if mesh.ndim == 2 else 1
    return torch.nn.utils.get_total_norm(parts).float().square() / copies


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    torch._foreach_mul_([local(g) for g in gradients], factor)


def differing_replica(parallel: Parallel, ranks: Ranks) -> str | None:
    """The name of a parameter that is not bit for bit the same on all ranks that hold the same part of it, or None.

    Compares the sums of the bits read as integers. FSDP broadcasts nothing, so a rank that drew or loaded
    something else would train on unnoticed (OLMo-core#319).
    """
    parameters = dict(parallel.model.named_parameters())
    sums = [int(local(p.detach()).contiguous().view(torch.int32).sum(dtype=torch.int64)) for p in parameters.values()]
    coordinate = parallel.mesh["shard"].get_local_rank() if parallel.mesh is not None else 0
    everyone = ranks.gather((coordinate, sums))
    mine = next(theirs for where, theirs in everyone if where == coordinate)
    wrong = [n for n, a, b in zip(parameters, mine, sums, strict=True) if a != b]
    return next((name for names in ranks.gather(wrong) for name in names), None)


def settle(parallel: Parallel, config: Config, ranks: Ranks, autocast: Any) -> None:
    """Makes DDP arrange its gradient buckets before the first step instead of after it.

    It rearranges them once, by the order in which gradients arrived in its first backward pass, and how
    gradients lie in buckets decides the order in which an all-reduce adds them. A resumed run would
    otherwise take its first step with the other arrangement, and on more than two ranks round differently.
    """
    if isinstance(parallel.train_model, DistributedDataParallel):
        # With a training batch's strides, and positions if it has them, so that the compiler compiles once.
        tokens = torch.zeros(config.batch_size, config.sequence_length + 1, dtype=torch.long, device=ranks.device)
        idx = tokens[:, :-1]
        positions = torch.arange(idx.size(1), device=ranks.device).expand_as(idx) if config.doc_mask else None
        with autocast:
            loss, _ = parallel.train_model(idx, idx, positions=positions)
        loss.backward()
        parallel.model.zero_grad(set_to_none=True)
