"""The HTML page of a report: one file that needs no network. Its data is JSON, which page.js draws with uPlot.

uPlot.iife.min.js and uPlot.min.css are the files of the npm package uplot 1.6.32 (MIT, uPlot.LICENSE), unchanged.
SHA-256: 19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f (js) and
df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04 (css).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from eval.reference import GPT2_ACC_NORM
from scripts.reporting import tables
from scripts.reporting.compare import compare, default_span, gpu_hours
from scripts.reporting.downsample import rows_to_show, smooth, spread
from scripts.reporting.read import Run, number

FOLDER = Path(__file__).resolve().parent
MARK = "<!-- rawgpt report -->"  # by which a report is recognised before it is overwritten
MOST_ROWS, LEAST_ROWS = 20_000, 500  # of all runs together; of each run
MOST_MARKS = 400  # of one kind and run
MOST_SAMPLES = 40  # steps with samples
MOST_WARNINGS = 50  # different ones of a run, the newest
# Title, kind of number, and the columns of each chart. Other columns of metrics.jsonl get a chart each at the end.
CHARTS: list[tuple[str, str, tuple[str, ...]]] = [
    ("Training loss", "loss", ("smoothed", "loss")),
    ("Validation loss", "loss", ("val_loss",)),
    ("Bits per byte", "loss", ("val_bpb",)),
    ("HellaSwag acc_norm", "share", ("hellaswag_acc_norm", "hellaswag_lm_eval_acc_norm")),
    ("Gradient norm", "number", ("grad_norm",)),
    ("Learning rate", "number", ("lr",)),
    ("Tokens per second", "count", ("tok_per_s",)),
    ("MFU", "share", ("mfu",)),
    ("Peak memory per rank", "bytes", ("memory_bytes",)),
    ("Time that training waited for saves", "seconds", ("save_s",)),
]
NO_CHART = {"tokens", "elapsed_s", "hellaswag_acc", "hellaswag_lm_eval_acc"}
LOG_SCALE = ("loss", "val_loss", "grad_norm", "lr")  # charts whose y axis can be logarithmic
FALLS = ("loss", "val_loss", "val_bpb", "grad_norm")  # charts whose first values are far above the others


def numbers(values: np.ndarray) -> list[Any]:
    """Returns values for the curves: 7 significant digits, null for NaN, whole numbers without a point."""
    return [
        None if v != v else int(v) if v.is_integer() and abs(v) < 1e7 else float(f"{v:.7g}") for v in values.tolist()
    ]


def shown_rows(run: Run, most: int) -> np.ndarray:
    """Returns the rows of the table that the page has: extremes of the dense columns, evaluations, events, the ends."""
    table, count = run.table, len(run.table.steps)
    if count <= most:
        return np.arange(count)
    filled = {name: int((~np.isnan(column)).sum()) for name, column in table.columns.items()}
    sparse = [name for name, n in filled.items() if n <= count // 4 and name not in NO_CHART]
    dense = [table.columns[n] for n in filled if n not in sparse and n not in NO_CHART and n != "mfu"]
    kept = [rows_to_show(dense, most)]
    for name in sparse:
        rows = np.flatnonzero(~np.isnan(table.columns[name]))
        kept.append(rows[rows_to_show([table.columns[name][rows]], most // 4)])
    events = [*table.skipped, *(s["step"] for s in run.starts), *(r["to"] for r in run.rollbacks if "to" in r)]
    rows = np.flatnonzero(np.isin(table.steps, events))
    return np.unique(np.concatenate([*kept, spread(rows, MOST_MARKS)]))


def run_data(run: Run, summary: dict[str, Any], most: int, span: float) -> dict[str, Any]:
    """Returns what page.js draws of a run: columns of the shown rows, marks, samples and warnings."""
    table = run.table
    rows = shown_rows(run, most)
    columns = {name: values for name, values in table.columns.items() if name not in NO_CHART}
    if "loss" in columns:
        columns["smoothed"] = smooth(columns["loss"], span)
    skipped = [step for step in map(int, table.steps[rows]) if step in table.skipped]
    return {
        "name": run.name,
        "source": run.source,
        "status": tables.status_text(run),
        "step": summary["step"],
        "last_step": summary["num_iterations"] if isinstance(summary["num_iterations"], int) else None,
        "headline": headline(summary),
        "flops_per_token": summary["flops_per_token"],
        "x": {
            "step": table.steps[rows].tolist(),
            "tokens": ascending(table.column("tokens")[rows]),
            "time": ascending(table.column("elapsed_s")[rows]),
            "hours": ascending(gpu_hours(run)[rows]),
        },
        "series": {name: packed(values[rows]) for name, values in columns.items()},
        "marks": {
            "resumes": [s["step"] for s in run.starts[1:] if s["step"] > 0][:MOST_MARKS],
            "rollbacks": [[r["step"], r.get("to"), str(r.get("reason", ""))] for r in run.rollbacks[:MOST_MARKS]],
            "skipped": [[step, table.skipped[step]] for step in skipped],
            "superseded": superseded(run),
        },
        "warnings": list(run.warnings.items())[-MOST_WARNINGS:],
    }


def headline(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the numbers at the top of a run's card."""
    shown = [
        ("train loss", summary["loss_smoothed"], "loss"),
        ("val loss", summary["val_loss_last"], "loss"),
        ("tokens", summary["tokens"], "count"),
        ("time", summary["elapsed_s"], "seconds"),
        ("tokens/s", summary["tok_per_s_median"], "count"),
        ("MFU", summary["mfu_median"], "share"),
    ]
    return [(label, tables.text_of(value, kind)) for label, value, kind in shown if value is not None]


