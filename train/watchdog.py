"""Watchdog: ends a run whose ranks wait for too long, and names the rank that blocks the others.

A process group's timeout ends the waiting ranks without naming the rank that they waited for, and NCCL's does not even
reach Python. So a thread of each rank sends a heartbeat to torchrun's store every second: a counter, the current task,
and the line of code where the main thread is.
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
PERIOD = 1.0  # seconds between heartbeats
SILENCE = 6 * PERIOD  # a rank without a heartbeat for this long is stopped or gone
OVERDUE = -1  # in place of the counter: this rank has found that it waits too long itself


class _Task(NamedTuple):
    name: str
    seconds: float  # time limit


default_minutes = float("inf")  # time limit of a task that is started without one
_task = _Task("the start", float("inf"))  # a new object at each progress


def progress(name: str, minutes: float | None = None) -> None:
    """Reports progress: this rank now starts the task `name`, which must end within `minutes`."""
    global _task
    _task = _Task(name, 60 * (default_minutes if minutes is None else minutes))


def set_default_minutes(minutes: float) -> None:
    """Sets the time limit of tasks that are started without one."""
    global default_minutes
    default_minutes = minutes


def start(ranks: Ranks, minutes: float) -> None:
    """Starts the watchdog thread with a default time limit. A single rank never waits for another, so it has none."""
    set_default_minutes(minutes)
    progress("the start")
    if ranks.store is not None:
        threading.Thread(target=_watch, args=(ranks, ranks.store), name="watchdog", daemon=True).start()


def _watch(ranks: Ranks, store: dist.Store) -> None:
    task, waited, heartbeat, before = _task, 0.0, 0, time.monotonic()
    with suppress(Exception):  # the store disappears when torchrun ends
        while waited <= task.seconds:
            time.sleep(PERIOD)
            # If the whole job was suspended, its pause does not count.
            now = time.monotonic()
            waited, before = waited + min(now - before, 2 * PERIOD), now
            if task is not _task:
                task, waited = _task, 0.0
            heartbeat += 1
            store.set(str(ranks.rank), json.dumps([heartbeat, task.name, _place()]))
    if waited > task.seconds:
        _end_process(ranks, store, task)


def _place() -> str:
    """Returns the line of rawgpt's code that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "its start or end"


def _end_process(ranks: Ranks, store: dist.Store, task: _Task) -> None:
    """Prints which rank blocks the others, and ends this process."""
    note_stacks()
    store.set(str(ranks.rank), json.dumps([OVERDUE, task.name, _place()]))
    reports: list[dict[int, Any]] = []
    # In a thread, because the store does not answer if the stopped rank is the one that hosts it.
    reader = threading.Thread(target=_read_heartbeats_twice, args=(ranks, store, task, reports), daemon=True)
    reader.start()
    reader.join(3 * SILENCE)
    speaker, cause = ranks.rank, "torchrun's store does not answer: the process that hosts it is stopped or gone"
    if len(reports) == 2:
        first, second = reports
        silent = [rank for rank in range(ranks.world_size) if first[rank] == second[rank] and second[rank][0] >= 0]
        cause = _diagnose(silent, second)
        speaker = min(set(second) - set(silent))
    line = (
        f"error: no progress for {task.seconds / 60:g} minutes in {task.name}: {cause}; logs/rank_*.log shows what each"
        f" rank was doing; if this step needs more time, raise --step_timeout_minutes or --start_timeout_minutes"
    )
    note(line)
    if ranks.rank == speaker:
        print(line, file=sys.__stderr__, flush=True)
    else:
        time.sleep(5)  # torchrun stops all ranks as soon as the first has ended: let the speaker print first
    if ranks.device.type == "cuda":
        time.sleep(MARGIN + 60)  # meanwhile NCCL's own watchdog writes its flight recorder, and aborts
    os._exit(1)


def _read_heartbeats_twice(ranks: Ranks, store: dist.Store, task: _Task, reports: list[dict[int, Any]]) -> None:
    """Appends each rank's last heartbeat to `reports`, now and after a pause in which every live rank sends one."""
    for pause in (0.0, SILENCE):
        time.sleep(pause)
        keys = [str(rank) for rank in range(ranks.world_size)]
        reports.append(
            {int(k): json.loads(store.get(k)) if store.check([k]) else [0, task.name, "its start"] for k in keys}
        )


def _diagnose(silent: list[int], reports: dict[int, Any]) -> str:
    """Names the ranks that block the others: those without a heartbeat, else those at another place than most."""
    if silent:
        lines = [
            f"rank {rank} does not answer, last seen in {reports[rank][1]} at {reports[rank][2]}" for rank in silent[:8]
        ]
        return "; ".join(lines) + " (stopped, or its machine is gone)"
    places = {rank: f"{place} in {task}" for rank, (_, task, place) in reports.items()}
    usual, count = Counter(places.values()).most_common(1)[0]
    odd = [rank for rank in places if places[rank] != usual]
    if not odd:
        return f"all ranks wait at {usual}"
    return "; ".join(f"rank {rank} is at {places[rank]}" for rank in odd[:8]) + f", {count} wait at {usual}"
