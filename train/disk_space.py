"""Room for checkpoints on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from cfg.config import Config
from model.formats.checkpoint import list_checkpoints
from model.gpt import GPT


def checkpoint_bytes(model: GPT) -> int:
    """Returns the approximate size of a checkpoint: the weights and AdamW's two moments, in fp32."""
    return 12 * sum(p.numel() for p in model.parameters())


def warn_of_little_room(config: Config, model: GPT) -> str:
    """Returns a warning if the checkpoints that the run will keep do not fit on the disk, otherwise ""."""
    folder = Path(config.output_dir)
    saves = -(-config.num_iterations // config.save_every_niter) if config.save_every_niter else 1
    count = min(config.keep_last + 1, saves) - len(list_checkpoints(folder))
    size, free = checkpoint_bytes(model), shutil.disk_usage(folder).free
    if count * size <= free:
        return ""
    return (
        f"--output_dir={folder}: {_text(free)} are free, and a checkpoint takes {_text(size)}; --keep_last="
        f"{config.keep_last} needs room for {count} more, because the newest is complete before the oldest is deleted;"
        f" free {_text(count * size - free)}" + (", or lower --keep_last" if config.keep_last > 1 else "")
    )


def advise_when_full(folder: Path, size: int) -> str:
    """Returns how much room a checkpoint of `size` bytes lacks in `folder`, and what can be deleted."""
    free = shutil.disk_usage(folder).free
    lack = f"{_text(size - free)} are missing" if free < size else "a quota may be used up"
    newest, *older = [path.name for path in list_checkpoints(folder.parent)] or [""]
    older += sorted(path.name for path in folder.glob("damaged_*"))
    if older:
        way_out = f"delete {', '.join(older[:5])} in {folder} (the newest, {newest}, is enough to resume)"
    else:
        way_out = "free room on this disk"
        way_out += f", or continue on another with --resume={folder / newest} and a new --output_dir" if newest else ""
    return f"a checkpoint takes {_text(size)}, and {_text(free)} are free: {lack}; {way_out}"


def _text(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
