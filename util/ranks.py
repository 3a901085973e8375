"""Ranks: who am I, on which device, and the few collectives the loop needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from util.device import choose_device
from util.errors import UserError, storage_error
from util.launcher import launched_world_size

T = TypeVar("T")
MARGIN = 30.0  # seconds by which process groups time out later than train/watchdog.py, which can say who is to blame


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. With one process there is nobody to talk to.

    `cpu_group` is a gloo group with a long timeout, for what ranks decide or write on the host while others wait.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None  # torchrun's, for train/watchdog.py; None with one process

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
        """Runs `decide` on rank 0; its value, or its UserError or what the disk refused, reaches every rank."""
        if self.world_size == 1:
            return decide()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [decide()]
            except UserError as error:
                box = [error]
            except OSError as error:
                if (refused := storage_error(error)) is None:
                    raise
                box = [refused]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        if isinstance(box[0], UserError):
            raise box[0]
        return cast(T, box[0])

    def on_all(self, act: Callable[[], T]) -> T:
        """What `act`, which must not communicate, gives on this rank. If it fails on one, as above, all raise that."""
        if self.world_size == 1:
            return act()
        problem: UserError | None = None
        try:
            value = act()
        except UserError as error:
            problem = error
        except OSError as error:
            if (problem := storage_error(error)) is None:
                raise
        if first := next((p for p in self.gather(problem) if p is not None), None):
            raise first
        return value

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values


def init_ranks(
    wanted_device: str,
    start_timeout_minutes: float = 30,
    sharded: bool = False,
    logs: Path | None = None,
    cpu_collectives: bool = False,
) -> Ranks:
    """Joins the process group that torchrun describes in the environment, if there is one.

    `sharded`: also one process becomes a group, of itself, which FSDP needs. `logs` is where NCCL's flight recorder
    leaves each rank's last collectives if one of them times out. With `cpu_collectives` ranks exchange CPU tensors and
    objects only, so that GPUs need no NCCL and MPS may have several processes.
    """
    world_size = launched_world_size()
    rank, local_rank = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK")) if world_size > 1 else (0, 0)
    device = choose_device(wanted_device, local_rank)
    if world_size == 1 and not sharded:
        return Ranks(rank, local_rank, world_size, device)
    if device.type == "mps" and not cpu_collectives:
        raise UserError("--device=mps trains with one process and --zero_stage=0; change that, or use --device=cpu")
    cuda = device.type == "cuda" and not cpu_collectives
    if logs is not None:  # `torchfrtrace` reads them
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / "nccl_trace_rank_"))
    timeout = group_timeout(start_timeout_minutes)
    store = _meet(timeout) if world_size > 1 else dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",  # gloo too, for what is offloaded to the host
        timeout=timeout,
        device_id=device if cuda else None,  # NCCL otherwise guesses it from the rank
        store=store,
        rank=rank,
        world_size=world_size,
    )
    cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    # A connection of its own: the other is not to be had while this rank waits in it.
    signs = dist.PrefixStore("watch", store.clone()) if world_size > 1 else None
    return Ranks(rank, local_rank, world_size, device, cpu_group, signs)


def _meet(timeout: timedelta) -> dist.Store:
    """torchrun's store, under a prefix of its own for each of torchrun's --max-restarts.

    The store lives as long as torchrun, and so do the addresses that workers left in it: after a restart gloo and
    NCCL would look for the dead ones, and fail or hang (pytorch#135712; so it is in 2.11 to 2.13). Machines may count
    restarts differently; on several TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun use a new store each time.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    one_machine = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    return dist.PrefixStore(f"restart_{restarts}" if one_machine else "run", store)


def group_timeout(minutes: float) -> timedelta:
    """How long a process group waits where a rank has so many minutes."""
    return timedelta(minutes=minutes, seconds=MARGIN)


def set_timeout(minutes: float, groups: list[dist.ProcessGroup]) -> None:
    """From now on a rank that is waited for longer than this (and MARGIN) in one of `groups` ends the run.

    At start, compilation and uneven disks make some ranks wait long for others; in training that means a hang.
    """
    for group in groups:
        _set_pg_timeout(group_timeout(minutes), group)


def close_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
