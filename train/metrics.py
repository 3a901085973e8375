"""What a run tells: metrics.jsonl always, a console line, a bar for a person, W&B and TensorBoard when asked."""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from cfg.config import Config
from train.rank_log import note
from util.errors import StorageError, UserError
from util.files import fault_point, path_in_errors, write_atomically
from util.ranks import Ranks


def duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; what is not a whole record of a step (a line cut by a kill) is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and _is_of_a_step(record):
                records.append(record)
    return records


def _is_of_a_step(record: dict[str, Any]) -> bool:
    """Whether it has the step and the loss, and nothing in it is more than a number, or the word why it was skipped."""
    plain = all(type(v) in (int, float) or v is None or (k == "skipped" and type(v) is str) for k, v in record.items())
    return plain and type(record.get("step")) is int and "loss" in record


def to_json(record: dict[str, Any]) -> str:
    """One line; floats with all their digits, and null for what JSON has no number for."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain) + "\n"


def _has_wandb_key() -> bool:
    """Whether `wandb login` or the environment has left a key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Metrics:
    """Writes the records of a run. Ranks other than 0 only leave lines in their logs.

    All ranks call all methods. What the disk refuses rank 0 in a step is raised by `log` if there is one rank;
    otherwise `problem` has it, and the next `flush`, `go_back` or `close` raises it on all of them.
    """

    def __init__(self, config: Config, ranks: Ranks, step: int, wandb_id: str | None):
        self.config, self.ranks, self.is_main, self.wandb_id = config, ranks, ranks.is_main, wandb_id
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._bar: Any = None
        self.problem: StorageError | None = None
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self._on_main(lambda: self._start(step))

    def _on_main(self, act: Callable[[], None]) -> None:
        """Rank 0 does it, and all ranks raise what went wrong, now or before."""

        def do() -> None:
            if self.problem is not None:
                raise self.problem
            act()

        self.ranks.on_main(do)

    def _start(self, step: int) -> None:
        self._rewind(step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.config.num_iterations, initial=step, unit="step", dynamic_ncols=True)
        if self.config.wandb_project_id:
            self._start_wandb()
        if self.config.tensorboard:
            self._start_tensorboard(step)

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step."""
        self._on_main(lambda: self._go_back(step))

    def _go_back(self, step: int) -> None:
        self._file.close()
        self._rewind(step)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._start_tensorboard(step)

    def _rewind(self, step: int) -> None:
        """Drops records after `step`: they come again. They are kept in logs/, since they were measured."""
        self._cut(step)
        self._file = open(self.path, "a")  # noqa: SIM115 - open for the whole run

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

    def _start_wandb(self) -> None:
        try:
            import wandb
        except ImportError as e:
            raise UserError("--wandb_project_id needs the package wandb; pip install wandb") from e
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _has_wandb_key():
            mode = "offline"
            self.say("wandb: no key found, so this run is logged offline; `wandb sync` uploads it later")
        self.wandb_id = self.wandb_id or secrets.token_hex(4)
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
            self.say(f"wandb: could not start ({e}); going on without it")

    def _start_tensorboard(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise UserError("--tensorboard needs the package tensorboard; pip install tensorboard") from e
        # purge_step hides events of steps that a kill made us repeat.
        self._tensorboard = SummaryWriter(Path(self.config.output_dir) / "logs", purge_step=step + 1)

    def has(self, step: int) -> bool:
        """Whether `step` is in metrics.jsonl. For rank 0."""
        return self._last >= step

    def say(self, line: str) -> None:
        """A line for the person at the console, above the bar if there is one; of other ranks than 0 for their log."""
        if not self.is_main:
            note(line)
        elif self._bar is not None:
            self._bar.write(line)
            sys.stdout.flush()
        else:
            print(line, flush=True)

    def log(self, record: dict[str, Any]) -> None:
        """Records one step everywhere it is due. Raises StorageError if the disk refuses the only rank."""
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
        except OSError as e:  # perhaps in the middle of the line; the next start removes it
            self.problem = StorageError(
                f"--output_dir={self.config.output_dir}: step {record['step']} could not be written to"
                f" {self.path.name} ({e.strerror}); the same command goes on from the last checkpoint"
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
            f"not taken: {r['skipped']}" if "skipped" in r else "",
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
        """Has everything logged so far on disk, as a checkpoint is about to refer to it."""
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


def plot_losses(run_dir: Path) -> Path | None:
    """Draws loss.png from metrics.jsonl. None if there is nothing to draw or no matplotlib to draw it."""
    return plot(run_dir, "loss", "loss (nats per token)", {"training": "loss", "validation": "val_loss"})


def plot(
    run_dir: Path, name: str, label: str, curves: dict[str, str], references: dict[str, dict[str, float]] | None = None
) -> Path | None:
    """Draws `name`.png: curves (label → key in metrics.jsonl) over steps, and lines at each curve's named references.

    None if there is nothing to draw or no matplotlib to draw it.
    """
    records = read_records(run_dir / "metrics.jsonl")
    found = {title: [(r["step"], r[key]) for r in records if r.get(key) is not None] for title, key in curves.items()}
    try:
        import matplotlib
    except ImportError:
        return None
    if not any(found.values()):
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for title, points in found.items():
        if points:
            marker = "" if title == "training" else "o"  # which has a point for every step
            [line] = axes.plot(*zip(*points, strict=True), linewidth=1, marker=marker, markersize=3, label=title)
            for name_of, value in (references or {}).get(title, {}).items():
                axes.axhline(value, linewidth=0.8, linestyle="--", color=line.get_color())
                label_of = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
                axes.annotate(f"{name_of}, {title}", (1, value), color=line.get_color(), **label_of)
    axes.set(xlabel="step", ylabel=label, title=run_dir.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / f"{name}.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return run_dir / f"{name}.png"
