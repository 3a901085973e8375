"""Kills of a running training: the plan, the execution, and the checks after each kill."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.processes import all_gone, kill_all, processes_of, send, workers_of
from tests.soak.trace import State, find_differences, read_state

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("worker", "all", "launcher")
PHASES = ("start-up", "save", "prune", "evaluation", "training")
SAVE_EVERY = 4  # steps
GONE_SECONDS = 10  # within which all workers end after their launcher is killed
STALL_SECONDS = 300  # without any progress, after which a run counts as hung


class SoakError(Exception):
    """A violated promise after which the run cannot continue."""


@dataclass(frozen=True)
class Kill:
    """One kill: the planned and the actual phase, and its cost."""

    target: str
    planned: str
    phase: str
    step: int  # the last that was logged
    resumes_from: int
    repeated: int  # steps that were computed and have to be computed again


@dataclass
class Times:
    """Durations in the reference run, in seconds. Random delays are drawn from them."""

    start: float  # from the start of the launcher to the first logged step
    cycle: float  # from one save to the next
    save: float
    evaluation: float


@dataclass
class Run:
    """A run that is killed and restarted, and what was seen of it so far. An attempt ends with each kill."""

    command: list[str]
    output_dir: Path
    log: Path  # the output of its launchers and workers
    launcher: subprocess.Popen[bytes] | None = None
    started: float = 0.0  # time.monotonic() at the start of this attempt
    log_offset: int = 0  # bytes of the log that were read
    seen: set[str] = field(default_factory=set)  # lines of metrics.jsonl in all earlier attempts
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def start(self) -> None:
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.launcher = subprocess.Popen(self.command, env=env, cwd=ROOT, start_new_session=True, **streams)
        self.started = time.monotonic()

    def state(self) -> State:
        return read_state(self.output_dir)

    def end(self) -> None:
        """Kills all processes of the run."""
        if self.launcher is not None:
            self.launcher.kill()
            self.launcher.wait()
        kill_all(self.output_dir, GONE_SECONDS)


def plan_kills(kills: int, rng: random.Random) -> list[tuple[str, str]]:
    """Returns (target, phase) of each kill, in random order: each phase once in five, each target once in three."""
    columns = []
    for names in (TARGETS, PHASES):
        rounds = (rng.sample(names, len(names)) for _ in range(-(-kills // len(names))))
        columns.append([name for each in rounds for name in each][:kills])
    return list(zip(*columns, strict=True))


def phase_of(state: State, has_logged: bool) -> str:
    """Returns the phase that a run is in. `has_logged`: this attempt has logged a step."""
    if not has_logged:
        return "start-up"
    if state.deleting:
        return "prune"
    if state.saving:
        return "save"
    # The checkpoint of a step is saved before the step is evaluated and logged.
    return "evaluation" if state.newest > state.logged else "training"


def has_logged(run: Run, state: State) -> bool:
    return bool(state.lines) and state.lines[-1] not in run.seen


def wait_until(run: Run, condition: Callable[[], bool], pause: float = 0.001) -> None:
    """Polls `condition`. Raises SoakError if the run ends first, or after STALL_SECONDS."""
    deadline = time.monotonic() + STALL_SECONDS
    while not condition():
        assert run.launcher is not None
        if (code := run.launcher.poll()) is not None:
            raise SoakError(f"the run ended (exit code {code}) before its last kill; see {run.log}")
        if time.monotonic() > deadline:
            raise SoakError(f"nothing happened for {STALL_SECONDS} s; see {run.log}")
        time.sleep(pause)


def wait_for_phase(run: Run, planned: str, times: Times, rng: random.Random) -> None:
    """Returns at a random instant of the planned phase. If the phase is short, the workers are stopped (SIGSTOP).

    A phase seen by polling may be over before a signal arrives. The workers are therefore stopped first. If the phase
    has passed by then, they continue until it comes again. The third attempt accepts any phase.
    """
    if planned == "start-up":
        launched = not run.kills or run.kills[-1].target == "launcher"
        since = run.started + rng.uniform(0, (0.8 if launched else 0.5) * times.start)
        # Not later than the first step: the machine may have become faster since the reference run.
        wait_until(run, lambda: time.monotonic() >= since or has_logged(run, run.state()))
        return
    wait_until(run, lambda: has_logged(run, run.state()))
    if planned == "training":
        since = time.monotonic() + rng.uniform(0, 1.5 * times.cycle)
        last = run.state().logged + 2 * SAVE_EVERY
        wait_until(run, lambda: time.monotonic() >= since or run.state().logged >= last)
        return
    workers = [pid for _, pid in sorted(workers_of(run.output_dir).items())]  # rank 0 first
    length = {"save": times.save, "prune": 0.0, "evaluation": times.evaluation}[planned]
    for attempt in range(3):
        # Deleting takes almost no time: poll without a pause as soon as the save before it has begun.
        if planned == "prune":
            wait_until(run, lambda: run.state().saving > 0)
        wait_until(run, lambda: phase_of(run.state(), True) == planned, pause=0.001 if length else 0)
        time.sleep(rng.uniform(0, 0.8 * length))
        send(signal.SIGSTOP, workers)
        if attempt == 2 or phase_of(run.state(), True) == planned:
            return
        send(signal.SIGCONT, workers)


def kill(run: Run, target: str, planned: str, times: Times, rng: random.Random) -> None:
    """Kills `target` in the planned phase, checks the consequences, and starts the next attempt."""
    wait_for_phase(run, planned, times, rng)
    while not (workers := workers_of(run.output_dir)) and target != "launcher":  # none yet, early in the start-up
        wait_until(run, lambda: bool(workers_of(run.output_dir)))
    assert run.launcher is not None
    victims = {"launcher": [run.launcher.pid], "all": list(workers.values())}
    if target == "worker":
        rank = 0 if planned == "prune" else rng.choice(sorted(workers))  # only rank 0 prunes
        victims["worker"] = [workers[rank]]
    before = run.state()
    send(signal.SIGKILL, victims[target])
    if target == "launcher":  # the kernel kills its workers, also stopped ones
        run.launcher.wait()
        if not all_gone(run.output_dir, GONE_SECONDS):
            left = ", ".join(map(str, processes_of(run.output_dir).values()))
            run.problems.append(f"{left} outlived the launcher by {GONE_SECONDS} s after kill {len(run.kills) + 1}")
            run.end()
    else:
        send(signal.SIGCONT, workers.values())
        wait_until(run, lambda: not set(workers.values()) & processes_of(run.output_dir).keys(), pause=0.01)
    after = run.state()  # workers that died last may have completed a checkpoint or logged a step
    check_resumed(run, has_logged(run, after))
    record_kill(run, target, planned, before, after)
    if target == "launcher":
        run.start()
    run.started = time.monotonic()


def record_kill(run: Run, target: str, planned: str, before: State, after: State) -> None:
    """Records a kill, given the state just before it and the state after the last worker died."""
    done = max(after.logged, after.newest, after.saving) if has_logged(run, after) else after.newest
    repeated, phase = done - after.newest, phase_of(before, has_logged(run, before))
    run.kills.append(Kill(target, planned, phase, before.logged, after.newest, repeated))
    run.seen |= set(after.lines)
    if after.newest < before.newest:
        run.problems.append(f"the checkpoint of step {before.newest} vanished after kill {len(run.kills)}")
    if repeated > SAVE_EVERY:
        run.problems.append(f"kill {len(run.kills)} costs {repeated} steps, but saves are {SAVE_EVERY} steps apart")


def check_resumed(run: Run, has_logged: bool) -> None:
    """Checks that the attempt that has just ended resumed from the newest checkpoint at the kill before it."""
    with open(run.log, "rb") as log:
        log.seek(run.log_offset)
        text = log.read().decode(errors="replace")
    run.log_offset += len(text.encode(errors="replace"))
    steps = [int(step) for step in re.findall(r"resuming from .*?step_(\d{8,})", text)]
    expected = run.kills[-1].resumes_from if run.kills else 0
    if set(steps) - {expected} or (has_logged and len(steps) != bool(expected)):
        run.problems.append(
            f"after kill {len(run.kills)} it resumed from {steps or 'no'} checkpoint instead of {expected or 'none'}"
        )


def check_end(run: Run, reference: Path) -> list[str]:
    """Describes what is wrong at the end: differing results, leftover files and processes, too many repeated steps."""
    problems = find_differences(run.output_dir, reference)
    if not all_gone(run.output_dir, GONE_SECONDS):
        problems.append(f"processes are left: {processes_of(run.output_dir)}")
    if hidden := sorted(p.name for p in (run.output_dir / "checkpoints").glob(".*")):
        problems.append(f"left in checkpoints/: {', '.join(hidden)}")
    superseded = run.output_dir / "logs" / "metrics_superseded.jsonl"
    kept = set(superseded.read_text().splitlines()) if superseded.exists() else set()
    repeated = run.seen - set(run.state().lines)
    if kept != repeated:
        problems.append(f"{superseded} has {len(kept)} lines, but {len(repeated)} logged steps were repeated")
    if len(kept) > (most := sum(k.repeated for k in run.kills)):
        problems.append(f"{len(kept)} logged steps were repeated, but the checkpoints allow at most {most}")
    return problems
