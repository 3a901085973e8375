"""The tables of a report as text, for the page and for the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from scripts.reporting.read import Run
from util.errors import quote

NONE = "–"
SILENT_MINUTES = 15  # without a record, after which a run that says it is running probably is not


def count(value: float) -> str:
    """Formats a number with K, M, B or T for thousand, million, billion and trillion."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'K' else size):,.3g}{unit}" if value < 1e15 else f"{value:.3g}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Formats seconds as the two largest units."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = int(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size:,}{unit} {whole % size // small:02d}{small_unit}"
    return f"{whole} s"


def size(value: float) -> str:
    """Formats bytes as GiB or MiB."""
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"{value:.4f}",
    "share": lambda value: f"{100 * value:.2f} %",
    "count": count,
    "bytes": size,
    "seconds": duration,
    "amount": lambda value: f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}",
}


def text_of(value: Any, kind: str) -> str:
    """Formats a number of a kind in FORMATS, or – for None."""
    return NONE if value is None else FORMATS[kind](value)


def difference(value: float, first: float, kind: str) -> str:
    """Formats the difference of two numbers: losses as they are, shares in points, all others in percent."""
    if kind == "loss":
        text, unit = f"{value - first:+.4f}", ""
    elif kind == "share":
        text, unit = f"{100 * (value - first):+.2f}", " points"
    else:
        text, unit = (f"{100 * (value / first - 1):+.1f}" if first else "+0"), " %"
    return "±0" if float(text) == 0 else text + unit


def status_text(run: Run, now: float | None = None) -> str:
    """Returns the status of a run; one that says it is running, but has been silent for long, probably is not."""
    status = quote(run.status.get("status") or ("imported" if run.source != "rawgpt" else "unknown"))
    silent = ((time.time() if now is None else now) - run.modified) / 60
    if status == "running" and silent > SILENT_MINUTES:
        return f"running? (no record for {duration(60 * silent)})"
    return status


def facts(run: Run, s: dict[str, Any], priced: bool) -> list[tuple[str, str]]:
    """Returns the facts of a run as labels and texts; `s` is its summary."""
    hardware = f"{s['ranks']} × {s['device']}" if s["ranks"] and s["device"] else NONE

    def pair(name: str, kind: str, low: str = "5th percentile") -> str:
        median, p5 = s[f"{name}_median"], s[f"{name}_p5"]
        return NONE if median is None else f"{text_of(median, kind)} ({low} {text_of(p5, kind)})"

    def three(name: str) -> str:
        if s[f"{name}_first"] is None:
            return NONE
        first, final, best = (text_of(s[f"{name}_{which}"], "loss") for which in ("first", "last", "best"))
        return f"{first} → {final} (best {best} at step {s[f'{name}_best_step']:,})"

    steps = NONE if s["step"] is None else f"{s['step']:,}"
    if isinstance(s["num_iterations"], int):
        steps += f" of {s['num_iterations']:,}"
    events = [f"{s[name]:,} {label}" for name, label in EVENTS.items() if s[name]]
    return [
        ("status", status_text(run) + (f": {quote(s['reason'])}" if s["reason"] else "")),
        ("steps", steps),
        ("tokens", text_of(s["tokens"], "count")),
        ("training time", text_of(s["elapsed_s"], "seconds")),
        ("hardware", quote(hardware)),
        ("strategy", quote(s["strategy"] or NONE)),
        ("parameters", f"{s['parameters']:,}" if s["parameters"] else NONE),
        ("dtype", quote(s["dtype"] or NONE)),
        ("data", quote(s["data"] or NONE)),
        ("tokenizer", quote(s["tokenizer"] or NONE)),
        ("training loss", three("loss")),
        ("validation loss", three("val_loss")),
        ("bits per byte", three("val_bpb")),
        ("tokens/s", pair("tok_per_s", "count")),
        ("MFU", pair("mfu", "share")),
        ("peak memory per rank", text_of(s["memory_peak"], "bytes")),
        ("time in saves", text_of(s["save_s_total"], "seconds")),
        ("GPU hours", text_of(s["gpu_hours"], "amount")),
        *([("cost", text_of(s["cost"], "amount"))] if priced else []),
        ("events", ", ".join(events) or "none"),
        ("checkpoints", checkpoint_text(run)),
        ("started", quote(s["started"] or NONE).replace("T", " ").replace("Z", " UTC")),
        ("commit", commit_text(s["commit"])),
        ("torch", quote(s["torch"] or NONE)),
    ]


