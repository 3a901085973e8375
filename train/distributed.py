"""Ranks: who am I, on which device, and the few collectives the loop needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from cfg.config import launched_world_size
from cfg.errors import UserError
from model.device import choose_device

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With one process there is nobody to talk to.

    `host` is a gloo group with a long timeout, for what ranks decide or write on the host while others wait.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    host: dist.ProcessGroup | None = None

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
        dist.broadcast_object_list(box, src=0, group=self.host)
        if isinstance(box[0], UserError):
            raise box[0]
        return cast(T, box[0])

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host)
        return values


def init_ranks(wanted_device: str, start_timeout_minutes: float = 30, sharded: bool = False) -> Ranks:
    """Joins the process group that torchrun describes in the environment, if there is one.

    `sharded`: also one process becomes a group, of itself, which FSDP needs.
    """
    world_size = launched_world_size()
    rank, local_rank = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK")) if world_size > 1 else (0, 0)
    device = choose_device(wanted_device, local_rank)
    if world_size == 1 and not sharded:
        return Ranks(rank, local_rank, world_size, device)
    if device.type == "mps":
        raise UserError("--device=mps trains with one process and --zero_stage=0; change that, or use --device=cpu")
    cuda = device.type == "cuda"
    timeout = timedelta(minutes=start_timeout_minutes)
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",  # gloo too, for what is offloaded to the host
        timeout=timeout,
        device_id=device if cuda else None,  # NCCL otherwise guesses it from the rank
        **(_after_a_restart(timeout) if world_size > 1 else alone),
    )
    host = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank, local_rank, world_size, device, host)


def _after_a_restart(timeout: timedelta) -> dict[str, Any]:
    """For init_process_group: torchrun's store, under a prefix of its own for each of torchrun's --max-restarts.

    The store lives as long as torchrun, and so do the addresses that workers left in it: after a restart gloo and
    NCCL would look for the dead ones, and fail or hang (pytorch#135712; so it is in 2.11 to 2.13). Machines may count
    restarts differently; on several TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun use a new store each time.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    return {"store": dist.PrefixStore(f"restart_{restarts}", store), "rank": rank, "world_size": world_size}


def set_timeout(minutes: float, groups: list[dist.ProcessGroup]) -> None:
    """From now on a rank that is waited for longer than this in one of `groups` ends the run.

    At start, compilation and uneven disks make some ranks wait long for others; in training that means a hang.
    """
    for group in groups:
        _set_pg_timeout(timedelta(minutes=minutes), group)


def close_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
