"""Reading a checkpoint directory: which one, is it whole, and the model in it.

A checkpoint is a directory `step_%08d` of safetensors and JSON files, described by a manifest with
their sizes and hashes; train/checkpoint.py writes it, on any number of ranks. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from util.errors import StorageError, UserError, quote
from util.faults import fault_point
from util.files import file_sha256, read_json

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
    """Checkpoint directories of a run, newest first, whole or not, also links to what is gone.

    Raises OSError if they cannot be listed: a run that took that for "none" would start over.
    """
    folder = run_dir / "checkpoints"
    try:
        fault_point("read list", folder)
        with os.scandir(folder) as entries:
            found = [Path(e.path) for e in entries if STEP_NAME.fullmatch(e.name) and (e.is_dir() or e.is_symlink())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=step_of, reverse=True)


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of its own, without which a flipped byte in a flag would make it another model's."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises StorageError if there is none that can be read."""
    try:
        return _manifest(path)
    except ValueError as e:
        raise StorageError(f"{path}: {e}") from e


def _manifest(path: Path) -> dict[str, Any]:
    try:
        fault_point("read manifest", path / MANIFEST)
        manifest = read_json(path / MANIFEST)
    except OSError as e:
        raise ValueError(f"{MANIFEST}: {e.strerror}") from e
    except ValueError as e:
        raise ValueError(f"{MANIFEST} is damaged") from e
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not ours or not isinstance(manifest.get("config"), dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} is not of format {FORMAT}")
    if "sha256" in manifest and manifest["sha256"] != seal(manifest)["sha256"]:  # those of old have none
        raise ValueError(f"{MANIFEST} is damaged (its hash differs)")
    return manifest


def problem_with(path: Path, skip: str | None = None) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None if every file is there and hashes as promised.

    Files whose name begins with `skip` need only be there in full: hashing an optimizer's state takes twice as long
    as reading the model.
    """
    try:
        listed = _manifest(path)["files"]
        if odd := [f for f in path.glob("*/*") if str(f.relative_to(path)) not in listed]:
            return f"{odd[0].relative_to(path)} does not belong to it"
        for name, facts in listed.items():
            if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
                return f"{MANIFEST} is damaged"
            file = path / name
            if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
                return f"{quote(name)} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{quote(name)} has {file.stat().st_size} bytes instead of {quote(facts['bytes'])}"
            fault_point("read hash", file)
            if not (skip and name.startswith(skip)) and file_sha256(file) != facts["sha256"]:
                return f"{name} is damaged (its hash differs)"
    except OSError as e:
        return f"{quote(e.filename or 'a file')}: {e.strerror}"
    except ValueError as e:
        return str(e)
    return None


def find_checkpoint(path: Path, report: Any = print, skip: str | None = None) -> Path | None:
    """The checkpoint that `path` stands for: itself, or the newest whole one of the run directory `path`.

    None if a run directory holds no checkpoint. A damaged one is reported and passed over. Files under `skip` are not
    hashed, as in `problem_with`. Raises UserError if `path` is not there, StorageError if all are damaged, OSError if
    the disk does not say what there is.
    """
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such checkpoint or run directory")
    if path.name == "checkpoints":
        path = path.parent
    own = (path / MANIFEST).exists() or step_of(path) >= 0
    candidates = [path] if own else list_checkpoints(path)
    problems = []
    for candidate in candidates:
        problem = problem_with(candidate, skip)
        if problem is None:
            return candidate
        problems.append(problem)
        report(f"checkpoint {candidate} is passed over: {problem}")
    if problems:
        raise StorageError(f"{path}: no whole checkpoint is left (newest: {problems[0]}); move it away to start over")
    return None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the disk refuses or has lost while a checkpoint is read becomes a StorageError that names it."""
    try:
        yield
    except (OSError, SafetensorError, dcp.CheckpointException) as e:
        cause = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
        if not isinstance(cause, OSError | SafetensorError):
            raise RuntimeError(f"{path} could not be loaded") from e  # a mistake of ours; DCP's is no Exception
        reason = getattr(cause, "strerror", None) or str(cause)
        raise StorageError(
            f"{path}: the checkpoint cannot be read ({reason}); nothing was changed, the same command tries again;"
            f" if it stays so, move it away to use an older one"
        ) from e


class _Reader(dcp.HuggingFaceStorageReader):
    def read_data(self, plan: Any, planner: Any) -> Any:
        fault_point("read tensors", Path(self.path))
        return super().read_data(plan, planner)


def read_state(path: Path) -> dict[str, Any]:
    """What a run was when it wrote the checkpoint: the step, its record, its data, and what else a resume needs.

    Raises UserError if it is not what a run of ours writes, StorageError if the disk refuses.
    """
    try:
        with reading(path):
            fault_point("read state", path / STATE)
            state = read_json(path / STATE)
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
    record, scaler, guard = state["record"], state["scaler"], state.get("guard", {"norms": []})
    if not isinstance(guard, dict) or not isinstance(guard.get("norms"), list):
        return False
    if not isinstance(record.get("skipped", ""), str):  # why the step was not taken
        return False
    if not all(type(count) is int for name, count in guard.items() if name != "norms"):
        return False
    numbers = [v for k, v in record.items() if k != "skipped" and (k not in UNKNOWN or v is not None)]
    numbers += [*scaler.values(), *guard["norms"]]
    return (
        state["step"] >= 1
        and record.get("step") == state["step"]
        and record.keys() >= RECORD
        and all(type(n) is float or (type(n) is int and abs(n) < 2**63) for n in numbers)
        and all(type(n) is int and -1 <= n < 2**40 for name, n in guard.items() if name != "norms")
        and 0 <= record["elapsed_s"] < 2**63
        and (not scaler or {"value", "good_steps"} <= scaler.keys() and all(map(math.isfinite, scaler.values())))
        and isinstance(state.get("tokenizer", {"name": "none"}), dict)
    )


def tensor_shapes(path: Path, kind: str) -> dict[str, torch.Size]:
    """Name → shape of the whole tensors in a checkpoint's folder `kind`, model or optimizer.

    Raises UserError if a part of a tensor is missing, StorageError if the disk refuses.
    """
    shapes = {}
    with reading(path):
        metadata = _Reader(str(path / kind)).read_metadata()
    for name, about in metadata.state_dict_metadata.items():
        if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
            raise UserError(f"{path}: its parts of {name} do not make up the whole")
        shapes[name] = about.size
    return shapes


def load_tensors(path: Path, kind: str, tensors: dict[str, Tensor], subset: bool = False) -> None:
    """Reads into `tensors` those of the same names in a checkpoint's folder `kind`, or of DTensors the local part.

    Every process reads for itself. With `subset` there may be more in the checkpoint, as when each rank asks for
    its own. Raises UserError at the first name or shape that does not fit, StorageError if the disk refuses.
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
    with reading(path):
        dcp.load(tensors, storage_reader=_Reader(str(path / kind)), no_dist=True)
