"""Plots of a run, drawn from metrics.jsonl."""

from __future__ import annotations

import io
import sys
import time
import warnings
from array import array
from pathlib import Path

from cfg.config import Config
from eval.reference import GPT2_ACC_NORM
from train.metrics import iterate_records
from util.files import write_atomically

MOST_TIME = 0.01  # of a run, for drawing while it trains


class Plots:
    """Draws loss.png, and hellaswag.png with --hellaswag_every. A failure is a warning, whatever it is."""

    def __init__(self, config: Config):
        self.config, self.output_dir = config, Path(config.output_dir)
        self._earliest = 0.0  # time of the next drawing

    def redraw(self) -> None:
        """Draws, unless that would take more than MOST_TIME of the run: a long metrics.jsonl takes seconds to read."""
        if time.monotonic() >= self._earliest:
            self.draw()

    def draw(self) -> Path | None:
        """Draws and returns the path of loss.png, or None without matplotlib, records or success."""
        before, curve = time.monotonic(), None
        try:
            curve = plot_losses(self.output_dir)
            if self.config.hellaswag_every:
                keys = {"completion": "hellaswag_acc_norm", "lm_eval": "hellaswag_lm_eval_acc_norm"}
                plot(self.output_dir, "hellaswag", "HellaSwag acc_norm", keys, GPT2_ACC_NORM)
        except Exception as e:
            print(f"warning: the plots could not be drawn: {type(e).__name__}: {e}", file=sys.stderr)
        self._earliest = time.monotonic() + (time.monotonic() - before) / MOST_TIME
        return curve


def plot_losses(run_dir: Path) -> Path | None:
    """Draws loss.png from metrics.jsonl and returns its path, or None without matplotlib or records."""
    return plot(run_dir, "loss", "loss (nats per token)", {"training": "loss", "validation": "val_loss"})


def plot(
    run_dir: Path, name: str, label: str, curves: dict[str, str], references: dict[str, dict[str, float]] | None = None
) -> Path | None:
    """Draws `name`.png and returns its path, or None without matplotlib or records.

    `curves` maps labels to keys in metrics.jsonl; `references` maps a curve's label to named horizontal lines.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    found = {title: (array("d"), array("d")) for title in curves}
    for record in iterate_records(run_dir / "metrics.jsonl"):
        for title, key in curves.items():
            if isinstance(value := record.get(key), int | float):
                found[title][0].append(record["step"])
                found[title][1].append(value)
    if not any(steps for steps, _ in found.values()):
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for title, (steps, values) in found.items():
        if steps:
            marker = "" if title == "training" else "o"  # training has a point for every step
            [line] = axes.plot(steps, values, linewidth=1, marker=marker, markersize=3, label=title)
            for name_of, value in (references or {}).get(title, {}).items():
                axes.axhline(value, linewidth=0.8, linestyle="--", color=line.get_color())
                label_of = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 8}
                axes.annotate(f"{name_of}, {title}", (1, value), color=line.get_color(), **label_of)
    axes.set(xlabel="step", ylabel=label)
    axes.set_title(run_dir.resolve().name, parse_math=False)  # $ in the name stays text
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # of the name, such as a Chinese one
        figure.savefig(image, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    write_atomically(run_dir / f"{name}.png", image.getvalue())
    return run_dir / f"{name}.png"
