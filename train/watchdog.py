"""A watch on training: a rank that makes no progress for too long says which rank is to blame, and ends.

A process group's own timeout ends the ranks that wait, but says nothing of whom they waited for, and NCCL's not even in
Python. So a thread of each rank tells torchrun's store every few seconds that it lives, and where its main thread is.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from train.rank_log import note, note_stacks
from util.ranks import MARGIN, Ranks

ROOT = Path(__file__).resolve().parents[1]
PERIOD = 1.0  # seconds between two signs of life
SILENCE = 6 * PERIOD  # without one for so long a rank is taken to be stopped or gone
OVERDUE = -1  # instead of the number of a sign of life: a rank that has itself found that it waits too long


class _Task(NamedTuple):
    what: str
    seconds: float  # that it may take


usual_minutes = float("inf")  # that what is begun without a time of its own may take
_task = _Task("the start", float("inf"))  # a new one at each progress


def at(what: str, minutes: float | None = None) -> None:
    """Progress: this rank now begins `what`, which must not take longer than `minutes`."""
    global _task
    _task = _Task(what, 60 * (usual_minutes if minutes is None else minutes))


def start(ranks: Ranks) -> None:
    """Begins to watch. With one rank there is nobody to wait for."""
    if ranks.store is not None:
        threading.Thread(target=_watch, args=(ranks, ranks.store), name="watch", daemon=True).start()


def _watch(ranks: Ranks, store: dist.Store) -> None:
    task, waited, sign, before = _task, 0.0, 0, time.monotonic()
    with suppress(Exception):  # the store goes when torchrun does
        while waited <= task.seconds:
            time.sleep(PERIOD)
            # A job that was suspended as a whole does not find itself overdue when it goes on.
            now = time.monotonic()
            waited, before = waited + min(now - before, 2 * PERIOD), now
            if task is not _task:
                task, waited = _task, 0.0
            sign += 1
            store.set(str(ranks.rank), json.dumps([sign, task.what, _place()]))
    if waited > task.seconds:
        _end(ranks, store, task)


def _place() -> str:
    """Where in our code the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "its start or end"


def _end(ranks: Ranks, store: dist.Store, task: _Task) -> None:
    """Says who is to blame, and ends this process."""
    note_stacks()
    store.set(str(ranks.rank), json.dumps([OVERDUE, task.what, _place()]))
    seen: list[dict[int, Any]] = []
    # In a thread, as the store does not answer if the rank that keeps it is the one that was stopped.
    asking = threading.Thread(target=_ask_twice, args=(ranks, store, task, seen), daemon=True)
    asking.start()
    asking.join(3 * SILENCE)
    speaker, blame = ranks.rank, "torchrun's store does not answer: whoever keeps it is stopped or gone"
    if len(seen) == 2:
        silent = [rank for rank in range(ranks.world_size) if seen[0][rank] == seen[1][rank] and seen[1][rank][0] >= 0]
        blame = _blame(silent, seen[1])
        speaker = min(set(seen[1]) - set(silent))
    line = (
        f"error: no progress for {task.seconds / 60:g} minutes in {task.what}: {blame}; logs/rank_*.log has what each"
        f" rank was doing; if it needs longer, see --step_timeout_minutes and --start_timeout_minutes"
    )
    note(line)
    if ranks.rank == speaker:
        print(line, file=sys.__stderr__, flush=True)
    else:
        time.sleep(5)  # torchrun stops all as soon as the first has gone, and one is to say it
    if ranks.device.type == "cuda":
        time.sleep(MARGIN + 60)  # NCCL's own watchdog writes its flight recorder, and aborts
    os._exit(1)


def _ask_twice(ranks: Ranks, store: dist.Store, task: _Task, seen: list[dict[int, Any]]) -> None:
    """What each rank has last said, now and after a while in which all who live have said something new."""
    for pause in (0.0, SILENCE):
        time.sleep(pause)
        every = [str(rank) for rank in range(ranks.world_size)]
        seen.append(
            {int(r): json.loads(store.get(r)) if store.check([r]) else [0, task.what, "its start"] for r in every}
        )


def _blame(silent: list[int], told: dict[int, Any]) -> str:
    """Who holds up the others: those that are silent, or else those that are somewhere else than most."""
    if silent:
        lines = [f"rank {rank} does not answer, last seen in {told[rank][1]} at {told[rank][2]}" for rank in silent[:8]]
        return "; ".join(lines) + " (stopped, or its machine is gone)"
    places = {rank: f"{where} in {what}" for rank, (_, what, where) in told.items()}
    usual, count = Counter(places.values()).most_common(1)[0]
    odd = [rank for rank in places if places[rank] != usual]
    if not odd:
        return f"all ranks wait at {usual}"
    return "; ".join(f"rank {rank} is at {places[rank]}" for rank in odd[:8]) + f", {count} wait at {usual}"
