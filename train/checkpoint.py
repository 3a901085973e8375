"""Checkpoints that appear whole or not at all, and the way back from them.

Saving: every rank writes its part into a hidden directory and flushes it to disk, the manifest comes last; rank 0
renames the directory to `checkpoints/step_%08d`, writes the name into `checkpoints/latest`, and prunes. A directory
of that name is never written into, so whatever the moment of a kill, what bears a step's name is complete.

Tensors are keyed by parameter name (model/) and parameter name / state name (optimizer/). torch's distributed
checkpointing (DCP) plans who writes what and reads it back for any strategy and any number of ranks; in its
safetensors format, since its own keeps a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from cfg.config import Config, ModelConfig
from cfg.flags import training_only_flags
from model.formats.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    load_tensors,
    read_manifest,
    read_state,
    step_of,
    tensor_shapes,
    with_sha256,
)
from model.gpt import GPT
from train.optim import forget_states, make_states, named_states
from util.errors import StorageError, UserError, quote
from util.files import fault_point, file_sha256, flush_to_disk, path_in_errors, write_atomically
from util.ranks import Ranks, group_timeout

T = TypeVar("T")
SAVING, DELETING = ".saving_", ".deleting_"
# Model flags that may differ between a checkpoint and the run that resumes it.
FREE_MODEL_FLAGS = training_only_flags()  # not vocab_pad, which changes the shapes of saved tensors


def _write_json(path: Path, value: Any) -> None:
    with path_in_errors(path):
        path.write_text(json.dumps(value, indent=1) + "\n")


def _delete(folder: Path) -> None:
    """What cannot be deleted takes room, and is therefore mentioned; nobody needs it any more."""
    try:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    except OSError as e:
        print(f"warning: {e.filename or folder} could not be deleted: {e.strerror}", file=sys.stderr)


class _Writer(dcp.HuggingFaceStorageWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        fault_point("save tensors", Path(self.path))
        return super().write_data(plan, planner)


class Saver:
    """Writes a run's checkpoints, one at a time, in the background if asked; every rank has one.

    What goes wrong in the background is raised by the next `save`, or by `wait`; `failed` tells without waiting.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.folder = config, Path(config.output_dir) / "checkpoints"
        # A group of its own, as the loop goes on talking while this one writes.
        timeout = group_timeout(config.start_timeout_minutes)
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.ranks = replace(ranks, cpu_group=group)
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        if config.async_save == "1" or (config.async_save == "auto" and ranks.device.type == "cuda"):
            cuda = ranks.device.type == "cuda"
            # A new thread's device is GPU 0, where each rank would otherwise open a context.
            set_device: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (ranks.device,)}
            self._thread = ThreadPoolExecutor(1, "checkpoint", **(set_device if cuda else {}))

    def save(
        self, step: int, model: GPT, optimizer: Optimizer, state: dict[str, Any], extra: dict[str, bytes] | None = None
    ) -> float:
        """Writes the checkpoint of `step`, or begins to; returns the seconds for which the loop stood still.

        `state` is what else a resume needs, as JSON values; `extra` are files that go with the model, its
        tokenizer's. Raises StorageError if the disk refuses.
        """
        before = time.perf_counter()
        self.wait()
        parts = {
            "model": {name: p.detach() for name, p in model.named_parameters()},
            "optimizer": {name: t.detach() for name, t in named_states(optimizer, model).items()},
        }
        if self.config.zero_stage <= 1:
            parts["model"] = _share(parts["model"], self.ranks)
        if self.config.zero_stage == 0:
            parts["optimizer"] = _share(parts["optimizer"], self.ranks)
        if self._thread is None:
            self._write(step, parts, state, extra or {})
        else:
            # Into ordinary memory: to pin it takes longer than it saves, and 2.11's stager keeps no buffers anyway.
            stager = DefaultStager(StagingOptions(False, False, False, False))
            copy = stager.stage(parts)
            self._running = self._thread.submit(self._write, step, copy, state, extra or {})
        return time.perf_counter() - before

    def failed(self) -> bool:
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Until what was begun is on disk. Raises StorageError if it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @contextmanager
    def whatever_happens(self) -> Iterator[None]:
        """If the block fails, a checkpoint that is on its way to disk is waited for all the same."""
        try:
            yield
        except Exception:
            with suppress(Exception):
                self.wait()
            raise

    def close(self) -> None:
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], extra: Any) -> None:
        temporary = self.folder / f"{SAVING}{step:08d}"
        guard = state.get("guard")
        if not self._together(step, lambda: self.ranks.is_main and _make_room(self.folder, step, parts, guard))[0]:
            return
        self._together(step, lambda: self._write_tensors(temporary, parts))
        facts = self._together(step, lambda: self._describe(temporary, parts))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": self.ranks.world_size,
            "torch": torch.__version__,
            "config": self.config.model_dump(),
            "files": {name: about for own in facts for name, about in own.items()},
        }
        self._together(step, lambda: self._publish(step, manifest, state, extra) if self.ranks.is_main else None)

    def _together(self, step: int, act: Callable[[], T]) -> list[T]:
        """What `act` gives on every rank. If the disk refuses one of them, all raise the same StorageError."""
        result: Any = None
        try:
            result, problem = act(), None
        except (Exception, CheckpointException) as e:  # any: the other ranks wait for this one in `gather`
            if not isinstance(e, OSError | CheckpointException):
                traceback.print_exc()
            result, problem = None, _reason(e, self.ranks)
        everyone = self.ranks.gather((result, problem))
        if problem := next((p for _, p in everyone if p), None):
            if self.ranks.is_main:
                shutil.rmtree(self.folder / f"{SAVING}{step:08d}", ignore_errors=True)
            raise StorageError(
                f"--output_dir={self.config.output_dir}: the checkpoint of step {step} could not be written"
                f" ({problem}); earlier ones are untouched, the same command goes on from them"
            )
        return [value for value, _ in everyone]

    def _write_tensors(self, temporary: Path, parts: dict[str, dict[str, Tensor]]) -> None:
        for kind, tensors in parts.items():
            writer = _Writer(str(temporary / kind), save_distributed=True)
            alone = self.ranks.cpu_group is None
            dcp.save(tensors, storage_writer=writer, process_group=self.ranks.cpu_group, no_dist=alone)

    def _describe(self, temporary: Path, kinds: Any) -> dict[str, dict[str, Any]]:
        """Name → size and hash of the files that this rank wrote."""
        facts = {}
        for kind in kinds:
            for path in sorted((temporary / kind).glob(f"shard-{self.ranks.rank + 1:05d}-*")):
                fault_point("save flush", path)
                flush_to_disk(path)
                facts[f"{kind}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return facts

    def _publish(self, step: int, manifest: dict[str, Any], state: dict[str, Any], extra: dict[str, bytes]) -> None:
        """Completes the checkpoint and lets it appear."""
        temporary, final = self.folder / f"{SAVING}{step:08d}", self.folder / f"step_{step:08d}"
        fault_point("save state", temporary / STATE)
        _write_json(temporary / STATE, {"step": step, **state})
        for name, content in extra.items():
            (temporary / name).write_bytes(content)
        for name in (STATE, *extra):
            path = temporary / name
            flush_to_disk(path)
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        fault_point("save manifest", temporary / MANIFEST)
        _write_json(temporary / MANIFEST, with_sha256(manifest))
        flush_to_disk(temporary / MANIFEST)
        for folder in (temporary / "model", temporary / "optimizer", temporary):
            flush_to_disk(folder)
        fault_point("save rename", final)
        os.rename(temporary, final)
        fault_point("save appear", final)
        flush_to_disk(self.folder)
        try:  # from here on nothing can be lost
            fault_point("save latest", self.folder / "latest")
            write_atomically(self.folder / "latest", f"{final.name}\n".encode())  # for people; we look at them all
            _prune(self.folder, step, self.config.keep_last, self.config.keep_every)
        except OSError as e:
            about = f"{e.filename}: {e.strerror}"
            print(f"warning: the checkpoint of step {step} is written, but {about}", file=sys.stderr)


def _share(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Of tensors that all ranks hold, those that this one writes: dealt out, the largest first, to who has least."""
    loads, mine = [0] * ranks.world_size, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        rank = loads.index(min(loads))
        loads[rank] += tensor.numel()
        if rank == ranks.rank:
            mine[name] = tensor
    return mine


def _reason(error: BaseException, ranks: Ranks) -> str:
    """In a few words why a save failed, and on which rank; DCP brings the errors of each to all."""
    rank = ranks.rank
    if isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
    why = str(getattr(error, "strerror", None) or error or type(error).__name__).partition("\n")[0]
    return why + (f" on rank {rank}" if ranks.world_size > 1 else "")


def _make_room(folder: Path, step: int, kinds: Any, guard: Any) -> bool:
    """An empty hidden directory for the checkpoint of `step`; False if that checkpoint is already there.

    One that could not be read when training went back, but can be now, is of other data: its `guard` tells.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f"{SAVING}{step:08d}"
    if final.exists():
        if find_damage(final) is None and read_state(final).get("guard") == guard:
            return False
        _move_aside(final)
    fault_point("save make room", temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    for kind in kinds:
        (temporary / kind).mkdir(parents=True)
    return True


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
            fault_point("prune rename", path)
            os.rename(path, doomed)
            fault_point("prune delete", doomed)
            _delete(doomed)


def prepare_dir(output_dir: Path, config_yaml: str) -> None:
    """Writes config.yaml, and removes what a killed run left half-written or half-deleted."""
    fault_point("config", output_dir / "config.yaml")
    write_atomically(output_dir / "config.yaml", config_yaml.encode())
    for prefix in (SAVING, DELETING):
        for path in (output_dir / "checkpoints").glob(f"{prefix}*"):
            _delete(path)


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
        if resume != "auto" and os.path.realpath(resume) in [os.path.realpath(p) for p in own[1:]]:
            raise UserError(
                f"--resume={resume}: {output_dir} holds newer checkpoints; give another --output_dir to branch off"
            )
        if resume != "auto":
            report(f"--resume={resume} was where this run began; it goes on from its own checkpoints")
        return find_checkpoint(output_dir, report) if own else None
    try:
        found = find_checkpoint(Path(resume), report)
    except UserError as e:
        raise type(e)(f"--resume: {e}") from e
    if found is None:
        raise UserError(f"--resume={resume}: holds no checkpoint")
    return found


def check_same_model(path: Path, config: Config) -> list[str]:
    """Compares the checkpoint's flags with this run's; returns the harmless changes as `flag: old → new`.

    Raises UserError naming the flags if the model is another one, StorageError if the disk refuses.
    """
    saved = read_manifest(path)["config"]
    now = config.model_dump()
    changes = {k: f"{k}: {quote(saved[k])} → {v}" for k, v in now.items() if k in saved and saved[k] != v}
    fixed = [k for k in ModelConfig.model_fields if k in changes and k not in FREE_MODEL_FLAGS]
    if fixed:
        flags = ", ".join(f"--{k}={now[k]} (checkpoint: {quote(saved[k])})" for k in fixed)
        raise UserError(f"{path} is of another model: {flags}; set them back, or use another --output_dir")
    return [line for k, line in changes.items() if k not in ("output_dir", "resume", "cfg")]


def load(path: Path, model: GPT, optimizer: Optimizer) -> None:
    """Fills model and optimizer from a checkpoint that `choose` has verified, each rank its own part.

    Raises UserError if it is of another model, or holds no optimizer, StorageError if the disk refuses.
    """
    if not (path / "optimizer").is_dir():
        raise UserError(f"{path} holds a model without its optimizer; resume from the checkpoint it was made of")
    load_tensors(path, "model", {name: p.detach() for name, p in model.named_parameters()})
    forget_states(optimizer)  # first, as there may be no room for both
    if tensor_shapes(path, "optimizer"):  # none: the optimizer had not stepped yet
        load_tensors(path, "optimizer", make_states(optimizer, model), subset=True)
