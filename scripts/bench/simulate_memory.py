"""Simulation of the memory of a training step on one of many ranks, without a GPU, to check train/memory.py.

    python scripts/bench/simulate_memory.py --ranks 8,64 --cfg=llama3-8b --activation_checkpointing=block

runs the real model, loss, sharding and optimizer for two steps on fake tensors, which have shapes but no data. The
process group is fake too: this process is rank 0 of the given number of ranks. PyTorch's memory trackers count the
bytes that are alive. Prints the simulated and the planned bytes for each number of ranks. All other flags are those of
train_gpt.py, but a step has --micro_steps micro-steps, regardless of --total_batch_size.

The compiler does not work with fake tensors, so blocks run eagerly. The chunks of the loss and RMSNorm, which is one
kernel on CUDA, are simulated as on CUDA. Stages 0 and 1 run without DDP: gradients that are kept between steps stand
for its buckets. --cpu_offload is not simulated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from cfg.config import Config, load_config
from util.command import parse_first
from util.errors import CommandParser, UserError, run_command


def parse(argv: list[str] | None = None) -> tuple[list[int], int, list[str]]:
    """Parses the command line. Returns the numbers of ranks, the micro-steps, and the flags for train_gpt.py."""
    parser = CommandParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ranks", default="8", help="comma-separated numbers of ranks (default 8)")
    parser.add_argument("--micro_steps", type=int, default=1, help="micro-steps per step (default 1)")
    args, flags = parser.parse_known_args(argv)
    words = args.ranks.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--ranks={args.ranks} must be comma-separated numbers, as in --ranks=8,64")
    if args.micro_steps < 1:
        raise UserError(f"--micro_steps={args.micro_steps} must be at least 1")
    return [int(word) for word in words], args.micro_steps, flags


# Before torch is imported, so that --help and typos are answered at once.
PARSED = parse_first(__name__, parse)

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import GPT
from model.lora import add_adapters
from model.loss import CHUNK_ELEMENTS
from train.memory import MOST_ROWS_ON_CPU, micro_steps, planned_bytes, possible_peaks
from train.optim import make_optimizer
from train.parallel import ParallelModel, shard
from util.ranks import Ranks

CPU = torch.device("cpu")
NAMES = {  # part → its categories in the memory trackers
    "parameters": ("Sharded Param", "Parameter"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Gradient"),
    "optimizer": ("OptState", "Optstate"),
}


class FusedRMSNorm(torch.autograd.Function):
    """An RMSNorm that saves the tensors that the CUDA kernel saves (the input and a number per row), without math."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def private_torch() -> Any:
    """Imports the private parts of torch that the simulation uses, which may change in any version."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
        from torch.distributed._tools.mem_tracker import MemTracker
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise UserError(
            f"torch {torch.__version__} lacks the tools for the simulation ({error}); use torch 2.13"
        ) from error
    return SimpleNamespace(
        FakeTensorMode=FakeTensorMode, FSDPMemTracker=FSDPMemTracker, MemTracker=MemTracker, FakeStore=FakeStore
    )


def unless_frozen(register: Any) -> Any:
    """Returns `register`, a method that registers a hook on a gradient, without an error for a frozen parameter."""
    return lambda tensor, hook: register(tensor, hook) if tensor.requires_grad else mock.MagicMock()


@contextlib.contextmanager
def as_on_cuda(world_size: int) -> Iterator[None]:
    """Makes this process rank 0 of a fake group, with the loss chunks and the RMSNorm of CUDA."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=private_torch().FakeStore())
    try:
        hooks = ("register_hook", "register_post_accumulate_grad_hook")
        patched = {name: unless_frozen(getattr(Tensor, name)) for name in hooks}  # the trackers register them
        with (
            mock.patch.multiple(Tensor, **patched),
            mock.patch("torch.nn.functional.rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)),
            mock.patch.dict(CHUNK_ELEMENTS, cpu=CHUNK_ELEMENTS["cuda"]),
        ):
            yield
    finally:
        dist.destroy_process_group()


def simulate(config: Config, world_size: int) -> dict[str, int]:
    """Returns bytes on rank 0: of parameters, gradients and optimizer after a step, and the peak during a step."""
    for flag, plain in (
        ("compile", False),
        ("cpu_offload", False),
        ("dropout", 0.0),
        ("lora_dropout", 0.0),
        ("flash", True),
    ):
        if getattr(config, flag) != plain:
            raise UserError(f"--{flag}={getattr(config, flag)} is not simulated; use --{flag}={int(plain)}")
    with as_on_cuda(world_size):
        with torch.device("meta"):
            model = GPT(config)
        if config.lora_rank:
            add_adapters(model, config)
        for block in model.h:
            block.activation_checkpointing = config.activation_checkpointing
        model.residual_dtype = getattr(torch, config.residual_dtype)
        # A device mesh cannot be created in fake mode, so the model is sharded before, on the meta device.
        mesh = shard(model, config, Ranks(0, 0, world_size, CPU)) if config.zero_stage >= 2 else None
        with private_torch().FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=CPU)
            parallel = ParallelModel(model, model, mesh, config, Ranks(0, 0, world_size, CPU))
            return two_steps(parallel, config, world_size)


