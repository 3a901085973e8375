"""Reading a checkpoint directory: which one, is it whole, and the model in it.

A checkpoint is a directory `step_%08d` of safetensors and JSON files, described by a manifest with
their sizes and hashes; train/checkpoint.py writes it, on any number of ranks. Nothing here unpickles.
"""

from __future__ import annotations

import json
import re
import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from cfg.errors import StorageError, UserError
from cfg.faults import fault_point
from cfg.files import file_sha256

# One process reading or writing by itself is what we mean, and not to be wondered about.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

MANIFEST = "manifest.json"
FORMAT = 2
STEP_NAME = re.compile(r"step_(\d{8,})")


def step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, newest first, whole or not."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError if there is none that can be read."""
    try:
        fault_point("read manifest", path / MANIFEST)
        manifest = json.loads((path / MANIFEST).read_text())
    except OSError as e:
        raise ValueError(f"{MANIFEST}: {e.strerror}") from e
    except ValueError as e:
        raise ValueError(f"{MANIFEST} is damaged") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "config" not in manifest:
        raise ValueError(f"{MANIFEST} is not of format {FORMAT}")
    return manifest


def problem_with(path: Path, skip: str | None = None) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None if every file is there and hashes as promised.

    Files whose name begins with `skip` need only be there in full: hashing an optimizer's state takes twice as long
    as reading the model.
    """
    try:
        listed = read_manifest(path)["files"]
        if odd := [f for f in path.glob("*/*") if str(f.relative_to(path)) not in listed]:
            return f"{odd[0].relative_to(path)} does not belong to it"
        for name, facts in listed.items():
            file = path / name
            if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            fault_point("read hash", file)
            if not (skip and name.startswith(skip)) and file_sha256(file) != facts["sha256"]:
                return f"{name} is damaged (its hash differs)"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        return str(e) or type(e).__name__
    return None


def find_checkpoint(path: Path, report: Any = print, skip: str | None = None) -> Path | None:
    """The checkpoint that `path` stands for: itself, or the newest whole one of the run directory `path`.

    None if a run directory holds no checkpoint. A damaged one is reported and passed over. Files under `skip` are not
    hashed, as in `problem_with`. Raises UserError if `path` is not there, StorageError if all are damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint or run directory")
    if path.name == "checkpoints":
        path = path.parent
    own = (path / MANIFEST).exists() or step_of(path) >= 0
    candidates = [path] if own else list_checkpoints(path)
    for candidate in candidates:
        problem = problem_with(candidate, skip)
        if problem is None:
            return candidate
        report(f"checkpoint {candidate} is passed over: {problem}")
    if candidates:
        problem = problem_with(candidates[0], skip)
        raise StorageError(f"{path}: no whole checkpoint is left (newest: {problem}); move it away to start over")
    return None


def tensor_shapes(path: Path, kind: str) -> dict[str, torch.Size]:
    """Name → shape of the whole tensors in a checkpoint's folder `kind`, model or optimizer.

    Raises UserError if a part of a tensor is missing.
    """
    shapes = {}
    for name, about in dcp.HuggingFaceStorageReader(str(path / kind)).read_metadata().state_dict_metadata.items():
        if sum(prod(chunk.sizes) for chunk in about.chunks) != prod(about.size):
            raise UserError(f"{path}: its parts of {name} do not make up the whole")
        shapes[name] = about.size
    return shapes


def load_tensors(path: Path, kind: str, tensors: dict[str, Tensor], subset: bool = False) -> None:
    """Reads into `tensors` those of the same names in a checkpoint's folder `kind`, or of DTensors the local part.

    Every process reads for itself. With `subset` there may be more in the checkpoint, as when each rank asks for
    its own. Raises UserError at the first name or shape that does not fit.
    """
    shapes = tensor_shapes(path, kind)
    names = tensors.keys() - shapes.keys() if subset else tensors.keys() ^ shapes.keys()
    if names:
        raise UserError(f"{path} is of another model: {min(names)} is only in one of the two")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise UserError(
                f"{path} is of another model: {name} has shape {tuple(shapes[name])}, here {tuple(tensor.shape)}"
            )
    fault_point("read tensors", path)
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path / kind)), no_dist=True)