def ascending(values: np.ndarray) -> list[Any] | None:
    """Returns the values of an x axis, none below the one before; None if some are not known."""
    return None if np.isnan(values).any() or not len(values) else numbers(np.maximum.accumulate(values))


def packed(values: np.ndarray) -> Any:
    """Returns a column as a list, or as places and values if most of it is NaN."""
    there = np.flatnonzero(~np.isnan(values))
    if len(there) > len(values) // 2:
        return numbers(values)
    return {"at": there.tolist(), "values": numbers(values[there])}


def superseded(run: Run) -> list[list[Any]]:
    """Returns step, tokens, time, loss and gradient norm of records that a resume or a roll-back dropped."""
    names = ("step", "tokens", "elapsed_s", "loss", "grad_norm")
    kept = [run.superseded[i] for i in spread(np.arange(len(run.superseded)), MOST_MARKS)]
    rows = [[number(record.get(name)) for name in names] for record in kept]
    return [[None if v is None or math.isnan(v) else v for v in row] for row in rows]


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns the charts for which any run has values. An unknown column of metrics.jsonl has its name as title."""
    known = {name for _, _, names in CHARTS for name in names} | NO_CHART
    there = {name: None for run in runs for name in run.table.columns}
    found = [*CHARTS, *((name, "number", (name,)) for name in there if name not in known)]
    return [
        {"title": title, "kind": kind, "columns": names, "log": names[-1] in LOG_SCALE, "falls": names[-1] in FALLS}
        for title, kind, names in found
        if any(name in there for name in names)
    ]


def samples(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns the samples by step, at most MOST_SAMPLES steps: if there are more, of those that all runs have."""
    steps = sorted({step for run in runs for step in run.samples})
    writers = [run for run in runs if run.samples]
    common = [step for step in steps if all(step in run.samples for run in writers)]
    chosen = steps if len(steps) <= MOST_SAMPLES or not common else common
    return [
        {"step": int(step), "texts": [run.samples.get(int(step)) for run in runs]}
        for step in spread(np.array(chosen, np.int64), MOST_SAMPLES)
    ]


def page_data(runs: list[Run], price: float | None, targets: list[float] | None, span: float | None) -> dict[str, Any]:
    """Returns the data of the page. Arguments: see `compare`; without a span it is chosen."""
    span = default_span(runs) if span is None else span
    comparison = compare(runs, price, targets, span)
    most = max(LEAST_ROWS, MOST_ROWS // max(5, len(runs)))
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "runs": [run_data(run, s, most, span) for run, s in zip(runs, comparison["runs"], strict=True)],
        "charts": charts(runs),
        "references": {
            "hellaswag_acc_norm": GPT2_ACC_NORM["completion"],
            "hellaswag_lm_eval_acc_norm": GPT2_ACC_NORM["lm_eval"],
        },
        "facts": tables.facts_table(runs, comparison, price is not None),
        "tables": tables.comparison_tables(runs, comparison),
        "samples": samples(runs),
        "span": span,
    }


def to_json(data: Any) -> str:
    """Returns JSON that cannot end the <script> around it, whatever the names and samples of the runs contain."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return "".join(c if not "\ud800" <= c <= "\udfff" else "\ufffd" for c in text) if has_surrogates(text) else text


def has_surrogates(text: str) -> bool:
    """Returns whether the text has half a surrogate pair, as names of files that are not UTF-8 have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def to_html(data: dict[str, Any], live: bool = False) -> str:
    """Returns the page. With `live` it asks its server for new data every few seconds."""
    html = (FOLDER / "page.html").read_text()
    parts = {
        "UPLOT_CSS": (FOLDER / "uPlot.min.css").read_text(),
        "PAGE_CSS": (FOLDER / "page.css").read_text(),
        "UPLOT_JS": (FOLDER / "uPlot.iife.min.js").read_text(),
        "PAGE_JS": (FOLDER / "page.js").read_text(),
        "LIVE": "true" if live else "false",
        "DATA": to_json(data),
    }
    before, *rest = html.split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        before += parts[name] + after
    return f"{before.rstrip()}\n{MARK}\n"
