"""Reading a checkpoint directory: which one, is it whole, and the model in it.

A checkpoint is a directory `step_%08d` of safetensors and JSON files, described by a manifest with
their sizes and hashes; train/checkpoint.py writes it, on any number of ranks. Nothing here unpickles.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from cfg.errors import UserError, shown
from cfg.files import file_sha256, read_json

# One process reading or writing by itself is what we mean, and not to be wondered about.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 2
# Of the record of a step in its state: what it has, and what of it may be null.
RECORD = {"step", "tokens", "loss", "lr", "grad_norm", "tok_per_s", "mfu", "elapsed_s", "memory_bytes"}
UNKNOWN = {"mfu", "val_bpb"}
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
        manifest = read_json(path / MANIFEST)
    except OSError as e:
        raise ValueError(f"{MANIFEST}: {e.strerror}") from e
    except ValueError as e:
        raise ValueError(f"{MANIFEST} is damaged") from e
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not ours or not isinstance(manifest.get("config"), dict) or not isinstance(manifest.get("files"), dict):
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
            if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
                return f"{MANIFEST} is damaged"
            file = path / name
            if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
                return f"{shown(name)} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{shown(name)} has {file.stat().st_size} bytes instead of {shown(facts['bytes'])}"
            if not (skip and name.startswith(skip)) and file_sha256(file) != facts["sha256"]:
                return f"{name} is damaged (its hash differs)"
    except OSError as e:
        return f"{shown(e.filename or MANIFEST)}: {e.strerror}"
    except ValueError as e:
        return str(e)
    return None


def find_checkpoint(path: Path, report: Any = print, skip: str | None = None) -> Path | None:
    """The checkpoint that `path` stands for: itself, or the newest whole one of the run directory `path`.

    None if a run directory holds no checkpoint. A damaged one is reported and passed over. Files under `skip` are not
    hashed, as in `problem_with`. Raises UserError if `path` is not there, or all are damaged.
    """
    if not os.path.isdir(path):
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
        raise UserError(f"{path}: no whole checkpoint is left (newest: {problem}); move it away to start over")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """What a run was when it wrote the checkpoint: the step, its record, its data, and what else a resume needs.

    Raises UserError if it is not what a run of ours writes.
    """
    try:
        state = read_json(path / STATE)
    except OSError as e:
        raise UserError(f"{path / STATE}: {e.strerror}; a checkpoint without it cannot be resumed") from e
    except ValueError as e:
        raise UserError(f"{path / STATE} is damaged") from e
    if not _is_state(state):
        raise UserError(f"{path / STATE} is damaged")
    return dict(state)


def _is_state(state: Any) -> bool:
    """Whether it has what a resume looks at, and numbers where it computes with them."""
    kinds = {"step": int, "record": dict, "data": dict, "scaler": dict, "wandb_id": str | None}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        return False
    record, scaler = state["record"], state["scaler"]
    numbers = [*(value for key, value in record.items() if key not in UNKNOWN or value is not None), *scaler.values()]
    return (
        state["step"] >= 1
        and record.get("step") == state["step"]
        and record.keys() >= RECORD
        and all(type(n) is float or (type(n) is int and abs(n) < 2**63) for n in numbers)
        and 0 <= record["elapsed_s"] < 2**63
        and (not scaler or {"value", "good_steps"} <= scaler.keys() and all(map(math.isfinite, scaler.values())))
        and isinstance(state.get("tokenizer", {"name": "none"}), dict)
    )


def tensor_shapes(path: Path, kind: str) -> dict[str, torch.Size]:
    """Name → shape of the whole tensors in a checkpoint's folder `kind`, model or optimizer.

    Raises UserError if a part of a tensor is missing.
    """
    shapes = {}
    for name, about in dcp.HuggingFaceStorageReader(str(path / kind)).read_metadata().state_dict_metadata.items():
        if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
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
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path / kind)), no_dist=True)
