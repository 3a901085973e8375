"""run.json: facts of a run that its other files do not hold, for scripts/report.py.

`starts` has one entry for each start and resume: the step after which it continued, hardware, number of ranks,
strategy, size of the model, git commit. `rollbacks` has one entry for each roll-back.
"""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from train.parallel import ParallelModel
from util.device import device_name
from util.files import read_json, write_atomically
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
NAME = "run.json"

_content: dict[str, list[dict[str, Any]]] = {"starts": [], "rollbacks": []}  # as last written


def add_start(output_dir: Path, step: int, ranks: Ranks, model: ParallelModel, sequence_length: int) -> None:
    """Adds this start, which continues after `step`, to run.json. Rank 0 calls it."""
    _content.update(read_facts(output_dir))
    alone = "one process" if ranks.world_size == 1 else "DDP"
    _content["starts"].append(
        {
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": device_name(ranks.device),
            "ranks": ranks.world_size,
            "strategy": model.strategy().lstrip(", ") or alone,
            "parameters": model.gpt.num_params(),
            "flops_per_token": model.gpt.flops_per_token(sequence_length),
            "torch": torch.__version__,
            "commit": git_commit(),
        }
    )
    write_facts(output_dir)


def add_roll_back(output_dir: Path, step: int, to: int, reason: str) -> None:
    """Adds a roll-back from `step` to step `to` to run.json. An error is ignored: training does not depend on it."""
    _content["rollbacks"].append({"step": step, "to": to, "reason": reason})
    with suppress(OSError):
        write_facts(output_dir)


def write_facts(output_dir: Path) -> None:
    """Writes run.json, also after the directory was deleted."""
    write_atomically(output_dir / NAME, (json.dumps(_content, indent=1) + "\n").encode())


def read_facts(output_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the content of run.json, without entries that are not objects. A missing or damaged file is empty."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = read_json(output_dir / NAME)
    lists = {key: found.get(key) if isinstance(found, dict) else None for key in ("starts", "rollbacks")}
    return {k: [e for e in v if isinstance(e, dict)] if isinstance(v, list) else [] for k, v in lists.items()}


def git_commit() -> str:
    """Returns the commit of this code, with `-dirty` if files were changed, or "" outside a git repository."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
