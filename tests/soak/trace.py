"""The state of an output directory, and the comparison of two runs bit for bit."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The values of a step's record that must not depend on speed or on interruptions.
TRACE_KEYS = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


@dataclass(frozen=True)
class State:
    """The visible state of an output directory: the lines of metrics.jsonl, and its checkpoints."""

    lines: list[str]
    newest: int  # step of the newest complete checkpoint; 0: none
    saving: int  # step of the checkpoint that is being written; 0: none
    deleting: bool

    @property
    def logged(self) -> int:
        """The last step that was logged."""
        with suppress(IndexError, ValueError):
            return json.loads(self.lines[-1])["step"]
        return 0


def read_state(output_dir: Path) -> State:
    """Reads the state of a run, which may be writing at the same time."""
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


def read_trace(output_dir: Path) -> list[dict[str, Any]]:
    """Returns the numbers of a run that must not depend on interruptions, in full precision."""
    lines = read_state(output_dir).lines
    return [{k: record[k] for k in TRACE_KEYS if k in record} for record in map(json.loads, lines)]


def find_differences(output_dir: Path, reference: Path) -> list[str]:
    """Compares traces and last checkpoints of two finished runs, and describes the differences."""
    problems = []
    records, expected = read_trace(output_dir), read_trace(reference)
    if len(records) != len(expected):
        problems.append(f"{len(records)} steps are logged instead of {len(expected)}")
    if first := next(((a, b) for a, b in zip(records, expected, strict=False) if a != b), None):
        problems.append(f"the trace differs from step {first[1]['step']} on: {first[0]} instead of {first[1]}")
    last = f"checkpoints/step_{expected[-1]['step']:08d}"
    for kind in ("model", "optimizer"):
        ours, theirs = read_tensors(output_dir / last / kind), read_tensors(reference / last / kind)
        if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            names = ", ".join(differing[:3])
            problems.append(f"{len(differing)} of {len(theirs)} tensors of the {kind} differ: {names} ...")
    return problems


def read_tensors(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Reads a folder of safetensors files: name and file → dtype, shape, place in the full tensor, and bytes.

    Files are not compared as a whole, because the order of the tensors in a header may differ.
    Format: https://huggingface.co/docs/safetensors.
    """
    tensors = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        places = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
        for name, about in header.items():
            begin, end = (start + offset for offset in about["data_offsets"])
            tensors[f"{name} ({path.name})"] = (about["dtype"], about["shape"], places.get(name), content[begin:end])
    return tensors
