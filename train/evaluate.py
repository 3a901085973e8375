"""What a run does on the side, evaluation and samples: it may fail or be broken off, and training goes on."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from model.gpt import GPT
from train import watchdog
from train.guard import Stopped, StopRequest
from train.parallel import reshard
from util.errors import storage_error
from util.ranks import Ranks

T = TypeVar("T")


def aside(
    what: str,
    work: Generator[Any, None, T],
    model: GPT,
    ranks: Ranks,
    stop: StopRequest,
    around: Callable[[], AbstractContextManager[Any]],
) -> T | None:
    """Runs `work` to its end, from yield to yield on all ranks together, and returns its value.

    `work` yields before each forward of the model, when all else that this takes is done, and as often on one rank as
    on another; each stretch of it runs without gradients, in evaluation mode and within the context that `around`
    makes. Between them the ranks agree: raises Stopped if one was asked to stop; if one failed, says so and returns
    None. (One case ends the run all the same, if on some ranks only: a failure within a sharded model's forward, where
    the others wait for weights until --step_timeout_minutes are over. The checkpoint came first.)
    """
    error: Exception | None = None
    value: list[T] = []
    model.eval()
    try:
        while True:
            *votes, failed = ranks.sum_floats([*stop.votes(), float(error is not None)])
            if failed:
                report(what, error, ranks)
                return None
            if value:
                return value[0]
            if any(votes):
                raise Stopped
            watchdog.at(what)
            try:
                with torch.no_grad(), around():
                    next(work)
            except StopIteration as end:
                value = [end.value]
            except Exception as e:  # whatever it is, training does not depend on it
                error = e
    finally:
        work.close()
        model.train()
        reshard(model)


def report(what: str, error: Exception | None, ranks: Ranks) -> None:
    """One line from rank 0 on what failed where, and the traceback from each rank that has one.

    What the disk refuses needs none.
    """
    if error is not None and not (isinstance(error, OSError) and storage_error(error)):
        traceback.print_exception(error)
    told = ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
    if ranks.is_main:
        rank, problem = next((r, p) for r, p in enumerate(told) if p is not None)
        where = f" on rank {rank}" if ranks.world_size > 1 else ""
        print(f"warning: {what} failed{where}, and is left out: {problem}", file=sys.stderr, flush=True)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
