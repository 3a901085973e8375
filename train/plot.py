"""Plots of a run, drawn from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from train.metrics import read_records


def plot_losses(run_dir: Path) -> Path | None:
    """Draws loss.png from metrics.jsonl and returns its path, or None without matplotlib or records."""
    return plot(run_dir, "loss", "loss (nats per token)", {"training": "loss", "validation": "val_loss"})


def plot(
    run_dir: Path, name: str, label: str, curves: dict[str, str], references: dict[str, dict[str, float]] | None = None
) -> Path | None:
    """Draws `name`.png and returns its path, or None without matplotlib or records.

    `curves` maps labels to keys in metrics.jsonl; `references` maps a curve's label to named horizontal lines.
    """
    records = read_records(run_dir / "metrics.jsonl")
    found = {
        title: [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        for title, key in curves.items()
    }
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
            marker = "" if title == "training" else "o"  # training has a point for every step
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
