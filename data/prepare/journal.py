"""The journal of unfinished work: how far a command has come, so that a repeated command continues there.

It is valid as long as the finished work units and the options that decide their tokens are unchanged. It also holds
the state at the beginning of the last file, so that a file that was repaired is encoded again from its beginning.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from data.prepare.sources import WorkUnit
from data.shards import ShardWriter
from util.errors import UserError
from util.files import read_json, write_atomically

RECIPE, JOURNAL = "recipe.json", "journal.json"


@dataclass
class Progress:
    """The progress of a job, as stored in its journal and its manifest."""

    units: int = 0
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class Journal:
    """The state of a job and the folder where it is recorded."""

    partial: Path
    unit_hashes: list[str]  # [k]: a hash of the first k units
    writer: ShardWriter
    progress: Progress = field(default_factory=Progress)
    file_start: dict[str, Any] = field(default_factory=dict)  # `state` at the first unit of the current file

    def state(self) -> dict[str, Any]:
        """Returns what is needed to continue from here."""
        return {
            "units": self.unit_hashes[self.progress.units],
            "progress": {**vars(self.progress), "skipped": dict(self.progress.skipped)},
            **self.writer.position(),
        }

    def write(self) -> None:
        """Records the state after everything before it is on disk."""
        self.writer.flush()
        content = json.dumps({**self.state(), "file_start": self.file_start}).encode()
        write_atomically(self.partial / JOURNAL, content)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a recorded state."""
        self.writer.resume(state["files"], state["held"])
        self.progress = Progress(**{**state["progress"], "skipped": Counter(state["progress"]["skipped"])})


def hash_units(units: list[WorkUnit], fingerprints: dict[str, Any]) -> list[str]:
    """Returns for each k up to the number of units a hash of the first k. `fingerprints` identifies files by path."""
    described = (f"{fingerprints.get(unit.path)} {unit.start} {unit.stop}" for unit in units)
    return list(accumulate(described, lambda last, one: hashlib.sha256((last + one).encode()).hexdigest(), initial=""))


def open_journal(partial: Path, recipe: dict[str, Any], unit_hashes: list[str], writer: ShardWriter) -> Journal:
    """Returns the journal of unfinished work, restored for this recipe and these units, or a new one."""
    journal = Journal(partial, unit_hashes, writer)
    journal.file_start = journal.state()
    content, old = read_object(partial / JOURNAL), read_object(partial / RECIPE)
    if content:
        if "file_start" not in content:
            raise UserError(f"{partial} was written by another version of rawgpt; remove it to start again")
        states = [state for state in (content, content["file_start"]) if _is_valid(state, journal, old, recipe)]
        changed = difference(old, recipe) if not states else _decisive_changes(old, recipe, states[0]["progress"])
        if changed or not states:
            raise other_command(partial, changed or ["source"])
        journal.file_start = content["file_start"]
        journal.restore(states[0])
        if journal.progress.units < content["progress"]["units"]:
            print(f"{partial.parent}: the input has changed; the last file is encoded again from its beginning")
    write_atomically(partial / RECIPE, json.dumps(recipe).encode())
    return journal


def _is_valid(state: dict[str, Any], journal: Journal, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Returns whether the units that were finished in this state are the first units of the input."""
    units = state["progress"]["units"]
    if not units:  # the first file has changed: it was repaired, or is another file
        first, second = (recipe.get("source", [])[:1] for recipe in (old, new))
        return [row["name"] for row in first] == [row["name"] for row in second]
    return units < len(journal.unit_hashes) and journal.unit_hashes[units] == state["units"]


def _decisive_changes(old: dict[str, Any], new: dict[str, Any], progress: dict[str, Any]) -> list[str]:
    """Returns the keys of two recipes whose difference concerns finished units, which are known to be unchanged."""
    before, now, tokens = old.get("max_tokens", 0), new.get("max_tokens", 0), progress["tokens"]
    unaffected = {
        "source": True,
        "skip_bad": new.get("skip_bad") or not progress["skipped"].get("bad"),
        "max_tokens": (not before or tokens < before) and (not now or tokens <= now),
    }
    return [key for key in difference(old, new) if not unaffected.get(key)]


def other_command(partial: Path, changed: list[str]) -> UserError:
    return UserError(
        f"{partial.parent} holds the unfinished work of a command with other input or options ({', '.join(changed)});"
        f" repeat that command, choose another --output_dir, or remove {partial}"
    )


def same_pieces(manifest: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Returns whether finished pieces are those of a recipe, which may differ in --skip_bad if nothing was skipped."""
    changed = difference(manifest["recipe"], recipe)
    return not changed or (changed == ["skip_bad"] and not manifest["skipped"].get("bad"))


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the keys of two recipes that differ."""
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or {} if it cannot be read or is not an object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