def two_steps(parallel: ParallelModel, config: Config, world_size: int) -> dict[str, int]:
    """Runs two steps and returns the bytes of the second, when the optimizer has its states."""
    model = parallel.gpt
    optimizer = make_optimizer(model, config, world_size)
    tools = private_torch()
    tracker = tools.FSDPMemTracker(model, optimizer) if parallel.mesh else tools.MemTracker()
    if not parallel.mesh:
        tracker.track_external(model, optimizer)
    idx = torch.zeros(config.batch_size, config.sequence_length, dtype=torch.long)
    n = micro_steps(config, world_size)
    bf16 = config.dtype != "float32"
    for _ in range(2):
        with tracker:  # entering resets its peak
            for i in range(n):
                tracker.reset_mod_stats()
                parallel.set_gradient_sync(last=i == n - 1)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss, _ = model(idx, idx)
                loss.backward()
            peak = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
            # Read the peak before the optimizer runs: DTensor computes shapes on full tensors, which would be counted.
            optimizer.step()
            resident = {str(getattr(k, "value", k)): v for k, v in tracker.get_tracker_snapshot()[CPU].items()}
        optimizer.zero_grad(set_to_none=bool(parallel.mesh) or world_size == 1)
    return {part: sum(resident.get(name, 0) for name in names) for part, names in NAMES.items()} | {"peak": peak}


def compare(flags: list[str], world_size: int, steps: int) -> list[tuple[str, int, int]]:
    """Returns (part, simulated, planned) bytes on the rank that needs most; a step has `steps` micro-steps."""
    flags = [*flags, "--compile=0", "--total_batch_size=0"]
    try:
        config = load_config(flags, world_size)
    except UserError as error:
        if not str(error).startswith("--batch_size=0"):
            raise
        config = load_config([*flags, f"--batch_size={MOST_ROWS_ON_CPU}"], world_size)  # the choice needs a GPU
    config = config.model_copy(update={"total_batch_size": config.total_batch_size * steps})
    found, plan = simulate(config, world_size), planned_bytes(config, world_size)
    resident = possible_peaks(config, world_size)["optimizer"]
    rows = [(part, found[part], resident.get(part, 0)) for part in NAMES]
    return [*rows, (f"peak, at {plan.peak_at}", found["peak"], plan.peak)]


def main(rank_counts: list[int], steps: int, flags: list[str]) -> None:
    for world_size in rank_counts:
        start = time.perf_counter()
        rows = compare(flags, world_size, steps)
        seconds = time.perf_counter() - start
        shown = "; ".join(f"{what} {found / 1e9:.3f} ({planned / 1e9:.3f})" for what, found, planned in rows)
        deviation = rows[-1][2] / rows[-1][1] - 1
        print(f"{world_size} ranks, GB (planned): {shown}, {deviation:+.1%}; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(lambda: main(*PARSED), teardown=False)
