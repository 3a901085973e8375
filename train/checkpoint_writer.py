"""Writing a checkpoint directory, which is complete or absent.

Every rank writes its part into a hidden directory and flushes it to disk; the manifest comes last. Rank 0 renames the
directory to `checkpoints/step_%08d`, writes that name into `checkpoints/latest`, and deletes old checkpoints. A
directory with that name is never written into, so a directory named step_… is always complete, even after a SIGKILL.

Tensors are keyed by parameter name (model/) and parameter name / state name (optimizer/). torch's distributed
checkpointing (DCP) plans which rank writes what, in the safetensors format, because DCP's own format contains a pickle.
model/formats/checkpoint.py reads checkpoints, for any strategy and any number of ranks.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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

from cfg.config import Config
from model.formats.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    find_damage,
    list_checkpoints,
    read_state,
    step_of,
    with_sha256,
)
from model.gpt import GPT
from model.lora import saved_names
from train.disk_space import advise_when_full, checkpoint_bytes
from train.optim import named_states
from util.errors import StorageError, UserError
from util.files import fault_point, file_sha256, flush_to_disk, path_in_errors, write_atomically
from util.ranks import Ranks, group_timeout

T = TypeVar("T")
SAVING, DELETING = ".saving_", ".deleting_"


def _write_json(path: Path, value: Any) -> None:
    with path_in_errors(path):
        path.write_text(json.dumps(value, indent=1) + "\n")


def delete(folder: Path) -> None:
    """Deletes an old or partial checkpoint. A failure is only a warning: it wastes space but breaks nothing."""
    try:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    except OSError as e:
        print(f"warning: {e.filename or folder} could not be deleted: {e.strerror}", file=sys.stderr)


class _Writer(dcp.HuggingFaceStorageWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        fault_point("save tensors", Path(self.path))
        return super().write_data(plan, planner)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in the background with --async_save. Every rank has one.

    An error in the background is raised by the next `save` or by `wait`; `failed` returns whether there is one.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.folder = config, Path(config.output_dir) / "checkpoints"
        # A separate process group: training runs collectives while the background thread saves.
        timeout = group_timeout(config.start_timeout_minutes)
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.ranks = replace(ranks, cpu_group=group)
        self._bytes = 0  # size of a checkpoint
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        if config.async_save == "1" or (config.async_save == "auto" and ranks.device.type == "cuda"):
            cuda = ranks.device.type == "cuda"
            # A new thread's default device is GPU 0, where every rank would open a context.
            set_device: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (ranks.device,)}
            self._thread = ThreadPoolExecutor(1, "checkpoint", **(set_device if cuda else {}))

    def save(
        self, step: int, model: GPT, optimizer: Optimizer, state: dict[str, Any], extra: dict[str, bytes] | None = None
    ) -> float:
        """Writes the checkpoint of `step`, or starts to, and returns the seconds for which training waited.

        `state` holds everything else that resume needs, as JSON values. `extra` are the tokenizer's files, which are
        stored with the model.
        """
        before = time.perf_counter()
        self.wait()
        self._bytes = checkpoint_bytes(model, self.config)
        parameters = dict(model.named_parameters())
        saved = saved_names(parameters, self.config)
        parts = {
            "model": {name: p.detach() for name, p in parameters.items() if name in saved},
            "optimizer": {name: t.detach() for name, t in named_states(optimizer, model).items()},
        }
        if self.config.zero_stage <= 1:
            parts["model"] = partition(parts["model"], self.ranks)
        if self.config.zero_stage == 0:
            parts["optimizer"] = partition(parts["optimizer"], self.ranks)
        if self._thread is None:
            self._write(step, parts, state, extra or {})
        else:
            # Into ordinary memory: pinning takes longer than it saves, and torch 2.11's stager keeps no buffers.
            stager = DefaultStager(StagingOptions(False, False, False, False))
            copy = stager.stage(parts)
            self._running = self._thread.submit(self._write, step, copy, state, extra or {})
        return time.perf_counter() - before

    def failed(self) -> bool:
        """Returns whether the save in the background has failed on this rank."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Waits until the save in the background is complete, and raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any], extra: Any) -> None:
        temporary = self.folder / f"{SAVING}{step:08d}"
        new = self._on_all_ranks(step, lambda: self.ranks.is_main and _prepare_dir(self.folder, step, parts, state))
        if not self.ranks.gather(new)[0]:
            return
        self._on_all_ranks(step, lambda: self._write_tensors(temporary, parts))
        hashes = self._on_all_ranks(step, lambda: self._hash_files(temporary, parts))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": self.ranks.world_size,
            "torch": torch.__version__,
            "config": self.config.model_dump(),
            "files": {name: facts for part in self.ranks.gather(hashes) for name, facts in part.items()},
        }
        self._on_all_ranks(step, lambda: self._publish(step, manifest, state, extra) if self.ranks.is_main else None)

    def _on_all_ranks(self, step: int, act: Callable[[], T]) -> T:
        """Runs `act` on every rank. If it fails on one, deletes the partial checkpoint, and all raise StorageError."""

        def convert(error: Exception) -> StorageError:
            rank: int = self.ranks.rank
            cause: Any = error
            if isinstance(error.__cause__, CheckpointException):  # the same on all ranks
                rank, (cause, _) = next(iter(error.__cause__.failures.items()))
            elif not isinstance(error, OSError):
                traceback.print_exc()  # a bug; the other ranks must not wait for this one
            reason = str(getattr(cause, "strerror", None) or cause or type(cause).__name__).partition("\n")[0]
            where = f" on rank {rank}" if self.ranks.world_size > 1 else ""
            return StorageError(
                f"--output_dir={self.config.output_dir}: the checkpoint of step {step} could not be written"
                f" ({reason}{where})"
            )

        def clean_up() -> str:
            shutil.rmtree(self.folder / f"{SAVING}{step:08d}", ignore_errors=True)
            is_full = any(os.strerror(number) in str(problem) for number in (errno.ENOSPC, errno.EDQUOT))
            with suppress(OSError, UserError):
                intact = "earlier checkpoints are intact: " if list_checkpoints(self.folder.parent) else ""
                return intact + (f"{advise_when_full(self.folder, self._bytes)}, then " if is_full else "")
            return ""

        try:
            return self.ranks.on_all(act, convert)
        except StorageError as error:
            problem = error
        advice = self.ranks.on_main(clean_up)
        raise StorageError(f"{problem}; {advice}run the same command again to resume")

    def _write_tensors(self, temporary: Path, parts: dict[str, dict[str, Tensor]]) -> None:
        for kind, tensors in parts.items():
            writer = _Writer(str(temporary / kind), save_distributed=True)
            alone = self.ranks.cpu_group is None
            try:
                dcp.save(tensors, storage_writer=writer, process_group=self.ranks.cpu_group, no_dist=alone)
            except CheckpointException as e:  # a BaseException
                raise RuntimeError("torch could not save") from e

    def _hash_files(self, temporary: Path, kinds: Any) -> dict[str, dict[str, Any]]:
        """Flushes the files that this rank wrote, and returns name → size and hash."""
        facts = {}
        for kind in kinds:
            for path in sorted((temporary / kind).glob(f"shard-{self.ranks.rank + 1:05d}-*")):
                fault_point("save flush", path)
                flush_to_disk(path)
                facts[f"{kind}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return facts

    def _publish(self, step: int, manifest: dict[str, Any], state: dict[str, Any], extra: dict[str, bytes]) -> None:
        """Writes state and manifest, renames the directory, and deletes old checkpoints."""
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
        try:  # the checkpoint is complete: from here on, errors are warnings
            fault_point("save latest", self.folder / "latest")
            # For people: resume looks at every checkpoint.
            write_atomically(self.folder / "latest", f"{final.name}\n".encode())
            _prune(self.folder, step, self.config.keep_last, self.config.keep_every)
        except OSError as e:
            about = f"{e.filename}: {e.strerror}"
            print(f"warning: the checkpoint of step {step} is written, but {about}", file=sys.stderr)


def partition(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Returns the replicated tensors that this rank writes.

    Greedy balancing: the largest tensor first, to the rank with the least so far.
    """
    loads, mine = [0] * ranks.world_size, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        rank = loads.index(min(loads))
        loads[rank] += tensor.numel()
        if rank == ranks.rank:
            mine[name] = tensor
    return mine


def _prepare_dir(folder: Path, step: int, kinds: Any, state: dict[str, Any]) -> bool:
    """Makes an empty hidden directory for the checkpoint of `step`; returns False if that checkpoint exists already.

    A checkpoint that was unreadable during a roll-back but is readable now was trained on other data: its guard state
    differs. It is moved out of the way.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f"{SAVING}{step:08d}"
    if final.exists():
        if find_damage(final) is None and read_state(final).get("guard") == state.get("guard"):
            return False
        _move_damaged(final)
    fault_point("save make room", temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    for kind in kinds:
        (temporary / kind).mkdir(parents=True)
    return True


def _move_damaged(damaged: Path) -> None:
    n = 1
    while (target := damaged.with_name(f"damaged_{damaged.name}.{n}")).exists():
        n += 1
    os.rename(damaged, target)


def _prune(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Deletes all checkpoints but the newest `keep_last` and every multiple of `keep_every`.

    Looks only at the checkpoint of `step`, which was just written, and at older ones. A newer one was skipped at
    resume because it is damaged, and must not count as kept. Renames before deleting, so that a kill in between
    leaves no partial checkpoint under a step's name.
    """
    for path in [p for p in list_checkpoints(folder.parent) if step_of(p) <= step][keep_last:]:
        if not (keep_every and step_of(path) % keep_every == 0):
            doomed = path.with_name(DELETING + path.name)
            fault_point("prune rename", path)
            os.rename(path, doomed)
            fault_point("prune delete", doomed)
            delete(doomed)
