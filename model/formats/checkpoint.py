"""Reading checkpoints: finding the newest valid one, checking its files, loading its tensors.

A checkpoint is a directory `step_%08d` of safetensors and JSON files, described by a manifest with their sizes and
hashes. train/checkpoint_writer.py writes it on any number of ranks. No pickle is loaded.
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
from util.files import fault_point, file_sha256, is_latest_file, read_json

# Silence DCP's warning: we read without a process group on purpose.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 2
# What a resume needs of state.json. The record may hold any values beside its step.
STATE_KINDS = {"step": int, "record": dict, "data": dict, "scaler": dict}
STEP_NAME = re.compile(r"step_(\d{8,})")


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint directory, or -1."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoint directories of a run, newest first, valid or not, broken links included.

    Raises OSError if they cannot be listed: a run that found none instead would start over.
    """
    return _steps_in(run_dir / "checkpoints")


def _steps_in(folder: Path) -> list[Path]:
    try:
        fault_point("read list", folder)
        with os.scandir(folder) as entries:
            found = [Path(e.path) for e in entries if STEP_NAME.fullmatch(e.name) and (e.is_dir() or e.is_symlink())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=step_of, reverse=True)


def with_sha256(manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the manifest's own sha256, so that a flipped byte in it is detected too."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest. Raises StorageError if it is missing or damaged."""
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
    if "sha256" in manifest and manifest["sha256"] != with_sha256(manifest)["sha256"]:  # older ones have no hash
        raise ValueError(f"{MANIFEST} is damaged (its hash differs)")
    return manifest


def find_damage(path: Path, skip: str | None = None) -> str | None:
    """Returns what is wrong with a checkpoint, or None if all files are there with the size and hash in the manifest.

    Files whose name begins with `skip` are not hashed: hashing an optimizer's state takes twice as long as reading the
    model.
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


def checkpoints_at(path: Path) -> list[Path]:
    """Returns the checkpoints that `path` names, newest first, valid or not.

    It is a run directory, a run's `checkpoints`, a copy of it, the file `latest` in it, or a checkpoint. Raises OSError
    if they cannot be listed.
    """
    path = path.parent if is_latest_file(path) else path
    own = (path / MANIFEST).exists() or step_of(path) >= 0
    return [path] if own else list_checkpoints(path) or _steps_in(path)


def find_checkpoint(path: Path, report: Any = print, skip: str | None = None) -> Path | None:
    """Returns the newest valid checkpoint that `path` names (see `checkpoints_at`), or None if there is none.

    Damaged ones are reported and skipped. Files that begin with `skip` are not hashed. Raises UserError if `path` does
    not exist, StorageError if all checkpoints are damaged, OSError if they cannot be listed.
    """
    path = path.parent if is_latest_file(path) else path
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such checkpoint or run directory")
    problems = []
    for candidate in checkpoints_at(path):
        problem = find_damage(candidate, skip)
        if problem is None:
            return candidate
        problems.append(problem)
        report(f"checkpoint {candidate} is skipped: {problem}")
    if problems:
        raise StorageError(f"{path}: no valid checkpoint is left (newest: {problems[0]}); move it away to start over")
    return None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Converts errors while a checkpoint is read into a StorageError that names it."""
    try:
        yield
    except (OSError, SafetensorError, dcp.CheckpointException) as e:
        cause = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
        if not isinstance(cause, OSError | SafetensorError):
            raise RuntimeError(f"{path} could not be loaded") from e  # a bug here; CheckpointException is no Exception
        reason = getattr(cause, "strerror", None) or str(cause)
        raise StorageError(
            f"{path}: the checkpoint cannot be read ({reason}); nothing was changed; run the same command again,"
            f" or move the checkpoint away to use an older one"
        ) from e


class _Reader(dcp.HuggingFaceStorageReader):
    def read_data(self, plan: Any, planner: Any) -> Any:
        fault_point("read tensors", Path(self.path))
        return super().read_data(plan, planner)


def read_state(path: Path) -> dict[str, Any]:
    """Reads state.json: the step, its record, the data and whatever else a resume needs."""
    try:
        with reading(path):
            fault_point("read state", path / STATE)
            state = read_json(path / STATE)
    except ValueError as e:
        raise UserError(f"{path / STATE} is damaged") from e
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in STATE_KINDS.items()):
        raise UserError(f"{path / STATE} is damaged")
    return state


def tensor_shapes(path: Path, kind: str) -> dict[str, torch.Size]:
    """Returns the full shape of each tensor in a checkpoint's folder `kind`: model or optimizer.

    A tensor with a missing part is a UserError.
    """
    shapes = {}
    with reading(path):
        metadata = _Reader(str(path / kind)).read_metadata()
    for name, about in metadata.state_dict_metadata.items():
        if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
            raise UserError(f"{path}: parts of {name} are missing")
        shapes[name] = about.size
    return shapes


def load_tensors(path: Path, kind: str, tensors: dict[str, Tensor], subset: bool = False) -> None:
    """Fills `tensors` from the tensors of their names in a checkpoint's folder `kind`; a DTensor gets its local part.

    Every process reads on its own. With `subset` the checkpoint may have more tensors, as when each rank loads its own.
    A name or shape that differs is a UserError.
    """
    shapes = tensor_shapes(path, kind)
    names = tensors.keys() - shapes.keys() if subset else tensors.keys() ^ shapes.keys()
    if names:
        raise UserError(f"{path} holds another model: {min(names)} is only in one of the two")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise UserError(
                f"{path} holds another model: {name} has shape {tuple(shapes[name])}, here {tuple(tensor.shape)}"
            )
    with reading(path):
        dcp.load(tensors, storage_reader=_Reader(str(path / kind)), no_dist=True)
