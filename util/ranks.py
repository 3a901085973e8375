"""The ranks of a run: their devices, process groups, and the few collectives that are needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from util.device import choose_device
from util.errors import UserError, storage_error
from util.launcher import launched_world_size, watch_launcher

T = TypeVar("T")
MARGIN = 30.0  # seconds by which process groups time out later than train/watchdog.py, which names the blocking rank


def as_user_error(error: Exception) -> UserError | None:
    """Returns the one-line form of a UserError or an operating-system error, or None for other exceptions."""
    if isinstance(error, UserError):
        return error
    return storage_error(error) if isinstance(error, OSError) else None


@dataclass(frozen=True)
class Ranks:
    """This process's rank, device and process groups. With one process every collective is a no-op."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None  # gloo, with a long timeout: decisions and files; None: one process
    store: dist.Store | None = None  # torchrun's store, for train/watchdog.py; None: one process
    _questions: list[Callable[[], bool]] = field(default_factory=list)  # of `ask`, for the next `sum`
    _answers: list[bool] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: Tensor) -> list[float]:
        """Returns scalar tensors summed over ranks, in their dtype, with one all-reduce on the training device."""
        answers = [float(question()) for question in self._questions]
        total = torch.stack((*values, *values[0].new_tensor(answers)))
        if self.world_size > 1:
            dist.all_reduce(total)
        numbers = total.tolist()
        self._questions.clear()
        self._answers[:] = [count > 0 for count in numbers[len(values) :]]
        return numbers[: len(values)]

    def ask(self, *questions: Callable[[], bool]) -> Callable[[], list[bool]]:
        """Asks each rank some questions with its next `sum`, which saves the collective that `any` needs.

        Returns a function that then returns for each question whether any rank's answer is true.
        """
        self._questions[:] = questions
        return self._answers.copy

    def sum_floats(self, values: list[float]) -> list[float]:
        """Returns numbers summed over ranks, element by element, in float64."""
        if self.world_size == 1:
            return values
        return self.sum(*torch.tensor(values, dtype=torch.float64, device=self.device))

    def any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is true on any rank. Uses the CPU group, so it does not wait for the GPU."""
        if self.world_size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.cpu_group)
        return values.bool().tolist()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def on_all(self, act: Callable[[], T], convert: Callable[[Exception], UserError | None] = as_user_error) -> T:
        """Runs `act` on every rank and returns its value. If it fails on any rank, all ranks raise that error.

        `convert` makes a UserError of an exception; exceptions for which it returns None are raised on their rank
        only. `act` must not call collectives.
        """
        value, error = self._attempt(act, convert)
        if first := next((e for e in self.gather(error) if e is not None), None):
            raise first
        return cast(T, value)

    def on_main(self, act: Callable[[], T]) -> T:
        """Runs `act` on rank 0 and returns its value on all ranks. If it fails, all ranks raise its UserError."""
        box: list[Any] = [self._attempt(act, as_user_error) if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        value, error = box[0]
        if error is not None:
            raise error
        return cast(T, value)

    @staticmethod
    def _attempt(
        act: Callable[[], T], convert: Callable[[Exception], UserError | None]
    ) -> tuple[T | None, UserError | None]:
        try:
            return act(), None
        except Exception as e:
            if (error := convert(e)) is None:
                raise
            error.__cause__ = None if error is e else e
            return None, error


def init_ranks(
    wanted_device: str,
    start_timeout_minutes: float = 30,
    sharded: bool = False,
    logs: Path | None = None,
    cpu_collectives: bool = False,
) -> Ranks:
    """Joins the process group that torchrun describes in the environment, if there is one, and returns the ranks.

    With `sharded` a single process becomes a group too, because FSDP needs one. `logs` is the directory for NCCL's
    flight recorder: each rank's last collectives, written if one of them times out. With `cpu_collectives`
    ranks exchange only CPU tensors and objects, so that GPUs need no NCCL and MPS may have several processes.
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
    # The watchdog gets its own connection: a store connection is blocked while a thread waits on it.
    heartbeats = dist.PrefixStore("watch", store.clone()) if world_size > 1 else None
    return Ranks(rank, local_rank, world_size, device, cpu_group, heartbeats)


def _meet(timeout: timedelta) -> dist.Store:
    """Returns torchrun's store, with a separate prefix for each restart (torchrun --max-restarts).

    The store lives as long as torchrun, and keeps the addresses of earlier workers. After a restart gloo and NCCL
    would connect to the dead workers, and fail or hang (pytorch#135712, torch 2.11 to 2.13). Machines may count
    restarts differently; on several machines TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every restart a new store.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with watch_launcher():
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    one_machine = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    return dist.PrefixStore(f"restart_{restarts}" if one_machine else "run", store)


def group_timeout(minutes: float) -> timedelta:
    """Returns the timeout of a process group: MARGIN longer than the watchdog's."""
    return timedelta(minutes=minutes, seconds=MARGIN)


def set_timeout(minutes: float, groups: list[dist.ProcessGroup]) -> None:
    """Sets how long a rank may wait for another in `groups`: `minutes` and MARGIN.

    At the start, compilation and slow disks make ranks wait long for each other. Later a long wait is a hang.
    """
    for group in groups:
        _set_pg_timeout(group_timeout(minutes), group)


def close_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
