"""Reading the folder of a run for a report: its records as columns, facts, samples, checkpoints and warnings.

`update` reads only what was added since the last call, so that a page can follow a run that is still going.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from util.errors import UserError, quote, user_errors
from util.files import read_json, read_yaml

STEP_NAME = re.compile(r"step_(\d{8,})")
MOST_COLUMNS = 40  # of metrics.jsonl
SAMPLE_CHARS = 2000
# What rank 0 logs of a start and of a roll-back. Runs from before run.json have nothing else.
BANNER = re.compile(r"([\d,]+) parameters.*, (?:float32|bfloat16|float16), (\d+) × ([^,]+)(?:, (.*))?$")
RESUMED = re.compile(r"resuming from .*step_(\d{8,})")
ROLLED_BACK = re.compile(r"(.+) in step (\d+): rolled back to step (\d+)")


class Tail:
    """The lines of a file that were added since the last look. A line counts once it is complete."""

    def __init__(self, path: Path):
        self.path, self._offset, self._inode = path, 0, -1

    def was_replaced(self) -> bool:
        """Returns whether another file is there now, or a shorter one; the next look then starts at its beginning."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        replaced = now.st_ino != self._inode or now.st_size < self._offset
        if replaced:
            self._offset, self._inode = 0, now.st_ino
        return replaced

    def lines(self) -> Iterator[bytes]:
        """Yields the new lines. A missing file has none. Raises UserError if the file cannot be read."""
        if not self.path.is_file():
            return
        with user_errors(self.path), open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line of metrics.jsonl, or None if the line is not the record of a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
        return None
    return record if type(record.get("loss", "")) in (float, int, NoneType) else None


def number(value: Any) -> float | None:
    """Returns a value of a record as a float, NaN for null and infinity, None if it is not a number."""
    if type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is float:
        return value if math.isfinite(value) else math.nan
    return math.nan if value is None else None


@dataclass
class Table:
    """Records as columns (N,), in the order of their steps. A column has NaN where a record lacks the value."""

    steps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)  # step → reason

    def column(self, name: str) -> np.ndarray:
        """Returns a column, all NaN if no record has it."""
        return self.columns.get(name, np.full(len(self.steps), math.nan))

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps and the values of a column without NaN."""
        values = self.column(name)
        there = ~np.isnan(values)
        return self.steps[there], values[there]


class Records:
    """Collects records into a Table. Of several records of one step the last counts, as in a resumed run."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._values: dict[str, tuple[array, array]] = {}  # name → rows, values
        self._skipped: dict[int, str] = {}  # row → reason

    def add(self, record: dict[str, Any]) -> None:
        row = len(self._steps)
        self._steps.append(record["step"])
        if "skipped" in record:
            self._skipped[row] = quote(record["skipped"])
        for name, value in record.items():
            if name in ("step", "skipped") or (x := number(value)) is None:
                continue
            if name not in self._values:
                if len(self._values) == MOST_COLUMNS:
                    continue
                self._values[name] = array("q"), array("d")
            rows, values = self._values[name]
            rows.append(row)
            values.append(x)

    def table(self) -> Table:
        """Returns the columns; those without a single number are left out, except the loss."""
        steps = np.array(self._steps, np.int64)
        order = np.argsort(steps, kind="stable")
        is_last = np.append(np.diff(steps[order]) != 0, True)[: len(order)]
        kept = order[is_last]
        columns = {}
        for name, (rows, values) in self._values.items():
            column = np.full(len(steps), math.nan)
            column[np.array(rows, np.int64)] = np.array(values)
            if name == "loss" or not np.isnan(column[kept]).all():
                columns[name] = column[kept]
        skipped = {int(steps[row]): self._skipped[row] for row in map(int, kept) if row in self._skipped}
        return Table(steps[kept], columns, skipped)


@dataclass
class Run:
    """A run: its table, facts, events, samples, checkpoints and warnings. An imported log has only some of them."""

    name: str
    path: Path
    source: str = "rawgpt"
    table: Table = field(default_factory=Table)
    config: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)  # as in run.json; `step` is always there
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    superseded: list[dict[str, Any]] = field(default_factory=list)  # records dropped by a resume or a roll-back
    samples: dict[int, str] = field(default_factory=dict)  # step → text
    checkpoints: list[tuple[int, int]] = field(default_factory=list)  # step, bytes; oldest first
    warnings: dict[str, int] = field(default_factory=dict)  # line → how often
    modified: float = 0.0  # time of the last record

    def fact(self, name: str) -> Any:
        """Returns a fact of the newest start that has it, or None."""
        return next((s[name] for s in reversed(self.starts) if s.get(name) not in (None, "")), None)