EVENTS = {
    "resumes": "resumed",
    "rollbacks": "rolled back",
    "skipped": "skipped steps",
    "superseded": "superseded records",
}


def commit_text(commit: Any) -> str:
    """Shortens a commit, and keeps the mark of changed files."""
    if not isinstance(commit, str):
        return NONE
    name, _, dirty = commit.partition("-")
    return quote(name[:12]) + (" + changes" if dirty else "")


def checkpoint_text(run: Run) -> str:
    """Returns the steps of the checkpoints, the newest eight, and their size together."""
    if not run.checkpoints:
        return "none" if run.source == "rawgpt" else NONE
    steps = [f"{step:,}" for step, _ in run.checkpoints]
    shown = ", ".join(steps[-8:])
    earlier = f"{len(steps) - 8} earlier, " if len(steps) > 8 else ""
    return f"{earlier}{shown} ({size(sum(n for _, n in run.checkpoints))})"


def table(title: str, head: list[str], rows: list[list[str]], note: str = "") -> dict[str, Any]:
    return {"title": title, "head": head, "rows": rows, "note": note}


def facts_table(runs: list[Run], comparison: dict[str, Any], priced: bool) -> dict[str, Any]:
    """Returns one row for each fact and one column for each run. Facts that no run has are left out."""
    columns = [facts(run, s, priced) for run, s in zip(runs, comparison["runs"], strict=True)]
    rows = [[group[0][0], *(text for _, text in group)] for group in zip(*columns, strict=True)]
    return table("Facts", ["", *(run.name for run in runs)], [r for r in rows if set(r[1:]) != {NONE}])


def comparison_tables(runs: list[Run], comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the tables that compare runs; with one run only those that say something about one."""
    names = [run.name for run in runs]
    found = []
    if len(runs) > 1:
        rows = [[name, *map(flag_text, values)] for name, values in comparison["flags"].items()]
        note = "" if rows else "No flag differs."
        found.append(table("Flags that differ", ["flag", *names], rows, note))
        found.append(final_table(names, comparison["final"]))
    found.append(reached_table(names, comparison["reached"]))
    for group in comparison["seeds"]:
        found.append(seed_table(group))
    return [t for t in found if t["rows"] or t["note"]]


def flag_text(value: Any) -> str:
    if value is None:
        return NONE
    return quote(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str))


def final_table(names: list[str], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for metric in metrics:
        first, kind, cells = metric["values"][0], metric["kind"], []
        for i, value in enumerate(metric["values"]):
            change = f" ({difference(value, first, kind)})" if i and None not in (value, first) else ""
            cells.append(text_of(value, kind) + change)
        rows.append([metric["label"], *cells])
    return table("Final metrics", ["", *names], rows, f"In parentheses: the difference from {names[0]}.")


def reached_table(names: list[str], reached: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in reached["targets"]:
        cells = []
        for entry in row["runs"]:
            if entry["step"] is None:
                cells.append("not reached")
                continue
            parts = []
            for name, kind, unit in (("tokens", "count", " tokens"), ("elapsed_s", "seconds", "")):
                if entry[name] is not None:
                    times = entry.get(f"{name}_ratio")
                    parts.append(f"{text_of(entry[name], kind)}{unit}" + (f" (×{times:.3g})" if times else ""))
            cells.append(", ".join(parts) or f"step {entry['step']:,}")
        rows.append([f"{row['target']:g}", *cells])
    note = f"The first record at or below the {reached['loss']}."
    note += f" In parentheses: the ratio to {names[0]}." if len(names) > 1 else ""
    return table("Tokens and time to reach a loss", ["loss", *names], rows, note if rows else "")


def seed_table(group: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for m in group["metrics"]:
        deviation = f"{m['sd']:.2g}" if m["kind"] == "loss" else text_of(m["sd"], m["kind"])
        rows.append([m["label"], f"{text_of(m['mean'], m['kind'])} ± {deviation}", str(m["n"])])
    return table(
        f"{len(group['runs'])} seeds of one setting",
        ["", "mean ± standard deviation", "n"],
        rows,
        f"Runs that differ only in --seed: {', '.join(group['runs'])}.",
    )


def to_text(t: dict[str, Any]) -> str:
    """Returns a table for the terminal."""
    lines = [[quote(cell) for cell in row] for row in [t["head"], *t["rows"]]]
    widths = [max(len(row[i]) for row in lines) for i in range(len(t["head"]))]
    body = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines]
    return "\n".join([t["title"], *(body if t["rows"] else []), *([t["note"]] if t["note"] else [])])
