"""The numbers of a report, computed from all records of the runs: a summary of each, and comparisons."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from scripts.reporting.downsample import smooth
from scripts.reporting.read import Run

MOST_SMOOTHED = 100.0  # records over which the training loss is averaged, unless --smooth says otherwise
# Flags that name places or services: runs that differ in nothing else are of one setting.
PLACES = {"output_dir", "resume", "cfg", "wandb_project_id", "wandb_log_iters", "tensorboard", "log_every"}
# Name in the summary → label and the kind of number (scripts/reporting/tables.py).
FINAL = {
    "loss_smoothed": ("training loss, smoothed, last", "loss"),
    "val_loss_last": ("validation loss, last", "loss"),
    "val_loss_best": ("validation loss, best", "loss"),
    "val_bpb_last": ("bits per byte, last", "loss"),
    "hellaswag_acc_norm": ("HellaSwag acc_norm, last", "share"),
    "hellaswag_lm_eval_acc_norm": ("HellaSwag acc_norm (lm_eval), last", "share"),
    "tok_per_s_median": ("tokens/s, median", "count"),
    "mfu_median": ("MFU, median", "share"),
    "memory_peak": ("peak memory", "bytes"),
    "tokens": ("tokens", "count"),
    "elapsed_s": ("training time", "seconds"),
    "gpu_hours": ("GPU hours", "amount"),
    "cost": ("cost", "amount"),
}


def default_span(runs: list[Run]) -> float:
    """Returns the records over which the loss is averaged: 1 % of the longest run, at most MOST_SMOOTHED."""
    longest = max((len(run.table.points("loss")[0]) for run in runs), default=0)
    return float(min(MOST_SMOOTHED, max(1, longest // 100)))


def ranks_of(run: Run) -> np.ndarray:
    """Returns the number of ranks in each step, NaN if it is not known."""
    ranks = np.full(len(run.table.steps), math.nan)
    for start in run.starts:  # a later start repeats the steps after its checkpoint
        ranks[run.table.steps > start["step"]] = start.get("ranks", math.nan)
    return ranks


def gpu_hours(run: Run) -> np.ndarray:
    """Returns the GPU hours until each record: the training time of each step times the ranks that made it."""
    elapsed = np.maximum.accumulate(np.nan_to_num(run.table.column("elapsed_s")))
    return np.cumsum(np.diff(elapsed, prepend=0.0) * ranks_of(run)) / 3600


def summarize(run: Run, price: float | None = None, span: float = 1.0) -> dict[str, Any]:
    """Returns the numbers and facts of a run; None for what is not known. Seconds, bytes, nats per token."""
    table, config = run.table, run.config
    found: dict[str, Any] = {
        "name": run.name,
        "source": run.source,
        "status": run.status.get("status"),
        "reason": run.status.get("reason") or None,
        "step": int(table.steps[-1]) if len(table.steps) else None,
        "num_iterations": config.get("num_iterations"),
        "device": run.fact("device"),
        "ranks": run.fact("ranks"),
        "strategy": run.fact("strategy"),
        "parameters": run.fact("parameters"),
        "flops_per_token": run.fact("flops_per_token"),
        "commit": run.fact("commit"),
        "torch": run.fact("torch"),
        "dtype": config.get("dtype"),
        "data": config.get("mixture") or config.get("input_train_bin"),
        "tokenizer": config.get("tokenizer"),
        "started": next((s["time"] for s in run.starts if s.get("time")), None),
        "resumes": sum(1 for start in run.starts[1:] if start["step"] > 0),
        "rollbacks": len(run.rollbacks),
        "skipped": len(table.skipped),
        "superseded": len(run.superseded),
    }
    found["tokens"], found["elapsed_s"] = last(table.points("tokens")[1]), last(table.points("elapsed_s")[1])
    hours = gpu_hours(run)
    found["gpu_hours"] = finite(hours[-1]) if len(hours) and found["elapsed_s"] is not None else None
    found["cost"] = None if price is None or found["gpu_hours"] is None else price * found["gpu_hours"]
    for name in ("loss", "val_loss", "val_bpb"):
        steps, values = table.points(name)
        found[f"{name}_first"], found[f"{name}_last"] = (
            (float(values[0]), last(values)) if len(values) else (None, None)
        )
        found[f"{name}_best"] = float(values.min()) if len(values) else None
        found[f"{name}_best_step"] = int(steps[values.argmin()]) if len(values) else None
    found["loss_smoothed"] = last(smooth(table.points("loss")[1], span))
    for name in ("hellaswag_acc_norm", "hellaswag_lm_eval_acc_norm"):
        found[name] = last(table.points(name)[1])
    for name in ("tok_per_s", "mfu"):
        values = table.points(name)[1]
        found[f"{name}_median"] = float(np.median(values)) if len(values) else None
        found[f"{name}_p5"] = float(np.percentile(values, 5)) if len(values) else None
    memory, saves = table.points("memory_bytes")[1], table.points("save_s")[1]
    found["memory_peak"] = float(memory.max()) if len(memory) else None
    found["save_s_total"] = float(saves.sum()) if len(saves) else None
    return found


def last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) else None


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def differing_flags(runs: list[Run]) -> dict[str, list[Any]]:
    """Returns the flags whose values differ, with the value of each run. Runs without a config are not compared."""
    names = {name: None for run in runs for name in run.config if name not in PLACES}
    found = {}
    for name in names:
        values = [run.config.get(name) for run in runs]
        if len({repr(run.config.get(name)) for run in runs if run.config}) > 1:
            found[name] = values
    return found


def compared_loss(runs: list[Run], span: float) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns what losses are compared, and the steps and values of each run: validation if all runs have it."""
    validation = [run.table.points("val_loss") for run in runs]
    if all(len(steps) for steps, _ in validation):
        return "validation loss", validation
    training = [run.table.points("loss") for run in runs]
    return "training loss, smoothed", [(steps, smooth(values, span)) for steps, values in training]


