"""Room for checkpoints on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from cfg.config import Config
from model.formats.checkpoint import list_checkpoints
from model.gpt import GPT
from model.lora import saved_names
from train.parameter_counts import state_bytes
from util.errors import UserError


def checkpoint_bytes(model: GPT, config: Config) -> int:
    """Returns the approximate size of a checkpoint: the weights that it holds and the optimizer's states, in fp32."""
    parameters = dict(model.named_parameters())
    saved = sum(parameters[name].numel() for name in saved_names(parameters, config))
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    return 4 * saved + sum(state_bytes(config, name, p.shape, p.numel()) for name, p in trained.items())


def warn_of_little_room(config: Config, model: GPT) -> str:
    """Returns a warning if the checkpoints that the run will keep do not fit on the disk, otherwise ""."""
    folder, every = Path(config.output_dir), config.save_every_niter
    saves = -(-config.num_iterations // every) if every else 1
    kept = config.num_iterations // config.keep_every if config.keep_every and every else 0
    try:
        count = min(config.keep_last + 1 + kept, saves) - len(list_checkpoints(folder))
        size, free = checkpoint_bytes(model, config), shutil.disk_usage(folder).free
    except (OSError, UserError):
        return ""
    if count * size <= free:
        return ""
    flags = f"--keep_last={config.keep_last}" + (f" and --keep_every={config.keep_every}" if kept else "")
    return (
        f"--output_dir={folder}: {_text(free)} are free, but {flags} needs {_text(count * size)}, {count} checkpoints"
        f" of {_text(size)} (the newest is complete before the oldest is deleted); delete"
        f" {_text(count * size - free)} on this disk" + (", or keep fewer" if config.keep_last > 1 or kept else "")
    )


def advise_when_full(folder: Path, size: int) -> str:
    """Returns how much room a checkpoint of `size` bytes lacks in `folder`, and what can be deleted.

    Raises OSError or UserError if the folder cannot be read.
    """
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
