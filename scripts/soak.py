"""Does a run survive being killed? Trains undisturbed, then again under SIGKILLs, and compares the two bit for bit.

    python scripts/soak.py --kills=50 --stages=0,1,2,3 --ranks=2 --seed=1

Each kill hits one worker, all workers or the launcher, at a seeded random moment that is asked for in turn: start-up,
a save, a prune, an evaluation, or any in training. torchrun restarts dead workers; when it was killed itself, the same
command is given again. Held, per --zero_stage: the trace (all digits) and the final model and optimizer are those of
the undisturbed run; each life goes on from the newest checkpoint that stood at the kill; no process outlives its
launcher by 10 s; nothing half-written is left. Other flags are train_gpt.py's, to try a run of your own kind
(the defaults: a tiny model that saves and evaluates every 4 steps). Linux only.

Exit code 0 if all held, 1 if not, with what differed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cfg.config import load_config
from data.shards import write_shard
from model.formats.pretrained import open_pretrained
from util.errors import CommandParser, UserError, run_command

TARGETS = ("worker", "all", "launcher")
MOMENTS = ("start-up", "save", "prune", "evaluation", "training")
# What a step's record says of the training, as opposed to how long it took.
TRACE_KEYS = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
VOCAB = 251
FLAGS = [
    *("--n_layer=2", "--n_head=2", "--n_embd=64", f"--vocab_size={VOCAB}", "--tokenizer=none", "--dropout=0.1"),
    *("--sequence_length=32", "--batch_size=2", "--learning_rate=1e-3", "--warmup_iters=4"),
    *("--save_every_niter=4", "--keep_last=2", "--val_loss_every=4", "--val_max_steps=20", "--log_every=1"),
]
SAVE_EVERY = 4
GONE_SECONDS = 10  # within which no process of a run is left after its launcher's death
PATIENCE = 300  # seconds without any progress, after which a run hangs


class Broken(Exception):
    """A promise that did not hold, so that this run cannot go on."""


@dataclass(frozen=True)
class Kill:
    """One kill: what was asked for, the moment that it hit, and what it cost."""

    target: str
    asked: str
    moment: str
    step: int  # the last that was logged
    goes_on_from: int
    repeated: int  # steps whose update was made, and is made again


@dataclass(frozen=True)
class State:
    """What an output directory shows: lines of metrics.jsonl, the newest checkpoint, and what is hidden beside it."""

    lines: list[str]
    newest: int
    saving: int  # the step of a checkpoint that is being written; 0: none
    deleting: bool

    @property
    def logged(self) -> int:
        with suppress(IndexError, ValueError):
            return json.loads(self.lines[-1])["step"]
        return 0


@dataclass
class Times:
    """How long things take in the undisturbed run, in seconds; random moments are drawn from these."""

    start: float  # from the launcher's start to the first logged step
    cycle: float  # from one save to the next
    save: float
    evaluation: float


@dataclass
class Storm:
    """A run that is to be killed: how it is started, and what has been seen of it so far."""

    command: list[str]
    output_dir: Path
    log: Path  # all that its launchers and workers print
    launcher: subprocess.Popen[bytes] | None = None
    begun: float = 0.0  # time.monotonic() of the last start or restart
    read_to: int = 0  # of the log
    seen: set[str] = field(default_factory=set)  # lines of metrics.jsonl, of all lives but this
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def start(self) -> None:
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.launcher = subprocess.Popen(self.command, env=env, cwd=ROOT, start_new_session=True, **streams)
        self.begun = time.monotonic()


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and train_gpt.py's: the defaults, then those given. Raises UserError if either are not right."""
    p = CommandParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--kills", type=int, default=50, help="kills in the run of a stage (default 50)")
    p.add_argument("--stages", default="0,1,2,3", help="the --zero_stage of each run, by commas (default 0,1,2,3)")
    p.add_argument("--ranks", type=int, default=2, help="workers (default 2)")
    p.add_argument("--seed", type=int, default=1, help="of the moments, targets and the model (default 1)")
    p.add_argument("--device", default="cpu", help="as train_gpt.py's; default cpu")
    p.add_argument("--output_dir", help="a new folder for the runs; default: one in /tmp, deleted if all held")
    args, flags = p.parse_known_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("soak.py finds a run's processes in /proc; use Linux")
    for name in ("kills", "ranks"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    if not re.fullmatch(r"[0-3](,[0-3])*", args.stages):
        raise UserError(f"--stages={args.stages} must be numbers from 0 to 3, as in --stages=0,3")
    for name in ("num_iterations", "save_every_niter", "val_loss_every", "zero_stage", "resume"):
        if any(flag.partition("=")[0] == f"--{name}" for flag in flags):
            raise UserError(f"--{name} is what soak.py chooses; leave it out")
    folder = Path(args.output_dir or "")
    if args.output_dir and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir={folder} is not empty; choose a new folder")
    flags = [*FLAGS, f"--total_batch_size={2 * 64 * args.ranks}", *flags]  # two micro-steps
    load_config(flags, args.ranks, open_pretrained)
    return args, flags


# What a run has done: its trace, its final state, its processes.


def trace_of(output_dir: Path) -> list[dict[str, Any]]:
    """The numbers of a run that must not depend on how it was interrupted, in full precision."""
    lines = look(output_dir).lines
    return [{k: record[k] for k in TRACE_KEYS if k in record} for record in map(json.loads, lines)]


def look(output_dir: Path) -> State:
    metrics, checkpoints = output_dir / "metrics.jsonl", output_dir / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps: dict[str, list[int]] = {"step_": [], ".saving_": []}
    for name in names:
        for prefix, found in steps.items():
            if name.startswith(prefix):
                found.append(int(name.removeprefix(prefix)))
    newest, saving = (max(found, default=0) for found in steps.values())
    return State(lines, newest, saving, any(name.startswith(".deleting_") for name in names))


def differences(output_dir: Path, reference: Path) -> list[str]:
    """In which a run differs from the undisturbed one: the first step of the trace, files of the last checkpoint."""
    found = []
    records, expected = trace_of(output_dir), trace_of(reference)
    if len(records) != len(expected):
        found.append(f"{len(records)} steps are logged instead of {len(expected)}")
    if first := next(((a, b) for a, b in zip(records, expected, strict=False) if a != b), None):
        found.append(f"the trace differs from step {first[1]['step']} on: {first[0]} instead of {first[1]}")
    last = f"checkpoints/step_{expected[-1]['step']:08d}"
    for kind in ("model", "optimizer"):
        ours, theirs = tensors_in(output_dir / last / kind), tensors_in(reference / last / kind)
        if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            found.append(f"{len(odd)} of {len(theirs)} tensors of the {kind} differ: {', '.join(odd[:3])} ...")
    return found


def tensors_in(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Name and file → type, shape, place in the whole tensor, and bytes, of a folder of safetensors files.

    The format: https://huggingface.co/docs/safetensors. The headers of equal tensors may differ in their order.
    """
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        places = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
        for name, about in header.items():
            begin, end = (start + offset for offset in about["data_offsets"])
            found[f"{name} ({path.name})"] = (about["dtype"], about["shape"], places.get(name), content[begin:end])
    return found


def processes_of(output_dir: Path) -> dict[int, int | str]:
    """The processes of a run, by their command lines: a worker's rank, "torchrun", or the "script". No zombies."""
    found: dict[int, int | str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if f"--output_dir={output_dir}" not in words:
                continue
            variables = (process / "environ").read_text().split("\0")
        except OSError:
            continue  # it has just ended
        ranks = [int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")]
        found[int(process.name)] = ranks[0] if ranks else "script" if words[0] == "bash" else "torchrun"
    return found


def all_gone(output_dir: Path, seconds: float) -> bool:
    """Whether no process of the run is left; waits that long for it."""
    deadline = time.monotonic() + seconds
    while processes_of(output_dir) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not processes_of(output_dir)


def workers_of(output_dir: Path) -> dict[int, int]:
    """Rank → process."""
    return {rank: pid for pid, rank in processes_of(output_dir).items() if isinstance(rank, int)}


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all(storm: Storm) -> None:
    """Leaves no process of the run, whatever state it is in."""
    if storm.launcher is not None:
        storm.launcher.kill()
        storm.launcher.wait()
    deadline = time.monotonic() + GONE_SECONDS
    while (left := processes_of(storm.output_dir)) and time.monotonic() < deadline:
        send(signal.SIGKILL, left)
        time.sleep(0.02)


# Killing.


def moment_of(state: State, fresh: bool) -> str:
    """Which moment it is. `fresh`: this life has logged something. A checkpoint precedes its step's line."""
    if not fresh:
        return "start-up"
    if state.deleting:
        return "prune"
    if state.saving:
        return "save"
    return "evaluation" if state.newest > state.logged else "training"


def wait_until(storm: Storm, condition: Callable[[], bool], pause: float = 0.001) -> None:
    """Raises Broken if the run ends first, or nothing happens for PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert storm.launcher is not None
        if (code := storm.launcher.poll()) is not None:
            raise Broken(f"the run ended (exit code {code}), though it was to be killed once more; see {storm.log}")
        if time.monotonic() > deadline:
            raise Broken(f"nothing happened for {PATIENCE} s; see {storm.log}")
        time.sleep(pause)


def is_fresh(storm: Storm, state: State) -> bool:
    return bool(state.lines) and state.lines[-1] not in storm.seen


def await_moment(storm: Storm, asked: str, times: Times, chance: random.Random) -> None:
    """Returns at a random instant of the moment asked for, the workers frozen if it is a short one.

    What is seen by polling may be over before a signal arrives. So the workers are stopped, and if the moment has
    passed by then, they go on until the next such; after the third time whatever moment it is will do.
    """
    if asked == "start-up":
        launched = not storm.kills or storm.kills[-1].target == "launcher"
        since = storm.begun + chance.uniform(0, (0.8 if launched else 0.5) * times.start)
        # Not later than the first step, on a machine that has become faster than it was undisturbed.
        wait_until(storm, lambda: time.monotonic() >= since or is_fresh(storm, look(storm.output_dir)))
        return
    wait_until(storm, lambda: is_fresh(storm, look(storm.output_dir)))
    if asked == "training":
        since = time.monotonic() + chance.uniform(0, 1.5 * times.cycle)
        last = look(storm.output_dir).logged + 2 * SAVE_EVERY
        wait_until(storm, lambda: time.monotonic() >= since or look(storm.output_dir).logged >= last)
        return
    workers = [pid for _, pid in sorted(workers_of(storm.output_dir).items())]  # rank 0 first
    length = {"save": times.save, "prune": 0.0, "evaluation": times.evaluation}[asked]
    for attempt in range(3):
        if asked == "prune":  # a few files are deleted in no time: without a pause from the save before it on
            wait_until(storm, lambda: look(storm.output_dir).saving > 0)
        wait_until(storm, lambda: moment_of(look(storm.output_dir), True) == asked, pause=0.001 if length else 0)
        time.sleep(chance.uniform(0, 0.8 * length))
        send(signal.SIGSTOP, workers)
        if attempt == 2 or moment_of(look(storm.output_dir), True) == asked:
            return
        send(signal.SIGCONT, workers)


def strike(storm: Storm, target: str, asked: str, times: Times, chance: random.Random) -> None:
    """Kills `target` at the moment `asked`, and waits for the consequences, up to the next life."""
    await_moment(storm, asked, times, chance)
    while not (workers := workers_of(storm.output_dir)) and target != "launcher":  # there may be none at start-up
        wait_until(storm, lambda: bool(workers_of(storm.output_dir)))
    assert storm.launcher is not None
    victims = {"launcher": [storm.launcher.pid], "all": list(workers.values())}
    if target == "worker":
        rank = 0 if asked == "prune" else chance.choice(sorted(workers))  # rank 0 prunes
        victims["worker"] = [workers[rank]]
    before = look(storm.output_dir)
    send(signal.SIGKILL, victims[target])
    if target == "launcher":  # the kernel ends its workers as they are, frozen or not
        storm.launcher.wait()
        if not all_gone(storm.output_dir, GONE_SECONDS):
            left = ", ".join(map(str, processes_of(storm.output_dir).values()))
            storm.problems.append(f"{left} outlived the launcher by {GONE_SECONDS} s after kill {len(storm.kills) + 1}")
            end_all(storm)
    else:
        send(signal.SIGCONT, workers.values())
        wait_until(storm, lambda: not set(workers.values()) & processes_of(storm.output_dir).keys(), pause=0.01)
    after = look(storm.output_dir)  # who has been hit last may have completed a checkpoint, or logged a step
    check_resumed(storm, is_fresh(storm, after))
    note(storm, target, asked, before, after)
    if target == "launcher":
        storm.start()
    storm.begun = time.monotonic()


def note(storm: Storm, target: str, asked: str, before: State, after: State) -> None:
    """Records a kill: what there was just before it, and when all that it hit were dead."""
    done = max(after.logged, after.newest, after.saving) if is_fresh(storm, after) else after.newest
    repeated, moment = done - after.newest, moment_of(before, is_fresh(storm, before))
    storm.kills.append(Kill(target, asked, moment, before.logged, after.newest, repeated))
    storm.seen |= set(after.lines)
    if after.newest < before.newest:
        storm.problems.append(f"the checkpoint of step {before.newest} vanished after kill {len(storm.kills)}")
    if repeated > SAVE_EVERY:
        storm.problems.append(f"kill {len(storm.kills)} costs {repeated} steps, more than the {SAVE_EVERY} of a save")


def check_resumed(storm: Storm, fresh: bool) -> None:
    """The life that has just ended had gone on from the newest checkpoint that stood at the kill before it."""
    with open(storm.log, "rb") as log:
        log.seek(storm.read_to)
        told = log.read().decode(errors="replace")
    storm.read_to += len(told.encode(errors="replace"))
    steps = [int(step) for step in re.findall(r"resuming from .*?step_(\d{8,})", told)]
    expected = storm.kills[-1].goes_on_from if storm.kills else 0
    if set(steps) - {expected} or (fresh and len(steps) != bool(expected)):
        storm.problems.append(
            f"after kill {len(storm.kills)} it resumed from {steps or 'no'} checkpoint instead of {expected or 'none'}"
        )


def plan(kills: int, chance: random.Random) -> list[tuple[str, str]]:
    """(target, moment) of each kill: every moment once in five, every target once in three, in random order."""
    columns = []
    for names in (TARGETS, MOMENTS):
        rounds = (chance.sample(names, len(names)) for _ in range(-(-kills // len(names))))
        columns.append([name for each in rounds for name in each][:kills])
    return list(zip(*columns, strict=True))


# Runs.


def undisturbed(storm: Storm, name: str) -> Times:
    """Trains without a kill, and measures. Raises UserError if that fails."""
    storm.start()
    assert storm.launcher is not None
    started = 0.0
    while storm.launcher.poll() is None:
        if not started and look(storm.output_dir).lines:
            started = time.monotonic() - storm.begun
        time.sleep(0.005)
    if storm.launcher.returncode:
        said = [line for line in storm.log.read_text(errors="replace").splitlines() if "error: " in line]
        reason = said[0].partition("error: ")[2] if said else f"exit code {storm.launcher.returncode}"
        raise UserError(f"{name}: also undisturbed the run fails: {reason}; see {storm.log}")
    records = [json.loads(line) for line in look(storm.output_dir).lines]
    elapsed = [record["elapsed_s"] for record in records]
    gaps = [b - a for a, b in zip(elapsed, elapsed[1:], strict=False)]
    step = statistics.median(gaps)
    save = statistics.median(record["save_s"] for record in records if "save_s" in record)
    saved = statistics.median(gap for r, gap in zip(records, gaps, strict=False) if "save_s" in r)
    return Times(started, SAVE_EVERY * (elapsed[-1] - elapsed[0]) / len(gaps), save, max(0.0, saved - save - step))


def disturbed(storm: Storm, moments: list[tuple[str, str]], times: Times, chance: random.Random, name: str) -> None:
    """Trains through all the kills to the end."""
    storm.start()
    for i, (target, asked) in enumerate(moments):
        strike(storm, target, asked, times, chance)
        k = storm.kills[-1]
        print(
            f"{name}, kill {i + 1}/{len(moments)}: {target} in {k.moment}"
            f"{f' (asked: {asked})' if asked != k.moment else ''}, step {k.step}; goes on from {k.goes_on_from},"
            f" {k.repeated} steps again",
            flush=True,
        )
    assert storm.launcher is not None
    try:
        code = storm.launcher.wait(PATIENCE)
    except subprocess.TimeoutExpired as e:
        raise Broken(f"after the last kill it did not end within {PATIENCE} s; see {storm.log}") from e
    if code:
        raise Broken(f"after the last kill it ended with exit code {code}; see {storm.log}")
    check_resumed(storm, fresh=True)


def last_checks(storm: Storm, reference: Path) -> list[str]:
    """What is wrong when all is over: the result, what is left behind, the steps that were repeated."""
    found = differences(storm.output_dir, reference)
    if not all_gone(storm.output_dir, GONE_SECONDS):
        found.append(f"processes are left: {processes_of(storm.output_dir)}")
    if hidden := sorted(p.name for p in (storm.output_dir / "checkpoints").glob(".*")):
        found.append(f"left in checkpoints/: {', '.join(hidden)}")
    superseded = storm.output_dir / "logs" / "metrics_superseded.jsonl"
    kept = set(superseded.read_text().splitlines()) if superseded.exists() else set()
    again = storm.seen - set(look(storm.output_dir).lines)
    if kept != again:
        found.append(f"{superseded} holds {len(kept)} lines; logged and repeated were {len(again)}")
    if len(kept) > (total := sum(k.repeated for k in storm.kills)):
        found.append(f"{len(kept)} logged steps were repeated, by the checkpoints it can have been {total}")
    return found


def table(kills: list[Kill]) -> str:
    """Kills by target and by the moment that they hit."""
    counts = Counter((k.target, k.moment) for k in kills)
    rows = [f"{'':10}" + "".join(f"{moment:>12}" for moment in MOMENTS)]
    rows += [f"{t:10}" + "".join(f"{counts[t, moment]:12}" for moment in MOMENTS) for t in TARGETS]
    return "\n".join(rows)


def soak(
    stage: int, args: argparse.Namespace, flags: list[str], folder: Path, moments: list[tuple[str, str]] | None = None
) -> tuple[list[Kill], list[str]]:
    """Both runs of a stage, on the shards in `folder`; `moments` as `plan` gives them, the default.

    Returns the kills, and what did not hold.
    """
    name, began = f"stage {stage}", time.monotonic()
    chance = random.Random(f"{args.seed} {stage}")
    moments = moments or plan(args.kills, chance)
    steps = SAVE_EVERY * (len(moments) + 4)  # two kills in five move it on by nothing, one by more than one save
    data = [f"--input_{kind}_bin={folder}/shards/*_{kind}_*.bin" for kind in ("train", "val")]
    exact = ["--deterministic=1"] if args.device != "cpu" else []

    def run(kind: str, restarts: int) -> Storm:
        output_dir = folder / f"stage{stage}" / kind
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        chosen = [f"--num_iterations={steps}", f"--zero_stage={stage}", f"--device={args.device}"]
        chosen += [f"--seed={args.seed}", f"--output_dir={output_dir}"]
        launch = [*python, f"--max-restarts={restarts}", "train_gpt.py"]
        return Storm([*launch, *data, *exact, *flags, *chosen], output_dir, output_dir.with_suffix(".log"))

    reference, storm = run("undisturbed", 0), run("killed", len(moments))
    try:
        times = undisturbed(reference, name)
        print(f"{name}: {steps} steps undisturbed in {time.monotonic() - began:.0f} s; now with kills", flush=True)
        disturbed(storm, moments, times, chance, name)
        storm.problems += last_checks(storm, reference.output_dir)
    except Broken as e:
        storm.problems.append(str(e))
    finally:
        end_all(reference)
        end_all(storm)
    report(name, storm, time.monotonic() - began)
    return storm.kills, storm.problems


def report(name: str, storm: Storm, seconds: float) -> None:
    again = [k.repeated for k in storm.kills] or [0]
    print(table(storm.kills))
    print(
        f"{name}: {len(storm.kills)} kills in {seconds:.0f} s; steps repeated: at most {max(again)}, mean"
        f" {statistics.mean(again):.2f}, saved every {SAVE_EVERY}"
    )
    for problem in storm.problems:
        print(f"{name}: {problem}")
    print(f"{name}: {'DID NOT HOLD' if storm.problems else 'held: bit-equal to the undisturbed run'}", flush=True)


def make_shards(folder: Path) -> None:
    """Counting modulo the vocabulary, which can be learned."""
    folder.mkdir(parents=True)
    tokens = np.arange(40_000) % VOCAB
    write_shard(folder / "count_val_000000.bin", tokens[:10_000], VOCAB)
    write_shard(folder / "count_train_000001.bin", tokens[10_000:], VOCAB)


def main(args: argparse.Namespace, flags: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as Ctrl-C does, and leave no process
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    folder = Path(args.output_dir or tempfile.mkdtemp(prefix="soak_")).resolve()
    make_shards(folder / "shards")
    try:
        broken = [stage for stage in map(int, args.stages.split(",")) if soak(stage, args, flags, folder)[1]]
    except KeyboardInterrupt:
        if not args.output_dir:
            shutil.rmtree(folder)
        raise
    if broken:
        print(f"did not hold: stage {', '.join(map(str, broken))}; see {folder}")
        return 1
    print(f"all held: {args.kills} kills in each of the stages {args.stages}")
    if not args.output_dir:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*parse()))
