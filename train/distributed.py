"""Ranks: who am I, on which device, and the few collectives the loop needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cfg.config import launched_world_size
from cfg.errors import UserError
from model.device import choose_device

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


def init_ranks(wanted_device: str, timeout_minutes: float = 30) -> Ranks:
    """Joins the process group that torchrun describes in the environment, if there is one."""
    world_size = launched_world_size()
    rank, local_rank = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK")) if world_size > 1 else (0, 0)
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
