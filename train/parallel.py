"""Puts a model on all ranks: DDP, ZeRO-1 or FSDP2, as --zero_stage says. docs/parallel.md compares the stages."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
from model.lora import add_adapters
from model.loss import compiled_chunk_loss
from util.errors import UserError
from util.ranks import Ranks, set_timeout


@dataclass(frozen=True)
class ParallelModel:
    """A model on all ranks. Calling it is the forward pass of training; `gpt` is the model without DDP's wrapper.

    Checkpoints, evaluation and sampling use `gpt`. Both share one set of parameters.
    """

    gpt: GPT
    train_module: torch.nn.Module  # `gpt`, or DDP around it
    mesh: DeviceMesh | None  # stages 2 and 3: (shard,) or (replicate, shard)
    config: Config
    ranks: Ranks

    def __call__(self, idx: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the summed loss in nats and the number of targets, for ids and targets (B, T)."""
        return self.train_module(idx, targets, positions=positions)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which matrix products are computed in --dtype."""
        dtype = getattr(torch, self.config.dtype)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Runs the block under autocast without the compiler, which would compile again for each length of text."""
        with torch.compiler.set_stance("force_eager"), self.autocast():
            yield

    def set_gradient_sync(self, last: bool) -> None:
        """Chooses before the forward pass of a micro-step whether its backward pass reduces gradients over ranks.

        Before, because DDP decides there (huggingface/accelerate#1726). Gradients are reduced once a step, in the
        `last` micro-step, and stage 2 gathers parameters once. With --sync_every_microbatch sharded gradients are
        reduced over the shards in every micro-step, and over the replicas once. DDP's `no_sync` has no effect on
        FSDP2 (pytorch#118298).
        """
        if isinstance(self.train_module, DistributedDataParallel):
            cast(Any, self.train_module).require_backward_grad_sync = last
        elif isinstance(self.gpt, FSDPModule):
            # Offloaded gradients must not wait on the GPU for the last micro-step.
            reduces = last or self.config.sync_every_microbatch or self.config.cpu_offload
            self.gpt.set_is_last_backward(reduces)  # otherwise the last buffer lives through the next micro-step
            self.gpt.set_requires_gradient_sync(reduces)
            self.gpt.set_requires_all_reduce(last)
            if self.config.zero_stage == 2:
                self.gpt.set_reshard_after_backward(last)

    def gradients(self) -> list[Tensor]:
        """Returns the gradients that this rank holds."""
        return [p.grad for p in self.gpt.parameters() if p.grad is not None]

    def squared_grad_norm_share(self) -> Tensor:
        """Returns this rank's share of the squared gradient norm: the sum over all ranks is the model's."""
        return norm_squared(self.gradients(), self.mesh, self.ranks.world_size).to(self.ranks.device)

    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients by `factor`, in place."""
        if factor != 1:
            torch._foreach_mul_([local(g) for g in self.gradients()], factor)

    def set_timeout(self, minutes: float) -> None:
        """Sets how long a rank may wait for another in any process group that a training step uses."""
        groups = [dist.group.WORLD] if dist.is_initialized() else []
        if self.mesh is not None:
            groups += self.mesh.get_all_groups()
        set_timeout(minutes, groups)

    def warm_up(self) -> None:
        """Runs one backward pass, so that DDP arranges its gradient buckets before the first step instead of after it.

        DDP rearranges them once, by the order in which gradients arrived in its first backward pass, and the
        arrangement decides the order in which an all-reduce adds them. A resumed run would otherwise take its first
        step with the other arrangement, and on more than two ranks round differently.
        """
        if isinstance(self.train_module, DistributedDataParallel):
            # With the shape of a training batch, and positions if it has them, so that the compiler compiles once.
            shape = self.config.batch_size, self.config.sequence_length
            idx = torch.zeros(shape, dtype=torch.long, device=self.ranks.device)
            positions = torch.arange(idx.size(1), device=idx.device).expand_as(idx) if self.config.doc_mask else None
            with self.autocast():
                loss, _ = self(idx, idx, positions)
            loss.backward()
            self.gpt.zero_grad(set_to_none=True)

    def check_replicas(self) -> None:
        """Raises RuntimeError if a parameter differs between ranks that must hold identical copies of it.

        FSDP broadcasts nothing, so a rank that drew or loaded other values would train on unnoticed (OLMo-core#319).
        """
        if name := self.differing_parameter():
            raise RuntimeError(f"{name} is not the same on all ranks that should hold the same part of it")

    def differing_parameter(self) -> str | None:
        """Returns the name of a parameter that differs between ranks holding the same part of it, or None.

        Compares the sums of the parameters' bits read as integers.
        """
        parameters = dict(self.gpt.named_parameters())
        kinds = {4: torch.int32, 2: torch.int16}  # frozen weights may be in 16 bits
        bits = [local(p.detach()).contiguous().view(kinds[p.element_size()]) for p in parameters.values()]
        sums = [int(b.sum(dtype=torch.int64)) for b in bits]
        coordinate = self.mesh["shard"].get_local_rank() if self.mesh is not None else 0
        all_sums = self.ranks.gather((coordinate, sums))
        expected = next(others for where, others in all_sums if where == coordinate)
        wrong = [n for n, a, b in zip(parameters, expected, sums, strict=True) if a != b]
        return next((name for names in self.ranks.gather(wrong) for name in names), None)

    def strategy(self) -> str:
        """Returns the strategy as the banner shows it."""
        if self.mesh is None:
            return ", ZeRO-1" if self.config.zero_stage == 1 and self.train_module is not self.gpt else ""
        shape = " × ".join(map(str, self.mesh.shape))
        offloaded = ", offloaded to the host" if self.config.cpu_offload else ""
        return f", ZeRO-{self.config.zero_stage} on {shape}{offloaded}"


def set_math_mode(config: Config, device: torch.device) -> None:
    """Applies --tensorcores and --deterministic to torch, and checks that --compile has a C++ compiler on a CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # torch's choice
    if config.compile and device.type == "cpu" and not shutil.which(compiler):
        flag = f"--compile={config.compile if config.compile == 'model' else 1}"
        raise UserError(f"{flag} on a CPU needs a C++ compiler, but {compiler} is not installed; use --compile=0")
    if config.tensorcores and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        # Not warn_only: memory-efficient attention, which fp32 uses, would then warn and stay nondeterministic.
        torch.use_deterministic_algorithms(True)


def parallelize(config: Config, ranks: Ranks, initial_value: InitialValue | None = None) -> ParallelModel:
    """Returns the model with its initial weights: adapters → activation checkpointing → compile → shard or replicate.

    The model is built on the meta device, so that no rank ever holds all of a sharded model. Then each parameter is
    drawn (or read with `initial_value`) whole, one after the other, and every rank keeps its part. The weights are
    therefore the same on any number of ranks.
    """
    with torch.device("meta"):
        model = GPT(config)
    if config.lora_rank:
        add_adapters(model, config)
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
    return ParallelModel(model, train_model, mesh, config, ranks)


def compile_model(model: GPT, config: Config, device: torch.device) -> None:
    """Compiles the loss and each block's forward in place; with --compile=model, `hidden` instead of the blocks.

    Per block, parameter names stay unchanged, the hooks of FSDP stay outside, and the compiler works once for all
    blocks. As one graph, norms and residual additions fuse across blocks, compilation takes longer, and with several
    ranks gradients are reduced after the backward pass instead of during it.
    """
    # DDP's gradient hooks already fire block by block; splitting within a block would only break its fusion.
    torch._dynamo.config.optimize_ddp = False
    if config.compile == "model":
        cast(Any, model).hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False)
    else:
        for block in model.h:
            cast(Any, block).forward = torch.compile(block.forward)
    model.chunk_loss = compiled_chunk_loss()
    # FlexAttention has no dropout and needs heads at least as wide as a tensor core's tile.
    flexible = config.flash and not config.dropout and config.head_size >= 16
    model.flex = device.type == "cuda" and flexible


