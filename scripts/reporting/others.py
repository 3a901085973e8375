"""Logs of other programs as runs: nanoGPT's console output, llm.c's main.log, CSV exports of Weights & Biases.

Steps are counted as in rawgpt: the training loss of step k is that before the k-th update, validation after it. nanoGPT
and llm.c number training steps from 0, so 1 is added to those.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from scripts.reporting.read import Records, Run
from util.errors import UserError, closest, user_errors
from util.values import user_path

Steps = dict[int, dict[str, Any]]
STEP, DECIMAL = r"(\d{1,15})", r"(\d{1,30}(?:\.\d+)?)"
NUMBER = r"(-?\d{1,30}(?:\.\d+)?(?:e[+-]?\d+)?|-?nan|-?inf)"
NANOGPT_ITER = re.compile(rf"iter {STEP}: loss {NUMBER}, time {DECIMAL}ms(?:, mfu {NUMBER}%)?")
NANOGPT_EVAL = re.compile(rf"step {STEP}: train loss {NUMBER}, val loss {NUMBER}")
NANOGPT_TOKENS = re.compile(r"tokens per iteration will be: (\d[\d,]{0,20})")
NANOGPT_SIZE = re.compile(rf"number of parameters: {DECIMAL}M")
LLMC_LINE = re.compile(rf"s:{STEP} (tel|trl|eval):{NUMBER}(?: lr:{NUMBER})?(?: norm:{NUMBER})?")
# The last part of a column's name, or all of it, → the name in metrics.jsonl.
WANDB_NAMES = {
    "loss": "loss", "train/loss": "loss", "train_loss": "loss", "train-loss": "loss", "trl": "loss",
    "val/loss": "val_loss", "val_loss": "val_loss", "eval/loss": "val_loss", "eval_loss": "val_loss",
    "valid/loss": "val_loss", "validation/loss": "val_loss", "tel": "val_loss", "val_bpb": "val_bpb",
    "val/bpb": "val_bpb",
    "lr": "lr", "learning_rate": "lr", "train/lr": "lr", "train/learning_rate": "lr",
    "grad_norm": "grad_norm", "train/grad_norm": "grad_norm", "norm": "grad_norm",
    "tok_per_s": "tok_per_s", "train/tok_per_sec": "tok_per_s", "tokens_per_sec": "tok_per_s", "mfu": "mfu",
    "train/mfu": "mfu", "tokens": "tokens", "elapsed_s": "elapsed_s", "_runtime": "elapsed_s",
    "memory_bytes": "memory_bytes", "hellaswag_acc_norm": "hellaswag_acc_norm",
}  # fmt: skip
WANDB_STEPS = ("step", "_step", "global_step", "trainer/global_step", "train/global_step", "iter")


def import_runs(given: list[str], tokens_per_step: int | None) -> list[Run]:
    """Returns the runs in the logs `given` as FORMAT:FILE. A W&B export may hold several."""
    found = []
    for value in given:
        kind, _, name = value.partition(":")
        if kind not in FORMATS or not name:
            near = closest(kind, FORMATS)
            hint = (
                f"did you mean {near}:FILE?"
                if near and near != kind
                else f"give one of {', '.join(FORMATS)} and a file"
            )
            raise UserError(f"--import={value}: must be FORMAT:FILE; {hint}")
        path = user_path(name)
        with user_errors(f"--import={value}"), open(path, errors="replace", newline="") as file:
            runs = FORMATS[kind](file, path, tokens_per_step)
        if not any(len(run.table.steps) for run in runs):
            raise UserError(f"--import={value}: has no line that {SOURCES[kind]} writes; is it another format's file?")
        found += runs
    return found


def to_run(steps: Steps, name: str, path: Path, kind: str) -> Run:
    """Returns a run of records by step, as metrics.jsonl has them."""
    records = Records()
    for step in sorted(steps):
        records.add({"step": step, **steps[step]})
    return Run(name, path, SOURCES[kind], records.table(), modified=path.stat().st_mtime)


def read_nanogpt(lines: Iterable[str], path: Path, tokens_per_step: int | None) -> list[Run]:
    """Reads nanoGPT's console output. The training time is estimated from the logged iterations.

    Formats: train.py at 3adf61e.
    """
    steps: Steps = {}
    elapsed, before, parameters = 0.0, -1, None
    for line in lines:
        if found := NANOGPT_TOKENS.search(line):
            tokens_per_step = int(found[1].replace(",", ""))
        elif found := NANOGPT_SIZE.search(line):
            parameters = round(float(found[1]) * 1e6)
        elif found := NANOGPT_EVAL.search(line):
            steps.setdefault(int(found[1]), {})["val_loss"] = float(found[3])
        elif found := NANOGPT_ITER.search(line):
            step, seconds = int(found[1]) + 1, float(found[3]) / 1000
            elapsed, before = elapsed + seconds * max(1, step - 1 - before), step - 1
            record = steps.setdefault(step, {})
            record |= {"loss": float(found[2]), "elapsed_s": elapsed}
            if found[4] and float(found[4]) >= 0:  # it prints -100 before it knows
                record["mfu"] = float(found[4]) / 100
            if tokens_per_step and seconds:
                record["tok_per_s"] = tokens_per_step / seconds
    add_tokens(steps, tokens_per_step)
    run = to_run(steps, path.stem, path, "nanogpt")
    if parameters:
        run.starts = [{"step": 0, "parameters": parameters}]
    return [run]


def read_llmc(lines: Iterable[str], path: Path, tokens_per_step: int | None) -> list[Run]:
    """Reads llm.c's main.log: tel is the validation loss, trl the training loss, eval HellaSwag's acc_norm.

    Formats: llmc/logger.h at f1e2ace.
    """
    steps: Steps = {}
    names = {"tel": "val_loss", "trl": "loss", "eval": "hellaswag_acc_norm"}
    for line in lines:
        if found := LLMC_LINE.match(line):
            record = steps.setdefault(int(found[1]) + (found[2] == "trl"), {})
            record[names[found[2]]] = float(found[3])
            record |= {name: float(found[i]) for name, i in (("lr", 4), ("grad_norm", 5)) if found[i]}
    add_tokens(steps, tokens_per_step)
    return [to_run(steps, path.stem, path, "llmc")]


def add_tokens(steps: Steps, tokens_per_step: int | None) -> None:
    """Adds the tokens until each step, and the time of steps without one, to records that lack them."""
    elapsed = 0.0
    has_time = any("elapsed_s" in record for record in steps.values())
    for step, record in sorted(steps.items()):
        if tokens_per_step:
            record["tokens"] = step * tokens_per_step
        if has_time:
            elapsed = record.setdefault("elapsed_s", elapsed)


def read_wandb(file: Iterable[str], path: Path, tokens_per_step: int | None) -> list[Run]:
    """Reads a CSV export of a chart, whose columns are named `RUN - METRIC`, or of a run's history."""
    rows = _csv_rows(file, path)
    head = [name.strip() for name in next(rows, [])]
    step_column = next((i for i, name in enumerate(head) if name.lower() in WANDB_STEPS), None)
    if step_column is None:
        raise UserError(f"--import=wandb:{path}: has no column of steps (one of {', '.join(WANDB_STEPS)})")
    columns = {}  # column → run, metric
    for i, title in enumerate(head):
        run, _, metric = title.rpartition(" - ")
        name = WANDB_NAMES.get(metric.lower()) or WANDB_NAMES.get(metric.lower().rpartition("/")[2])
        if i != step_column and name and not metric.endswith(("__MIN", "__MAX")):
            columns[i] = run or path.stem, name
    runs: dict[str, Steps] = {run: {} for run, _ in columns.values()}
    for row in rows:
        for i, (run, name) in columns.items():
            value = number(row[i]) if i < len(row) else None
            step = number(row[step_column]) if value is not None and step_column < len(row) else None
            if value is not None and step is not None and 0 <= step < 2**53:
                runs[run].setdefault(int(step), {})[name] = value
    for steps in runs.values():
        scale_mfu(steps)
        if not any("tokens" in record for record in steps.values()):
            add_tokens(steps, tokens_per_step)
    return [to_run(steps, run, path, "wandb") for run, steps in runs.items() if steps]


def _csv_rows(file: Iterable[str], path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(file)
    except csv.Error as e:
        raise UserError(f"--import=wandb:{path}: is not a CSV file ({e})") from e


def number(text: str) -> float | None:
    """Returns a cell as a number, None if it is empty or text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isinf(value) else value


def scale_mfu(steps: Steps) -> None:
    """Turns an MFU in percent, as nanoGPT logs it, into a share, and drops its -100 for unknown."""
    values = [record["mfu"] for record in steps.values() if "mfu" in record]
    percent = any(value > 1.5 or value < 0 for value in values)
    for record in steps.values():
        if percent and "mfu" in record:
            record["mfu"] = record["mfu"] / 100 if record["mfu"] >= 0 else math.nan


Reader = Callable[[Iterable[str], Path, int | None], list[Run]]
FORMATS: dict[str, Reader] = {"nanogpt": read_nanogpt, "llmc": read_llmc, "wandb": read_wandb}
SOURCES = {"nanogpt": "nanoGPT", "llmc": "llm.c", "wandb": "W&B"}
