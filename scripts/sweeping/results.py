"""The outcomes of a sweep's runs, and their table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from scripts.sweeping.settings import Run
from util.files import read_json

FINISHED = ("done", "out of time")  # --max_minutes ends a run, as --num_iterations does
FINAL = (*FINISHED, "diverged")  # starting a diverged run again would only make it diverge again
STOPPED = ("stopped", "interrupted")


class Result(NamedTuple):
    """The status, losses and training time of a run."""

    status: str  # of status.json (docs/launching.md); "" if the run has not begun
    reason: str
    loss: float  # of the last step; NaN if unknown
    val_loss: float  # the last one
    seconds: float  # of training, over all starts


def read_result(folder: Path) -> Result:
    """Reads the result of the run in a folder from its status.json and metrics.jsonl."""
    status: Any = {}
    with suppress(OSError, ValueError):
        status = read_json(folder / "status.json")
    status = status if isinstance(status, dict) else {}
    last: dict[str, float] = {}
    for record in _records(folder / "metrics.jsonl"):
        last |= {
            k: math.nan if record[k] is None else record[k] for k in ("loss", "val_loss", "elapsed_s") if k in record
        }
    found = (last.get(key, math.nan) for key in ("loss", "val_loss", "elapsed_s"))
    return Result(str(status.get("status", "")), str(status.get("reason", "")), *found)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics.jsonl. train.metrics does this too, but it imports torch."""
    if path.is_file():
        with open(path, errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):  # a line that was cut off by a kill
                    if isinstance(record := json.loads(line), dict):
                        yield record


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def table(results: dict[Run, Result]) -> str:
    """Returns the results as a table: a line for each run, and the mean of each setting with several seeds."""
    rows = [("setting", "seed", "status", "loss", "val loss", "time")]
    means: dict[str, float] = {}
    for setting in dict.fromkeys(run.setting for run in results):
        group = {run: result for run, result in results.items() if run.setting == setting}
        shown = setting or "-"
        for run, r in group.items():
            line = (shown, run.seed or "-", r.status or "not started", number(r.loss), number(r.val_loss))
            rows.append((*line, duration(r.seconds)))
        finished = [r for r in group.values() if r.status in FINISHED]
        if len(group) > 1 and finished:
            of = f"mean of {len(finished)}"
            losses = (spread([r.loss for r in finished]), spread([r.val_loss for r in finished]))
            rows.append((shown, of, "", *losses, duration(statistics.mean(r.seconds for r in finished))))
        if len(finished) == len(group):
            means[setting] = statistics.mean(r.val_loss for r in finished)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ranked = {setting: mean for setting, mean in means.items() if not math.isnan(mean)}
    if len(ranked) > 1:
        best = min(ranked, key=ranked.__getitem__)
        lines.append(f"lowest validation loss: {ranked[best]:.4f}, {best}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Returns mean ± sample standard deviation."""
    if len(values) < 2 or any(map(math.isnan, values)):
        return number(statistics.mean(values))
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
