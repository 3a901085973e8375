"""Saving, resuming and rolling back a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.optim import Optimizer

from cfg.config import Config, ModelConfig, to_yaml
from cfg.flags import training_only_flags
from cfg.lora import parse_lora_targets
from data.fingerprint import check_same_data, check_same_tokenizer
from data.loader import Loader
from data.mixed_loader import MixedLoader
from data.tokenizers.tokenizer import Tokenizer
from model.formats.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    read_manifest,
    read_state,
    tensor_shapes,
)
from model.formats.lora_base import Base, base_in_state, check_same_base
from model.gpt import GPT
from train import watchdog
from train.checkpoint_writer import DELETING, SAVING, CheckpointWriter, delete
from train.inputs import tokenizer_fingerprint
from train.metrics import Metrics
from train.optim import forget_states, make_states
from train.parallel import ParallelModel
from train.plot import Plots
from train.rank_log import restore_log
from train.run_dir import restore_output_dir
from train.run_facts import add_roll_back
from train.stability import LossScaler, SpikeGuard
from util.errors import DivergedError, StorageError, UserError, closest, quote
from util.ranks import Ranks

# Model flags that may differ between a checkpoint and the run that resumes it.
FREE_MODEL_FLAGS = training_only_flags()  # not vocab_pad, which changes the shapes of saved tensors
# Flags of LoRA that may not differ. They decide which parameters exist and are saved, and what adapters compute.
LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_targets", "lora_embeddings", "resize_embeddings")


class Checkpointer:
    """Saves and restores everything that a run continues with.

    That is: weights, optimizer, loss scaler, spike guard, the W&B id, and fingerprints of data and tokenizer. As a
    context manager it waits for a save in the background if the block raises an exception.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        model: ParallelModel,
        optimizer: Optimizer,
        scaler: LossScaler,
        guard: SpikeGuard,
        metrics: Metrics,
        train_data: Loader | MixedLoader,
        tokenizer: Tokenizer | None,
        base: Base | None = None,
    ):
        self.config, self.ranks, self.output_dir = config, ranks, Path(config.output_dir)
        self.model, self.optimizer = model, optimizer
        self.scaler, self.guard, self.metrics = scaler, guard, metrics
        self.train_data, self.tokenizer, self.base = train_data, tokenizer, base
        self.fingerprint = tokenizer_fingerprint(config, tokenizer)
        self.writer = CheckpointWriter(config, ranks)
        self.plots = Plots(config)
        self.started_from = "auto"  # the checkpoint of another run from which this one branched off, if any

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, Exception):
            with suppress(Exception):
                self.writer.wait()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this rank."""
        return self.writer.failed()

    def wait(self) -> None:
        """Waits for the save in the background, and raises its error."""
        self.writer.wait()

    def close(self) -> None:
        self.writer.close()

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Restores the checkpoint that --resume selects; returns its step and that step's record.

        Returns (0, {}) for a fresh start. Partial checkpoints of a killed run are deleted.
        """
        state = self._restore(self.config.resume)
        self.ranks.on_main(lambda: clean_up_partial(self.output_dir))
        if state is None:
            return 0, {}
        self.metrics.wandb_id = state["wandb_id"]
        return state["step"], state["record"]

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Saves the checkpoint of `step`, and adds to its record how long training waited."""
        watchdog.progress(f"the save of step {step}", self.config.start_timeout_minutes)
        if self.ranks.on_main(lambda: restore_output_dir(self.output_dir, to_yaml(self.config))):
            self.ranks.on_all(lambda: restore_log(self.output_dir, self.ranks))
            self.metrics.restore(step)
        self.metrics.flush()
        state = {
            "record": record.copy(),
            "data": self.train_data.fingerprint,
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "wandb_id": self.metrics.wandb_id,
            "tokenizer": self.fingerprint,
            **({"base": self.base.to_json()} if self.base else {}),
        }
        files = self.tokenizer.files if self.tokenizer else {}
        record["save_s"] = self.writer.save(step, self.model.gpt, self.optimizer, state, files)
        self.started_from = "auto"  # a roll-back from now on returns to a checkpoint of this run
        if self.ranks.is_main and step < self.config.num_iterations:  # the end draws them too
            self.plots.redraw()

    def roll_back(self, record: dict[str, Any], problem: str) -> int:
        """Restores the last good checkpoint and returns its step. The data since then is skipped.

        `record` is that of the step with the problem. Raises DivergedError without a checkpoint, or after
        --max_rollbacks roll-backs to the same one.
        """
        config, step = self.config, record["step"]
        watchdog.progress(f"the roll-back from step {step}", config.start_timeout_minutes)
        self.metrics.log(record)  # moved to logs/metrics_superseded.jsonl below
        self.writer.wait()
        before = self.guard.state_dict()
        state = self._restore(self.started_from) or {"step": 0}
        self.guard.load_state_dict(before)
        self.guard.rolled_back(step, state["step"], state.get("guard", {}))
        rate = "--matrix_lr and the other rates of muon" if config.optimizer == "muon" else "--learning_rate"
        advice = f"lower {rate}" + (", or raise --skip_spikes" if config.skip_spikes else "")
        if not state["step"]:
            raise DivergedError(f"diverged: {problem} in step {step}, and no checkpoint yet to roll back to; {advice}")
        if self.guard.rollbacks > config.max_rollbacks:
            again = f"and rolling back to step {state['step']} ({config.max_rollbacks} times, --max_rollbacks)"
            raise DivergedError(f"diverged: {problem} in step {step}, {again} did not help; {advice}")
        self.metrics.roll_back(state["step"])
        if self.ranks.is_main:
            add_roll_back(self.output_dir, step, state["step"], problem)
        self.metrics.say(f"{problem} in step {step}: rolled back to step {state['step']}; the data since is skipped")
        return int(state["step"])

    def _restore(self, choice: str) -> dict[str, Any] | None:
        """Loads the checkpoint that `choice` selects, as in --resume; returns its state, or None without one."""
        path = self.ranks.on_main(lambda: find_checkpoint_to_resume(self.output_dir, choice))
        if path is None:
            return None

        def load() -> tuple[dict[str, Any], list[str]]:
            state = read_state(path)
            check_same_data(state["data"], self.train_data.fingerprint, path)
            check_same_tokenizer(state.get("tokenizer", {"name": "none"}), self.fingerprint)
            changes = check_same_model(path, self.config)
            if self.base:
                check_same_base(path, base_in_state(state, path), self.base)
            load_checkpoint(path, self.model.gpt, self.optimizer)
            return state, changes

        state, changes = self.ranks.on_all(load)
        if self.fingerprint["name"] == "none":  # keep the checkpoint's, so that later checkpoints still carry it
            self.fingerprint = state.get("tokenizer", self.fingerprint)
        self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state.get("guard", {}))
        if path.resolve().parent.parent != self.output_dir.resolve():
            state["wandb_id"] = None  # a branch of another run gets its own W&B run
            self.started_from = str(path)
        if self.ranks.is_main:
            print(f"resuming from {path}" + (f" with {', '.join(changes)}" if changes else ""))
        return state


def find_checkpoint_to_resume(output_dir: Path, resume: str, report: Callable[[str], Any] = print) -> Path | None:
    """Returns the checkpoint that --resume selects, or None for a fresh start. Rank 0 calls it for all ranks.

    A run's own checkpoints win over `--resume=PATH`, so that the same command can be repeated after an interruption.
    Going back to an older checkpoint of the same run is refused.
    """
    own = list_checkpoints(output_dir)
    if not (resume in ("auto", "never") or os.path.exists(resume) or _began_from(resume, own)):
        near = closest(resume, ("auto", "never"))
        hint = f"did you mean {near}?" if near else "give auto, never or the path of a checkpoint"
        raise UserError(f"--resume={quote(resume)}: no such checkpoint or run directory; {hint}")
    if resume == "never":
        if own:
            raise UserError(
                f"--resume=never, but {output_dir} holds checkpoints (newest {own[0].name});"
                f" use --resume=auto to resume, or another --output_dir"
            )
        return None
    if resume == "auto" or own:
        if resume != "auto" and os.path.realpath(resume) in [os.path.realpath(p) for p in own[1:]]:
            raise UserError(
                f"--resume={resume}: {output_dir} holds newer checkpoints; give another --output_dir to branch off"
            )
        if resume != "auto":
            report(f"--resume={resume}: {output_dir} contains checkpoints already, and resumes from them")
        return find_checkpoint(output_dir, report) if own else None
    try:
        found = find_checkpoint(Path(resume), report)
    except UserError as e:
        raise type(e)(f"--resume: {e}") from e
    if found is None:
        raise UserError(f"--resume={resume}: contains no checkpoint")
    return found


def _began_from(resume: str, own: list[Path]) -> bool:
    """Returns whether one of a run's own checkpoints was made with --resume=`resume`, which may be deleted by now."""
    for path in own:
        with suppress(StorageError):
            if read_manifest(path)["config"].get("resume") == resume:
                return True
    return False