def make_mesh(config: Config, world_size: int, device_type: str) -> DeviceMesh:
    """Returns a mesh (shard,), or with --replicas (replicate, shard).

    The ranks of a shard group are neighbours, usually one node, and hold one copy of the model together.
    """
    if config.replicas == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (config.replicas, world_size // config.replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: GPT, config: Config, ranks: Ranks) -> DeviceMesh:
    """Applies FSDP2 to each block, and to the rest (embeddings, last norm, head) as the root. Returns the mesh.

    Master weights (except frozen ones, which are in --base_dtype), gradients and their reduction are fp32. Weights
    gathered for computing are in --dtype. Stage 3 frees a block's gathered weights after its forward pass, except the
    last block's, which backward needs at once.
    """
    mesh = make_mesh(config, ranks.world_size, ranks.device.type)
    # In fp32 nothing is cast, unless frozen weights are in 16 bits: autograd would keep their casts between the passes.
    compute = None if config.dtype == config.base_dtype == "float32" else getattr(torch, config.dtype)
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
    """Returns this rank's part of a parameter, gradient or optimizer state; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copies this rank's part of the whole `value` into a parameter, without communication."""
    if isinstance(parameter, DTensor):
        value = local(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
    local(parameter).copy_(value)


def reshard(model: GPT) -> None:
    """Frees the weights that a forward pass without backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def norm_squared(gradients: list[Tensor], mesh: DeviceMesh | None, world_size: int) -> Tensor:
    """Returns this rank's share of the squared norm of all gradients: the sum over all ranks is the model's."""
    parts = [local(g) for g in gradients]
    if parts[0].device.type == "cpu":
        # On the CPU a norm adds squares one by one in fp32. Over 10^8 numbers that is off by percents, and differently
        # for each way of sharding. In pieces it is accurate, and no slower.
        parts = [piece for part in parts for piece in part.flatten().split(2**16)]
    copies = world_size if mesh is None else mesh.size(0) if mesh.ndim == 2 else 1
    return torch.nn.utils.get_total_norm(parts).float().square() / copies
