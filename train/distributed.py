"""Ranks: who am I, on which device, and the few collectives the loop needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cfg.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With one process there is no process group."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """All-reduces `x` in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def sum_floats(self, values: list[float]) -> list[float]:
        """Sums over ranks, element by element, in float64."""
        if self.world_size == 1:
            return values
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def on_main(self, decide: Callable[[], T]) -> T:
        """Runs `decide` on rank 0; its value, or its UserError, reaches every rank."""
        if self.world_size == 1:
            return decide()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [decide()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, device=self.device)
        if isinstance(box[0], UserError):
            raise box[0]
        return cast(T, box[0])


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`wanted` is auto, cpu, cuda or mps; auto takes what is there. Raises UserError for what is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, there in available.items() if there) if wanted == "auto" else wanted
    if not available[kind]:
        raise UserError(f"--device={kind}: this machine has none; use --device=auto")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node asks for more than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(kind)


def init_ranks(wanted_device: str, timeout_minutes: float = 30) -> Ranks:
    """Joins the process group that torchrun describes in the environment, if there is one."""
    rank, local_rank, world_size = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = choose_device(wanted_device, local_rank)
    if world_size > 1:
        if device.type == "mps":
            raise UserError("--device=mps trains with one process; use python train_gpt.py, or --device=cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None  # NCCL otherwise guesses it from the rank
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), device_id=device_id)
    return Ranks(rank, local_rank, world_size, device)


def close_ranks(ranks: Ranks) -> None:
    if ranks.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