def check_same_model(path: Path, config: Config) -> list[str]:
    """Compares the checkpoint's flags with this run's; returns the harmless changes as `flag: old → new`."""
    saved = read_manifest(path)["config"]
    now = config.model_dump()
    changes = {k: f"{k}: {quote(saved[k])} → {v}" for k, v in now.items() if k in saved and saved[k] != v}
    if bool(saved.get("lora_rank")) != bool(config.lora_rank):
        what = f"LoRA adapters of rank {quote(saved['lora_rank'])}" if saved.get("lora_rank") else "a full model"
        raise UserError(
            f"--lora_rank={config.lora_rank}: {path} holds {what}; set it back, or start another run from its weights"
            f" with --init_from={path}"
        )
    fixed = [k for k in ModelConfig.model_fields if k in changes and k not in FREE_MODEL_FLAGS]
    if config.lora_rank:
        fixed += [k for k in LORA_FLAGS if k in changes and not _equal_targets(k, saved[k], now[k])]
    if fixed:
        flags = ", ".join(f"--{k}={now[k]} (checkpoint: {quote(saved[k])})" for k in fixed)
        raise UserError(f"{path} is of another model: {flags}; set them back, or use another --output_dir")
    if "optimizer" in changes:
        raise UserError(
            f"--optimizer={now['optimizer']}: {path} was trained with {quote(saved['optimizer'])}, which keeps other"
            f" states; set it back, or start another run from the weights with --init_from={path}"
        )
    return [line for k, line in changes.items() if k not in ("output_dir", "resume", "cfg")]


def _equal_targets(flag: str, one: str, other: str) -> bool:
    """Returns whether two values of --lora_targets, such as all and attn,mlp, name the same matrices."""
    return flag == "lora_targets" and parse_lora_targets(one) == parse_lora_targets(other)


def load_checkpoint(path: Path, model: GPT, optimizer: Optimizer) -> None:
    """Loads model and optimizer from a checkpoint; each rank reads its own part."""
    if not (path / "optimizer").is_dir():
        raise UserError(f"{path} contains a model without its optimizer; resume from the checkpoint it was made from")
    shapes = tensor_shapes(path, "model")
    # With LoRA the other frozen parameters are those of the base.
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad or n in shapes}
    load_tensors(path, "model", own)
    forget_states(optimizer)  # first, because there may not be room for both
    if tensor_shapes(path, "optimizer"):  # none before the first step
        load_tensors(path, "optimizer", make_states(optimizer, model), subset=True)


def clean_up_partial(output_dir: Path) -> None:
    """Deletes checkpoints that a killed run left partly written or partly deleted."""
    for prefix in (SAVING, DELETING):
        for path in (output_dir / "checkpoints").glob(f"{prefix}*"):
            delete(path)