class RunReader:
    """Reads a run's folder, and later only what was added to it."""

    def __init__(self, path: Path, name: str):
        self.run = Run(name, path)
        self._metrics, self._superseded = Tail(path / "metrics.jsonl"), Tail(path / "logs/metrics_superseded.jsonl")
        self._log = Tail(path / "logs/rank_0.log")
        self._records, self._size = Records(), -1

    def update(self) -> bool:
        """Reads what is new into `run`. Returns whether anything changed that the page shows."""
        before = self._fingerprint()
        if before == self._size:
            return False
        self._size = before
        self._read_metrics()
        self._read_superseded()
        run = self.run
        run.config = read_mapping(run.path / "config.yaml")
        run.status = read_mapping(run.path / "status.json")
        self._read_log()
        run.samples = read_samples(run.path / "samples")
        run.checkpoints = list_checkpoints(run.path / "checkpoints")
        return True

    def _fingerprint(self) -> Any:
        """Returns a value that changes when a file of the run changes."""
        names = ("metrics.jsonl", "status.json", "run.json", "samples", "checkpoints", "logs/rank_0.log")
        found = []
        for name in names:
            with suppress(OSError):
                about = os.stat(self.run.path / name)
                found.append((name, about.st_size, about.st_mtime_ns, about.st_ino))
        return tuple(found)

    def _read_metrics(self) -> None:
        if self._metrics.was_replaced():
            self._records = Records()
        for line in self._metrics.lines():
            if (record := parse_record(line)) is not None:
                self._records.add(record)
        self.run.table = self._records.table()
        with suppress(OSError):
            self.run.modified = os.stat(self._metrics.path).st_mtime

    def _read_superseded(self) -> None:
        if self._superseded.was_replaced():
            self.run.superseded = []
        for line in self._superseded.lines():
            if (record := parse_record(line)) is not None:
                kept = ("step", "tokens", "elapsed_s", "loss", "grad_norm")
                self.run.superseded.append({name: record[name] for name in kept if name in record})

    def _read_log(self) -> None:
        """Reads warnings from the log of rank 0, and from older runs also what run.json holds today."""
        run = self.run
        facts = read_mapping(run.path / "run.json")
        starts, rollbacks = valid_entries(facts.get("starts")), valid_entries(facts.get("rollbacks"))
        if self._log.was_replaced():
            run.warnings, run.starts, run.rollbacks = {}, [], []
        for line in self._log.lines():
            text = line.decode(errors="replace").rstrip("\n")[20:]  # after the time
            if text.startswith("warning: "):
                warning = quote(text.removeprefix("warning: "))
                run.warnings[warning] = run.warnings.get(warning, 0) + 1
            elif not starts and (found := BANNER.match(text)):
                parameters, ranks, device, strategy = found.groups()
                facts = {"parameters": int(parameters.replace(",", "")), "ranks": int(ranks), "device": device}
                run.starts.append({"step": 0, "strategy": strategy or "", **facts})
            elif not starts and run.starts and (found := RESUMED.match(text)):
                run.starts[-1]["step"] = int(found[1])
            elif not starts and (found := ROLLED_BACK.match(text)):
                run.rollbacks.append({"step": int(found[2]), "to": int(found[3]), "reason": quote(found[1])})
        if starts:
            run.starts, run.rollbacks = starts, rollbacks


def valid_entries(entries: Any) -> list[dict[str, Any]]:
    """Returns the entries of a list in run.json that have a step, and numbers where numbers belong."""
    if not isinstance(entries, list):
        return []
    numbers = ("step", "to", "ranks", "parameters", "flops_per_token")
    return [
        entry
        for entry in entries
        if isinstance(entry, dict)
        and type(entry.get("step")) is int
        and all(type(entry[name]) is int and 0 <= entry[name] < 2**53 for name in numbers if name in entry)
    ]


def read_mapping(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file, with text as keys; {} if the file is missing or damaged."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = read_json(path) if path.suffix == ".json" else read_yaml(path)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def read_samples(folder: Path) -> dict[int, str]:
    """Returns the beginning of each sample by its step."""
    found = {}
    for path in folder.glob("step_*.txt"):
        if (match := STEP_NAME.fullmatch(path.stem)) and path.is_file():
            with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(SAMPLE_CHARS + 1).rstrip("\n")
                found[int(match[1])] = text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + "…"
    return dict(sorted(found.items()))


def list_checkpoints(folder: Path) -> list[tuple[int, int]]:
    """Returns the step and the size in bytes of each checkpoint, oldest first."""
    found = []
    with suppress(OSError):
        for path in folder.iterdir():
            if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir():
                sizes = (os.stat(file).st_size for file in path.rglob("*") if file.is_file())
                found.append((int(match[1]), sum(sizes)))
    return sorted(found)


def open_runs(paths: list[Path]) -> list[RunReader]:
    """Returns a reader for each run, with names that differ. A run that is named twice is read once."""
    folders = list(dict.fromkeys(check_run(path).resolve() for path in paths))
    return [RunReader(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]


def check_run(path: Path) -> Path:
    """Returns `path` if it is the folder of a run, otherwise raises UserError."""
    if any((path / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        return path
    if not path.is_dir():
        problem = "is a file" if path.exists() else "no such folder"
        raise UserError(f"{path}: {problem}; give the --output_dir of a run")
    inside = sorted(p.parent.name for p in path.glob("*/metrics.jsonl"))
    hint = f"name the runs in it, such as {path / inside[0]}" if inside else "give the --output_dir of a run"
    raise UserError(f"{path}: no run, for it has no metrics.jsonl; {hint}")


def distinct_names(folders: list[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell every two of them apart."""
    names = []
    for folder in folders:
        others = [other for other in folders if other != folder]
        length = next(
            (n for n in range(1, len(folder.parts)) if all(o.parts[-n:] != folder.parts[-n:] for o in others)),
            len(folder.parts),
        )
        names.append("/".join(folder.parts[-length:]) or "/")
    return names


def distinct_labels(runs: list[Run], others: list[Run]) -> None:
    """Numbers imported runs whose name another run has already: `log`, `log (2)`, `log (3)`."""
    taken = {run.name for run in runs}
    for run in others:
        name, again = run.name, 1
        while run.name in taken:
            again += 1
            run.name = f"{name} ({again})"
        taken.add(run.name)
