"""Trains undisturbed, then trains again under random SIGKILLs, and compares the two runs bit for bit.

    bash scripts/soak.sh --kills=50 --stages=0,1,2,3 --ranks=2 --seed=1

Each kill hits one worker, all workers or the launcher, in one of five phases: start-up, save, prune, evaluation or any
time in training. torchrun restarts killed workers; after a kill of the launcher, the command is started again.
For each --zero_stage it checks: the trace (all digits), final model and final optimizer equal those of the undisturbed
run; each attempt resumes from the newest checkpoint at the kill; all workers end within 10 s of their launcher; no
partial files are left. Other flags are passed to train_gpt.py. The default is a tiny model that saves and evaluates
every 4 steps. Linux only.

Exit code 0 if everything held; otherwise 1, and the differences are printed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from cfg.config import load_config
from data.shards import write_shard
from tests.soak.kills import (
    PHASES,
    SAVE_EVERY,
    STALL_SECONDS,
    TARGETS,
    Kill,
    Run,
    SoakError,
    Times,
    check_end,
    check_resumed,
    kill,
    plan_kills,
)
from util.errors import CommandParser, UserError, run_command

VOCAB = 251
FLAGS = [
    *("--n_layer=2", "--n_head=2", "--n_embd=64", f"--vocab_size={VOCAB}", "--tokenizer=none", "--dropout=0.1"),
    *("--sequence_length=32", "--batch_size=2", "--warmup_iters=4"),
    *("--save_every_niter=4", "--keep_last=2", "--val_loss_every=4", "--val_max_steps=20", "--log_every=1"),
]


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of this command and the checked flags for train_gpt.py."""
    p = CommandParser(prog="soak.sh", description=__doc__, allow_abbrev=False)
    p.add_argument("--kills", type=int, default=50, help="kills per stage (default 50)")
    p.add_argument("--stages", default="0,1,2,3", help="comma-separated --zero_stage values (default 0,1,2,3)")
    p.add_argument("--ranks", type=int, default=2, help="workers (default 2)")
    p.add_argument("--seed", type=int, default=1, help="seed of the kills and of the model (default 1)")
    p.add_argument("--device", default="cpu", help="--device of train_gpt.py (default cpu)")
    p.add_argument(
        "--output_dir", type=Path, help="a new folder for the runs; default: one in /tmp, deleted if everything held"
    )
    args, flags = p.parse_known_args(argv)
    if not sys.platform.startswith("linux"):
        raise UserError("soak.sh finds the processes of a run in /proc; use Linux")
    for name in ("kills", "ranks"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    if not re.fullmatch(r"[0-3](,[0-3])*", args.stages):
        raise UserError(f"--stages={args.stages} must be numbers from 0 to 3, as in --stages=0,3")
    for name in ("num_iterations", "save_every_niter", "val_loss_every", "zero_stage", "resume"):
        if any(flag.partition("=")[0] == f"--{name}" for flag in flags):
            raise UserError(f"--{name} is chosen by soak.sh; leave it out")
    folder = Path(args.output_dir or "")
    if args.output_dir and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir={folder} is not empty; choose a new folder")
    flags = [*FLAGS, f"--total_batch_size={2 * 64 * args.ranks}", *flags]  # two micro-steps
    load_config(flags, args.ranks)
    return args, flags


def make_shards(folder: Path) -> None:
    """Writes shards of numbers that count modulo the vocabulary size, which a tiny model can learn."""
    folder.mkdir(parents=True)
    tokens = np.arange(40_000) % VOCAB
    write_shard(folder / "count_val_000000.bin", tokens[:10_000], VOCAB)
    write_shard(folder / "count_train_000001.bin", tokens[10_000:], VOCAB)


def train_undisturbed(run: Run, name: str) -> Times:
    """Trains without a kill and returns how long things take."""
    run.start()
    assert run.launcher is not None
    first_step = 0.0
    while run.launcher.poll() is None:
        if not first_step and run.state().lines:
            first_step = time.monotonic() - run.started
        time.sleep(0.005)
    if run.launcher.returncode:
        errors = [line for line in run.log.read_text(errors="replace").splitlines() if "error: " in line]
        reason = errors[0].partition("error: ")[2] if errors else f"exit code {run.launcher.returncode}"
        raise UserError(f"{name}: the run fails even without a kill: {reason}; see {run.log}")
    records = [json.loads(line) for line in run.state().lines]
    elapsed = [record["elapsed_s"] for record in records]
    gaps = [b - a for a, b in zip(elapsed, elapsed[1:], strict=False)]
    step = statistics.median(gaps)
    save = statistics.median(record["save_s"] for record in records if "save_s" in record)
    saved = statistics.median(gap for r, gap in zip(records, gaps, strict=False) if "save_s" in r)
    return Times(first_step, SAVE_EVERY * (elapsed[-1] - elapsed[0]) / len(gaps), save, max(0.0, saved - save - step))


def train_with_kills(run: Run, plan: list[tuple[str, str]], times: Times, rng: random.Random, name: str) -> None:
    """Trains to the end through all the kills."""
    run.start()
    for i, (target, planned) in enumerate(plan):
        kill(run, target, planned, times, rng)
        k = run.kills[-1]
        print(
            f"{name}, kill {i + 1}/{len(plan)}: {target} in {k.phase}"
            f"{f' (planned: {planned})' if planned != k.phase else ''}, step {k.step};"
            f" resumes from {k.resumes_from}, {k.repeated} steps repeated",
            flush=True,
        )
    assert run.launcher is not None
    try:
        code = run.launcher.wait(STALL_SECONDS)
    except subprocess.TimeoutExpired as e:
        raise SoakError(f"it did not end within {STALL_SECONDS} s of the last kill; see {run.log}") from e
    if code:
        raise SoakError(f"it ended with exit code {code} after the last kill; see {run.log}")
    check_resumed(run, has_logged=True)


def soak_stage(
    stage: int, args: argparse.Namespace, flags: list[str], folder: Path, plan: list[tuple[str, str]] | None = None
) -> tuple[list[Kill], list[str]]:
    """Runs one stage undisturbed and with kills, on the shards in `folder`. Returns the kills and the problems.

    `plan`: (target, phase) of each kill; default: random.
    """
    name, began = f"stage {stage}", time.monotonic()
    rng = random.Random(f"{args.seed} {stage}")
    plan = plan or plan_kills(args.kills, rng)
    # Of five kills, two let the run advance by no step and one by more than one save.
    steps = SAVE_EVERY * (len(plan) + 4)
    data = [f"--input_{kind}_bin={folder}/shards/*_{kind}_*.bin" for kind in ("train", "val")]
    deterministic = ["--deterministic=1"] if args.device != "cpu" else []

    def make_run(kind: str, restarts: int) -> Run:
        output_dir = folder / f"stage{stage}" / kind
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        chosen = [f"--num_iterations={steps}", f"--zero_stage={stage}", f"--device={args.device}"]
        chosen += [f"--seed={args.seed}", f"--output_dir={output_dir}"]
        command = [*torchrun, f"--max-restarts={restarts}", "train_gpt.py"]
        return Run([*command, *data, *deterministic, *flags, *chosen], output_dir, output_dir.with_suffix(".log"))

    reference, run = make_run("undisturbed", 0), make_run("killed", len(plan))
    try:
        times = train_undisturbed(reference, name)
        print(f"{name}: {steps} steps undisturbed in {time.monotonic() - began:.0f} s; now with kills", flush=True)
        train_with_kills(run, plan, times, rng, name)
        run.problems += check_end(run, reference.output_dir)
    except SoakError as e:
        run.problems.append(str(e))
    finally:
        reference.end()
        run.end()
    print_report(name, run, time.monotonic() - began)
    return run.kills, run.problems


def print_report(name: str, run: Run, seconds: float) -> None:
    repeated = [k.repeated for k in run.kills] or [0]
    print(table(run.kills))
    print(
        f"{name}: {len(run.kills)} kills in {seconds:.0f} s; steps repeated per kill: at most {max(repeated)},"
        f" mean {statistics.mean(repeated):.2f}; saves are {SAVE_EVERY} steps apart"
    )
    for problem in run.problems:
        print(f"{name}: {problem}")
    print(f"{name}: {'FAILED' if run.problems else 'held: bit-equal to the undisturbed run'}", flush=True)


def table(kills: list[Kill]) -> str:
    """Counts the kills by target and phase."""
    counts = Counter((k.target, k.phase) for k in kills)
    rows = [f"{'':10}" + "".join(f"{phase:>12}" for phase in PHASES)]
    rows += [f"{t:10}" + "".join(f"{counts[t, phase]:12}" for phase in PHASES) for t in TARGETS]
    return "\n".join(rows)


def main(args: argparse.Namespace, flags: list[str]) -> int:
    """Soaks all stages and returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as after Ctrl-C, and leave no process
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    folder = Path(args.output_dir or tempfile.mkdtemp(prefix="soak_")).resolve()
    make_shards(folder / "shards")
    try:
        failed = [stage for stage in map(int, args.stages.split(",")) if soak_stage(stage, args, flags, folder)[1]]
    except KeyboardInterrupt:
        if not args.output_dir:
            shutil.rmtree(folder)
        raise
    if failed:
        print(f"failed: stage {', '.join(map(str, failed))}; see {folder}")
        return 1
    print(f"everything held: {args.kills} kills in each of the stages {args.stages}")
    if not args.output_dir:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(*parse()))
