"""Metrics of a run: metrics.jsonl, console lines, a progress bar, W&B and TensorBoard."""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlparse

from cfg.config import Config
from train.rank_log import note
from util.device import device_name, peak_memory
from util.errors import StorageError, UserError
from util.files import fault_point, path_in_errors, reopen, write_atomically
from util.gpus import peak_flops
from util.ranks import Ranks


def duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl, without lines that are not the record of a step (cut off by a kill)."""
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of `read_records` one by one: those of a long run take a gigabyte together."""
    if not path.is_file():
        return
    with open(path, errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(record, dict):
                continue
            if type(record.get("step")) is int and isinstance(record.get("loss", ""), int | float | None):
                yield record


def to_json(record: dict[str, Any]) -> str:
    """Returns the record as one line of JSON: floats with all digits, null for NaN and infinity."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain) + "\n"


def _has_wandb_key() -> bool:
    """Returns whether `wandb login` or the environment provides a key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class StepResult(NamedTuple):
    """The outcome of one training step, the same on all ranks."""

    loss: float  # mean over the counted tokens of the global batch, in nats
    grad_norm: float  # before clipping
    lr: float
    skip_reason: str  # why the update was skipped, or ""


class Metrics:
    """Writes the records of a run. Ranks other than 0 write lines to their logs only.

    All ranks must call every method. A write error on rank 0 is kept in `problem`, and raised on all ranks by the next
    `flush`, `roll_back` or `close`. With a single rank `log` raises it at once.
    """

    def __init__(self, config: Config, ranks: Ranks, flops_per_token: float = 0.0):
        self.config, self.ranks, self.is_main = config, ranks, ranks.is_main
        self.wandb_id: str | None = None
        self.problem: StorageError | None = None
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops(device_name(ranks.device))
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._bar: Any = None

    def start(self, step: int, elapsed_s: float = 0.0) -> None:
        """Opens metrics.jsonl after `step`, and the loggers. `elapsed_s` is the training time so far."""
        self._on_main(lambda: self._start(step))
        self._started = time.perf_counter() - elapsed_s

    def _on_main(self, act: Callable[[], None]) -> None:
        """Runs `act` on rank 0. All ranks raise its error, or the error of an earlier write."""

        def checked() -> None:
            if self.problem is not None:
                raise self.problem
            act()

        self.ranks.on_main(checked)

    def _start(self, step: int) -> None:
        self._rewind(step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.config.num_iterations, initial=step, unit="step", dynamic_ncols=True)
        if self.config.wandb_project_id:
            self._start_wandb()
        if self.config.tensorboard:
            self._start_tensorboard(step)

    def roll_back(self, step: int) -> None:
        """Drops the records after `step`, from which the run continues."""
        self._on_main(lambda: self._roll_back(step))

    def _roll_back(self, step: int) -> None:
        self._file.close()
        self._rewind(step)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._start_tensorboard(step)

    def _rewind(self, step: int) -> None:
        """Drops records after `step`, which will be written again, and keeps them in logs/."""
        self._cut(step)
        self._file: IO[str] = open(self.path, "a+")  # noqa: SIM115 - open for the whole run

    def _cut(self, step: int) -> None:
        kept = list({r["step"]: r for r in read_records(self.path) if r["step"] <= step}.values())
        self._last = max((r["step"] for r in kept), default=0)
        before = self.path.read_text(errors="replace") if self.path.is_file() else ""
        after = "".join(to_json(r) for r in kept)
        if before == after:
            return
        again = set(after.splitlines())
        superseded = self.path.parent / "logs" / "metrics_superseded.jsonl"
        fault_point("superseded", superseded)
        with path_in_errors(superseded), open(superseded, "a") as f:
            f.writelines(line + "\n" for line in before.splitlines() if line not in again)
        write_atomically(self.path, after.encode())

    def restore(self, step: int) -> None:
        """Writes metrics.jsonl and TensorBoard's file again after the directory was deleted."""

        def act() -> None:
            self._file = reopen(self._file, self.path)
            if self._tensorboard is not None:
                self._tensorboard.close()
                self._start_tensorboard(step)

        self._on_main(act)

    def _start_wandb(self) -> None:
        try:
            import wandb
        except ImportError as e:
            raise UserError("--wandb_project_id needs the package wandb; pip install wandb") from e
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _has_wandb_key():
            mode = "offline"
            self.say("wandb: no key found, so this run is logged offline")
        self.wandb_id = self.wandb_id or secrets.token_hex(4)
        if mode == "offline":  # each start writes a folder, all with one id
            folders = f"{shlex.quote(self.config.output_dir)}/wandb/offline-run-*-{self.wandb_id}"
            self.say(f"wandb: to upload this run later as one W&B run: wandb sync --id {self.wandb_id} {folders}")
        try:
            self._wandb = wandb.init(
                project=self.config.wandb_project_id,
                id=self.wandb_id,
                resume="allow",
                dir=self.config.output_dir,
                config=self.config.model_dump(),
                mode=mode,  # type: ignore[arg-type]
            )
        except Exception as e:  # a logging service must not stop a run
            self.say(f"wandb: could not start ({e}); training continues without it")

    def _start_tensorboard(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise UserError("--tensorboard needs the package tensorboard; pip install tensorboard") from e
        # purge_step hides the events of steps that are repeated after a kill.
        self._tensorboard = SummaryWriter(Path(self.config.output_dir) / "logs", purge_step=step + 1)

    def has(self, step: int) -> bool:
        """Returns whether `step` has been logged, the same on all ranks."""
        return self.ranks.on_main(lambda: self._last >= step)

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one. Ranks other than 0 write it to their log."""
        if not self.is_main:
            note(line)
        elif self._bar is not None:
            self._bar.write(line)
            sys.stdout.flush()
        else:
            print(line, flush=True)

    def record(self, step: int, result: StepResult, seconds: float) -> dict[str, Any]:
        """Returns the record of a step from its result and its duration."""
        tok_per_s = self.config.total_batch_size / seconds
        peak = self._peak_flops * self.ranks.world_size if self._peak_flops else None
        return {
            "step": step,
            "tokens": step * self.config.total_batch_size,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tok_per_s": tok_per_s,
            "mfu": tok_per_s * self._flops_per_token / peak if peak else None,
            "elapsed_s": time.perf_counter() - self._started,
            "memory_bytes": peak_memory(self.ranks.device),
            **({"skipped": result.skip_reason} if result.skip_reason else {}),
        }

    def log(self, record: dict[str, Any]) -> None:
        """Writes the record of one step to every logger for which it is due."""
        step, last = record["step"], self.config.num_iterations
        if self.is_main and self.problem is None:
            self._write(record)
        if step % self.config.log_every == 0 or step in (1, last) or "skipped" in record:
            self.say(self._line(record))
        if not self.is_main:
            return
        if "val_loss" in record:
            self.say(self._val_line(record))
        if "hellaswag_acc" in record:
            self.say(self._hellaswag_line(record))
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(loss=f"{record['loss']:.4f}")
        if self._wandb is not None and (
            step % self.config.wandb_log_iters == 0 or step == last or {"val_loss", "hellaswag_acc"} & record.keys()
        ):
            self._wandb.log(numbers, step=step)
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)

    def _write(self, record: dict[str, Any]) -> None:
        try:
            fault_point("metrics", self.path)
            self._file.write(to_json(record))
            self._file.flush()
            self._last = record["step"]
        except OSError as e:  # perhaps in the middle of a line; the next start removes it
            self.problem = StorageError(
                f"--output_dir={self.config.output_dir}: step {record['step']} could not be written to"
                f" {self.path.name} ({e.strerror}); run the same command again to resume from the last checkpoint"
            )
            if self.ranks.world_size == 1:
                raise self.problem from e

    def _line(self, r: dict[str, Any]) -> str:
        parts = [
            f"step {r['step']}/{self.config.num_iterations}",
            f"loss {r['loss']:.4f}",
            f"lr {r['lr']:.2e}",
            f"norm {r['grad_norm']:.3f}",
            f"{r['tok_per_s']:,.0f} tok/s",
            f"mfu {100 * r['mfu']:.1f}%" if r["mfu"] is not None else "",
            f"{r['memory_bytes'] / 2**30:.2f} GiB",
            f"eta {duration(r['elapsed_s'] / r['step'] * (self.config.num_iterations - r['step']))}",
            f"skipped: {r['skipped']}" if "skipped" in r else "",
        ]
        return " | ".join(p for p in parts if p)

    def _val_line(self, r: dict[str, Any]) -> str:
        bpb = f" | {r['val_bpb']:.4f} bits/byte" if r.get("val_bpb") is not None else ""
        perplexity = f"{math.exp(min(r['val_loss'], 700.0)):.2f}"
        step = f"step {r['step']}/{self.config.num_iterations}"
        return f"{step} | val loss {r['val_loss']:.4f} | perplexity {perplexity}{bpb}"

    def _hellaswag_line(self, r: dict[str, Any]) -> str:
        completion, harness = (
            f"acc {r[f'{prefix}_acc']:.4f}, acc_norm {r[f'{prefix}_acc_norm']:.4f}"
            for prefix in ("hellaswag", "hellaswag_lm_eval")
        )
        step = f"step {r['step']}/{self.config.num_iterations}"
        return f"{step} | HellaSwag completion: {completion} | lm_eval: {harness}"

    def flush(self) -> None:
        """Flushes everything logged so far to disk, before a checkpoint refers to it."""
        self._on_main(self._flush)

    def _flush(self) -> None:
        with path_in_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._on_main(self._close)

    def _close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
