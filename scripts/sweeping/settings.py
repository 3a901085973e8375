"""The runs that a sweep file describes: their folders, flags and seeds, all checked."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfg.flags import CheckpointConfig, Config, LogConfig, ParallelConfig
from train.startup import check_flags
from util.errors import UserError, closest, quote, refuse_broken_link
from util.files import read_json, read_yaml, write_atomically
from util.values import user_path

KEYS = ("output_dir", "flags", "grid", "runs", "seeds")
RECORD = "sweep.json"  # in the output_dir of the sweep: the flags of each run
# Flags that do not change the results of a run, so they may differ between its starts.
MAY_CHANGE = {
    *(name for group in (ParallelConfig, CheckpointConfig, LogConfig) for name in group.model_fields),
    *("cfg", "batch_size", "device", "compile", "flash", "check_data", "val_loss_every"),
    *("sample_every", "sample_tokens", "sample_prompt"),
}


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a key
class Run:
    """One run of a sweep."""

    folder: Path  # its --output_dir
    setting: str  # what distinguishes it from the other runs, without the seed
    seed: str  # "" without `seeds`
    flags: list[str]  # the command line of train_gpt.py
    config: Config  # the same flags, checked

    @property
    def name(self) -> str:
        return self.folder.name


def read_sweep(path: Path, world_size: int) -> tuple[Path, list[Run]]:
    """Returns the output_dir of a sweep file, and its runs. `world_size` is the number of processes of each run.

    Raises UserError for the first mistake in any run.
    """
    sweep = _read_file(path)
    if not isinstance(sweep.get("output_dir"), str) or not sweep["output_dir"]:
        raise UserError(f"{path}: output_dir: missing; give the folder for the runs, such as outdir/{path.stem}")
    output_dir = user_path(sweep["output_dir"])
    refuse_broken_link(output_dir, "output_dir")
    common = _texts(path, "flags", _mapping(path, "flags", sweep.get("flags")))
    seeds: list[dict[str, str]] = [{}]
    if "seeds" in sweep:
        seeds = [_texts(path, "seeds", {"seed": seed}) for seed in _list(path, "seeds", sweep["seeds"])]
    settings = [*_grid(path, sweep.get("grid")), *_listed(path, sweep.get("runs"))]
    if not settings:
        if "seeds" not in sweep:
            raise UserError(f"{path}: no runs; add grid, runs or seeds")
        settings = [("", {})]
    runs: dict[str, Run] = {}
    for (name, flags), seed in itertools.product(settings, seeds):
        if seed and "seed" in common | flags:
            raise UserError(f"{path}: seed is set as a flag and by seeds; leave one of them out")
        run = _make_run(path, output_dir, name, common, flags, seed, world_size)
        key = run.name.casefold()  # some file systems do not distinguish case
        if key in runs:
            raise UserError(f"{path}: two runs have the folder {run.name}; remove one, or give it another name")
        runs[key] = run
    return output_dir, list(runs.values())


def _read_file(path: Path) -> dict[str, Any]:
    try:
        sweep = read_yaml(path)
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
    if not isinstance(sweep, dict):
        raise UserError(f"{path}: not a sweep file, which is a YAML mapping with the keys {', '.join(KEYS)}")
    for key in sweep:
        if key not in KEYS:
            near = closest(str(key), KEYS)
            hint = (
                "flags of train_gpt.py stand under flags" if key in Config.model_fields else f"keys: {', '.join(KEYS)}"
            )
            raise UserError(f"{path}: unknown key {quote(key)!r}; {f'did you mean {near}?' if near else hint}")
    return sweep


def _mapping(path: Path, where: str, value: Any) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {where}: {quote(value)}: must be flags and values, such as {{n_layer: 2}}")
    return value or {}


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: {where}: {quote(value)}: must be a list with at least one entry, such as [1, 2]")
    return value


def _texts(path: Path, where: str, flags: dict[Any, Any]) -> dict[str, str]:
    """Returns the values of flags as they are written on a command line."""
    found = {}
    for name, value in flags.items():
        if name in ("output_dir", "resume"):
            raise UserError(f"{path}: {where}: {name}: is set by the sweep; leave it out")
        if name not in Config.model_fields:
            near = closest(str(name), Config.model_fields)
            hint = f"did you mean {near}?" if near else "docs/flags.md lists the flags"
            raise UserError(f"{path}: {where}: unknown flag {quote(name)!r}; {hint}")
        if not isinstance(value, bool | int | float | str):
            raise UserError(f"{path}: {where}: {name}={quote(value)}: must be a number, a text or true or false")
        found[name] = _plain(value)
    return found


def _plain(value: bool | int | float | str) -> str:
    """Returns a value as text: 1 for true, 0.001 for 1e-3, 1 for 1.0."""
    if isinstance(value, bool):
        return str(int(value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _grid(path: Path, grid: Any) -> list[tuple[str, dict[str, str]]]:
    """Returns every combination of the values of `grid`. The last flag varies fastest."""
    axes = []
    for name, values in _mapping(path, "grid", grid).items():
        entries = _list(path, f"grid: {name}", values)
        axes.append([_texts(path, "grid", {name: value}) for value in entries])
    combinations = itertools.product(*axes) if axes else []
    return [("", {k: v for flag in flags for k, v in flag.items()}) for flags in combinations]


def _listed(path: Path, runs: Any) -> list[tuple[str, dict[str, str]]]:
    """Returns the name, "" if it has none, and the flags of each entry of `runs`."""
    found = []
    for number, entry in enumerate(_list(path, "runs", runs) if runs is not None else [], 1):
        where = f"runs: entry {number}"
        flags = dict(_mapping(path, where, entry))
        name = flags.pop("name", "")
        if not isinstance(name, str) or not re.fullmatch(r"([\w+=-][\w.+=-]{0,99})?", name, re.ASCII):
            raise UserError(
                f"{path}: {where}: name={quote(name)}: use up to 100 letters, digits and the signs . _ + = -"
            )
        if not name and not flags:
            raise UserError(f"{path}: {where}: sets no flag; give it a name")
        found.append((name, _texts(path, where, flags)))
    return found


def _make_run(
    path: Path,
    output_dir: Path,
    name: str,
    common: dict[str, str],
    flags: dict[str, str],
    seed: dict[str, str],
    world_size: int,
) -> Run:
    """Returns the run, with its flags checked."""
    words = [f"--{flag}={value}" for flag, value in (common | flags | seed).items()]
    try:
        config = check_flags(words, world_size)
    except UserError as e:
        label = name or " ".join(f"{flag}={value}" for flag, value in (flags | seed).items())
        raise UserError(f"{path}: {label}: {e}") from e
    # Values in the form in which Config has them, so that 1e-3 and 0.001 are one folder.
    plain = {
        flag: _plain(getattr(Config.model_validate({flag: value}), flag)) for flag, value in (flags | seed).items()
    }
    setting = name or " ".join(f"{flag}={value}" for flag, value in plain.items() if flag in flags)
    parts = [name] if name else [f"{flag}={_safe(plain[flag], 40)}" for flag in flags]
    parts += [f"seed={plain['seed']}"] if seed else []
    folder = output_dir / _safe("_".join(parts), 200)
    words.append(f"--output_dir={folder}")
    config = config.model_copy(update={"output_dir": str(folder)})
    return Run(folder, setting, plain["seed"] if seed else "", words, config)


def _safe(text: str, most: int) -> str:
    """Returns `text` as part of a file name of at most `most` characters and a hash.

    The hash distinguishes texts that differ only in what is replaced or cut off.
    """
    clean = re.sub(r"[^\w.+=-]+", "-", text, flags=re.ASCII)
    if clean == text and len(text) <= most:
        return text
    return f"{clean[:most].strip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


# --- the record of what has been started ---


def check_record(output_dir: Path, runs: list[Run]) -> dict[str, Any]:
    """Returns the flags of all runs, earlier ones included, for `write_record`.

    Raises UserError if a run that has started has other flags now, or was not started by the sweep.
    """
    path = output_dir / RECORD
    if (output_dir / "config.yaml").exists():
        raise UserError(f"{output_dir}: is the folder of a run, not of a sweep; choose another output_dir")
    try:
        record = read_json(path) if path.exists() else {}
        if not all(isinstance(flags, dict) for flags in record.values()):
            raise ValueError("not the flags of runs")
    except (ValueError, AttributeError, OSError) as e:
        raise UserError(f"{path}: damaged ({e}); restore it, or choose another output_dir") from e
    for run in runs:
        if (run.folder / "config.yaml").exists():
            if run.name not in record:
                raise UserError(f"{run.folder}: holds a run that this sweep did not start; move it away")
            _check_unchanged(run, record[run.name])
    return record | {run.name: run.config.model_dump() for run in runs}


def _check_unchanged(run: Run, before: dict[str, Any]) -> None:
    now = run.config.model_dump()
    for name in now.keys() - MAY_CHANGE:
        if name in before and before[name] != now[name]:
            raise UserError(
                f"{run.folder}: was started with {name}={quote(before[name])}, but the sweep now has"
                f" {quote(now[name])}; change it back, choose another output_dir, or delete the folder"
            )


def write_record(output_dir: Path, record: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(flags)}" for name, flags in record.items())
    write_atomically(output_dir / RECORD, f"{{\n{lines}\n}}\n".encode())