def choose_targets(curves: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Returns up to four round losses that every run reaches after its start, highest first."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return []
    lowest = max(float(values.min()) for _, values in curves)
    highest = min(float(values[0]) for _, values in curves)
    wanted = [lowest + share * (highest - lowest) for share in (0.5, 0.25, 0.1, 0.0)] if highest > lowest else [lowest]
    digits = 2 if highest - lowest >= 0.1 else 4
    return list(dict.fromkeys(math.ceil(target * 10**digits) / 10**digits for target in wanted))


def reach_losses(runs: list[Run], targets: list[float] | None, span: float) -> dict[str, Any]:
    """Returns when each run first recorded a loss at or below each target, and the ratio of tokens and time to run 1.

    `targets` None chooses them.
    """
    kind, curves = compared_loss(runs, span)
    rows = []
    for target in choose_targets(curves) if targets is None else targets:
        reached = [_first_below(run, *curve, target) for run, curve in zip(runs, curves, strict=True)]
        for entry in reached[1:]:
            for name in ("tokens", "elapsed_s"):
                entry[f"{name}_ratio"] = ratio(entry[name], reached[0][name])
        rows.append({"target": target, "runs": reached})
    return {"loss": kind, "targets": rows}


def _first_below(run: Run, steps: np.ndarray, values: np.ndarray, target: float) -> dict[str, Any]:
    below = np.flatnonzero(values <= target)
    if not len(below):
        return {"step": None, "tokens": None, "elapsed_s": None}
    step = int(steps[below[0]])
    row = int(np.searchsorted(run.table.steps, step))
    tokens, elapsed = run.table.column("tokens")[row], run.table.column("elapsed_s")[row]
    return {"step": step, "tokens": finite(tokens), "elapsed_s": finite(elapsed)}


def ratio(value: float | None, first: float | None) -> float | None:
    return value / first if value is not None and first else None


def final_metrics(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the final metrics that any run has: each run's value and its difference from the first run's."""
    found = []
    for name, (label, kind) in FINAL.items():
        values = [summary[name] for summary in summaries]
        if all(value is None for value in values):
            continue
        differences = [None if None in (value, values[0]) else value - values[0] for value in values]
        found.append({"name": name, "label": label, "kind": kind, "values": values, "differences": differences})
    return found


def seed_groups(runs: list[Run], summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the groups of runs that differ only in their seed, with mean and standard deviation of final metrics.

    The standard deviation is that of a sample (divided by n − 1). Runs that are at different steps form no group.
    """
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if run.config:
            same = {k: v for k, v in run.config.items() if k not in PLACES and k != "seed"}
            groups.setdefault(repr((sorted(same.items()), summaries[i]["step"])), []).append(i)
    found = []
    for members in groups.values():
        if len({repr(runs[i].config.get("seed")) for i in members}) < max(2, len(members)):
            continue  # a single run, or one seed twice
        metrics = []
        for name, (label, kind) in FINAL.items():
            values = [summaries[i][name] for i in members if summaries[i][name] is not None]
            if len(values) > 1:
                mean, deviation = statistics.fmean(values), statistics.stdev(values)
                entry = {"name": name, "label": label, "kind": kind, "n": len(values), "mean": mean, "sd": deviation}
                metrics.append(entry)
        found.append({"runs": [runs[i].name for i in members], "metrics": metrics})
    return found


def compare(runs: list[Run], price: float | None, targets: list[float] | None, span: float) -> dict[str, Any]:
    """Returns everything that --json prints: plain numbers, None for what is not known.

    `price` is that of a GPU hour. The training loss is averaged over `span` records.
    """
    summaries = [summarize(run, price, span) for run in runs]
    return {
        "runs": summaries,
        "flags": differing_flags(runs),
        "reached": reach_losses(runs, targets, span),
        "final": final_metrics(summaries),
        "seeds": seed_groups(runs, summaries),
    }
