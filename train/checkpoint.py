"""Checkpoints that appear whole or not at all, and the way back from them.

Saving: write everything into a hidden directory, flush it to disk, the manifest last; rename it to
`checkpoints/step_%08d`; write the name into `checkpoints/latest`; prune. A directory of that name is
never written into, so whatever the moment of a kill, what bears a step's name is complete.

Tensors are keyed by parameter name (model*.safetensors) and parameter name / state name
(optimizer*.safetensors), so that any strategy and any number of ranks can read them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.optim import Optimizer

from cfg.config import Config, ModelConfig
from cfg.errors import UserError
from cfg.files import file_sha256, flush_to_disk, write_atomically
from model.gpt import GPT
from model.weights import (
    FORMAT,
    MANIFEST,
    copy_parameters,
    find_checkpoint,
    list_checkpoints,
    problem_with,
    read_manifest,
    read_tensors,
    step_of,
)
from train.distributed import Ranks
from train.optimizer import load_optimizer_tensors, optimizer_tensors

SAVING, DELETING = ".saving_", ".deleting_"
STATE = "state.json"
# Model flags that may differ between a checkpoint and the run that resumes it.
FREE_MODEL_FLAGS = {"dropout", "flash", "zero_init", "init_from"}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def save(
    ranks: Ranks,
    config: Config,
    step: int,
    model: GPT,
    optimizer: Optimizer,
    state: dict[str, Any],
    extra: dict[str, bytes] | None = None,
) -> None:
    """Writes the checkpoint of `step`; every rank must call it. Raises UserError if the disk refuses.

    `state` is what else a resume needs, as JSON values; `extra` are files that go with the model, its tokenizer's.
    """

    def write() -> None:
        folder = Path(config.output_dir) / "checkpoints"
        try:
            _write(folder, config, step, ranks.world_size, model, optimizer, state, extra or {})
            _prune(folder, step, config.keep_last, config.keep_every)
        except OSError as e:
            shutil.rmtree(folder / f"{SAVING}{step:08d}", ignore_errors=True)
            raise UserError(
                f"--output_dir={config.output_dir}: the checkpoint of step {step} could not be written"
                f" ({e.strerror or e}); earlier ones are untouched, the same command goes on from them"
            ) from e

    ranks.on_main(write)


def _write(
    folder: Path,
    config: Config,
    step: int,
    world_size: int,
    model: GPT,
    optimizer: Optimizer,
    state: dict[str, Any],
    extra: dict[str, bytes],
) -> None:
    final, temporary = folder / f"step_{step:08d}", folder / f"{SAVING}{step:08d}"
    if final.exists():
        if problem_with(final) is None:
            return
        _move_aside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, temporary / "model.safetensors")
    tensors = {k: v.detach().contiguous() for k, v in optimizer_tensors(optimizer, model).items()}
    save_file(tensors, temporary / "optimizer.safetensors")
    _write_json(temporary / STATE, {"step": step, **state})
    for name, content in extra.items():
        (temporary / name).write_bytes(content)
    files = {}
    for path in sorted(temporary.iterdir()):
        flush_to_disk(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "torch": torch.__version__,
        "config": config.model_dump(),
        "files": files,
    }
    _write_json(temporary / MANIFEST, manifest)
    flush_to_disk(temporary / MANIFEST)
    flush_to_disk(temporary)
    os.rename(temporary, final)
    flush_to_disk(folder)
    write_atomically(folder / "latest", f"{final.name}\n".encode())  # for people and scripts; we look at them all


def _move_aside(damaged: Path) -> None:
    n = 1
    while (aside := damaged.with_name(f"damaged_{damaged.name}.{n}")).exists():
        n += 1
    os.rename(damaged, aside)


def _prune(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Deletes all but the newest `keep_last` and every multiple of `keep_every`.

    Looks only at `step`, just written and therefore whole, and what is older: a newer one was passed over
    because it is damaged, and must not count as one that is kept. Renames before deleting, so that a kill
    in between leaves no half checkpoint under a step's name.
    """
    for path in [p for p in list_checkpoints(folder.parent) if step_of(p) <= step][keep_last:]:
        if not (keep_every and step_of(path) % keep_every == 0):
            doomed = path.with_name(DELETING + path.name)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def prepare_dir(output_dir: Path, config_yaml: str) -> None:
    """Writes config.yaml, and removes what a killed run left half-written or half-deleted."""
    write_atomically(output_dir / "config.yaml", config_yaml.encode())
    for prefix in (SAVING, DELETING):
        for path in (output_dir / "checkpoints").glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def choose(output_dir: Path, resume: str, report: Any = print) -> Path | None:
    """The checkpoint to go on from, or None to start fresh. For rank 0, which shares the answer.

    A run's own checkpoints win over `--resume=PATH`, so that the same command can be given again
    after an interruption; going back to an older checkpoint of the same run is refused.
    """
    own = list_checkpoints(output_dir)
    if resume == "never":
        if own:
            raise UserError(
                f"--resume=never, but {output_dir} holds checkpoints (newest {own[0].name});"
                f" use --resume=auto to go on from it, or another --output_dir"
            )
        return None
    if resume == "auto" or own:
        if resume != "auto" and Path(resume).resolve() in [p.resolve() for p in own[1:]]:
            raise UserError(
                f"--resume={resume}: {output_dir} holds newer checkpoints; give another --output_dir to branch off"
            )
        if resume != "auto":
            report(f"--resume={resume} was where this run began; it goes on from its own checkpoints")
        return find_checkpoint(output_dir, report) if own else None
    try:
        found = find_checkpoint(Path(resume), report)
    except UserError as e:
        raise UserError(f"--resume: {e}") from e
    if found is None:
        raise UserError(f"--resume={resume}: holds no checkpoint")
    return found


def check_same_model(path: Path, config: Config) -> list[str]:
    """Compares the checkpoint's flags with this run's; returns the harmless changes as `flag: old → new`.

    Raises UserError naming the flags if the model is another one.
    """
    saved = read_manifest(path)["config"]
    now = config.model_dump()
    changes = {k: f"{k}: {saved[k]} → {v}" for k, v in now.items() if k in saved and saved[k] != v}
    fixed = [k for k in ModelConfig.model_fields if k in changes and k not in FREE_MODEL_FLAGS]
    if fixed:
        flags = ", ".join(f"--{k}={now[k]} (checkpoint: {saved[k]})" for k in fixed)
        raise UserError(f"{path} is of another model: {flags}; set them back, or use another --output_dir")
    return [line for k, line in changes.items() if k not in ("output_dir", "resume", "cfg")]


def read_state(path: Path) -> dict[str, Any]:
    """What `save` was given as `state`, and the step."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def load(path: Path, model: GPT, optimizer: Optimizer) -> None:
    """Fills model and optimizer from a checkpoint that `choose` has verified."""
    copy_parameters(model, read_tensors(path, "model"))
    load_optimizer_tensors(optimizer, model, read_tensors(path, "optimizer"))
