"""A sweep: train_gpt.py with a grid or a list of settings, each run in its own folder.

    python scripts/sweep.py sweep.yaml                     # one run after the other
    python scripts/sweep.py sweep.yaml --gpus=4            # four at a time, each on its own GPU
    python scripts/sweep.py sweep.yaml --gpus=0,2 --dry_run
    python scripts/sweep.py sweep.yaml --jobs=2            # two at a time on a CPU
    python scripts/sweep.py sweep.yaml --slurm=sweep.sbatch && sbatch sweep.sbatch

The same command again skips runs that are done and resumes interrupted ones. docs/sweeps.md describes the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from util.ctrl_c import exit_on_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c()

import argparse
import shlex
import subprocess

from scripts.sweeping import runner, slurm
from scripts.sweeping.results import FINAL, STOPPED, Result, duration, number, read_result, table
from scripts.sweeping.settings import Run, check_record, read_sweep, write_record
from util.errors import CommandParser, UserError, run_command, user_errors
from util.files import take_lock

REPORT = Path(__file__).resolve().parent / "report.py"
EXIT_FAILED, EXIT_STOPPED = 1, 4  # those of train_gpt.py after a crash and after a signal


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = CommandParser(description=__doc__, allow_abbrev=False)
    p.add_argument("sweep", type=Path, metavar="FILE", help="the sweep, in YAML (docs/sweeps.md)")
    p.add_argument("--gpus", metavar="N|I,J", help="a number of GPUs, or their indices: a run on each at a time")
    p.add_argument("--gpus_per_run", type=int, default=1, help="processes of each run, under torchrun (default 1)")
    p.add_argument("--jobs", type=int, help="runs at a time without --gpus, which share the cores (default 1)")
    p.add_argument("--dry_run", action="store_true", help="print the commands, and do nothing")
    p.add_argument("--slurm", type=Path, metavar="FILE", help="write an array script for sbatch, and do nothing else")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep and returns the exit code: 0, or 1 if a run failed, or 4 if a signal stopped the sweep."""
    args = parse(argv)
    if args.slurm and (args.gpus is not None or args.jobs is not None):
        raise UserError(f"--slurm={args.slurm}: SLURM chooses the GPUs; leave --gpus and --jobs out")
    slots = runner.make_slots(args.gpus, args.gpus_per_run, args.jobs)
    output_dir, runs = read_sweep(args.sweep, args.gpus_per_run)
    record = check_record(output_dir, runs)
    results = {run: read_result(run.folder) for run in runs}
    todo = [run for run in runs if results[run].status not in FINAL]
    if args.dry_run:
        print_commands(runs, results, slots, args.gpus_per_run)
        return 0
    if not args.slurm:  # its nodes may have other disks
        check_shards(args.sweep, todo)
    with user_errors(f"output_dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
    lock, holder = take_lock(output_dir / ".lock")
    if holder:
        raise UserError(f"{output_dir}: in use by another sweep (process {holder}); wait for it")
    with lock:
        write_record(output_dir, record)
        if args.slurm:
            return write_slurm_script(args, todo)
        print(f"{output_dir}: {len(runs)} runs, {len(runs) - len(todo)} of them finished before", flush=True)
        stopped = train(todo, results, slots, args.gpus_per_run)
    print(table(results))
    return finish(output_dir, results, stopped)


def check_shards(path: Path, todo: list[Run]) -> None:
    """Raises UserError if a glob of shards matches no file, which otherwise every run would report after its start.

    The shards of a mixture are left to the runs.
    """
    from data.shards import find_shards  # imports numpy, which --help does not need

    patterns = {(flag, getattr(run.config, flag)) for run in todo for flag in ("input_train_bin", "input_val_bin")}
    for flag, pattern in sorted(patterns):
        if pattern and not ("=" in pattern and ":" in pattern):
            try:
                find_shards(pattern, flag)
            except UserError as e:
                raise UserError(f"{path}: {e}") from e


def print_commands(runs: list[Run], results: dict[Run, Result], slots: list[dict[str, str]], gpus_per_run: int) -> None:
    """Prints the command of each run, with the environment variables that it would have if all took equally long."""
    started = 0
    for run in runs:
        if results[run].status in FINAL:
            print(f"# {run.folder}: {results[run].status}")
            continue
        slot = slots[started % len(slots)]
        started += 1
        words = [f"{name}={value}" for name, value in slot.items()]
        print(shlex.join([*words, *runner.command(run, slot, gpus_per_run)]))


def write_slurm_script(args: argparse.Namespace, todo: list[Run]) -> int:
    if not todo:
        print("all runs are finished; no script written")
        return 0
    slurm.write_script(args.slurm, args.sweep, todo, args.gpus_per_run)
    print(f"{args.slurm}: {len(todo)} runs; submit it with: sbatch {shlex.quote(str(args.slurm))}")
    return 0


def train(todo: list[Run], results: dict[Run, Result], slots: list[dict[str, str]], gpus_per_run: int) -> bool:
    """Runs all, adds their results and prints a line for each. Returns whether a signal stopped the sweep."""
    count = 0

    def ended(run: Run, code: int, stopping: bool) -> None:
        nonlocal count
        count += 1
        result = read_result(run.folder)
        if result.status not in (*FINAL, *STOPPED):
            result = failure(run, result, code, stopping)
        results[run] = result
        losses = f"loss {number(result.loss)}, val loss {number(result.val_loss)}, {duration(result.seconds)}"
        why = f"; {result.reason}; see {run.folder / runner.CONSOLE}" if result.status == "failed" else ""
        print(f"[{count}/{len(todo)}] {run.name}: {result.status}, {losses}{why}", flush=True)

    return runner.run_all(todo, slots, gpus_per_run, ended)


def failure(run: Run, result: Result, code: int, stopping: bool) -> Result:
    """Returns the result of a run that ended without a status that says why."""
    if stopping and result.status in ("", "running"):
        return result._replace(status="stopped")
    reason = result.reason or f"exit code {code}: {runner.last_line(run)}"
    return result._replace(status="failed", reason=reason)


def finish(output_dir: Path, results: dict[Run, Result], stopped: bool) -> int:
    """Writes the report, prints how many runs failed or have not finished, and returns the exit code."""
    failed = sum(result.status in ("failed", "diverged") for result in results.values())
    left = sum(result.status not in FINAL for result in results.values())
    drawn = [str(run.folder) for run in results if (run.folder / "metrics.jsonl").is_file()]
    if drawn and not stopped and REPORT.is_file():
        sys.stdout.flush()
        subprocess.call([sys.executable, str(REPORT), *drawn, f"--output={output_dir / 'report.html'}"])
    if stopped:
        print(f"stopped with {left} of {len(results)} runs left; the same command resumes")
        return EXIT_STOPPED
    if left or failed:
        advice = f"; the same command runs {left} again" if left else ""
        print(f"{failed} of {len(results)} runs failed{advice}")
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    run_command(main)
