"""The adapter_config.json of an adapter in the format of Hugging Face's PEFT: LoRA (Hu et al. 2021), nothing else.

Settings that would change the numbers in a way that this code does not compute are rejected by name. The modules in it
have the names of transformers' classes. peft.py reads and writes the tensors. No torch here: a wrong name is reported
at once.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import UserError, quote
from util.files import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Settings that are read, that only training uses, or that have no effect while another one is off. All others must be
# off: false, zero or empty.
READ = set(
    """peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules modules_to_save
    layers_to_transform base_model_name_or_path revision bias init_lora_weights""".split()
)
UNUSED = set(
    """task_type auto_mapping peft_version inference_mode lora_dropout fan_in_fan_out layers_pattern
    ensure_weight_tying loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size
    runtime_config velora_config""".split()
)
# Ways to draw the first values that leave the base as it is. Others (PiSSA, OLoRA, LoftQ) change its weights.
INIT_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")
EMBEDDINGS = ("wte", "wpe", "embed_tokens", "lm_head")  # the modules that may be saved in full
PLAIN = re.compile(r"\^?[\w.]+")  # a module's name; a pattern from elsewhere could take forever to match


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json."""

    folder: Path
    rank: int
    alpha: float
    rslora: bool  # the scale is alpha/√rank (Kalajdzievski 2023) instead of alpha/rank
    ranks: dict[str, int]  # of modules whose rank differs
    alphas: dict[str, float]
    targets: tuple[str, ...] | None  # names of adapted modules, or ends of names; None: known from the tensors only
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None  # None: all
    saved: tuple[str, ...]  # modules whose weights are in the adapter in full
    base: str  # folder or name on the hub
    revision: str

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's adapter."""
        return next((rank for name, rank in self.ranks.items() if _ends_with(module, name)), self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor of B A in a module's weight."""
        alpha = next((alpha for name, alpha in self.alphas.items() if _ends_with(module, name)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str) -> bool | None:
        """Returns whether the settings select this module, or None if they do not list modules by name."""
        if self.targets is None:
            return None
        layer = re.search(r"\.(\d+)\.", module)
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return False
        if any(_ends_with(module, name) for name in self.excluded):
            return False
        return any(_ends_with(module, name) for name in self.targets)


def _ends_with(module: str, name: str) -> bool:
    """Returns whether a module has this name, or a name that ends with it after a dot. ^NAME is the whole name."""
    return module == name.removeprefix("^") or module.endswith(f".{name}")


def read_adapter_config(folder: Path, where: str) -> AdapterConfig:
    """Reads the adapter_config.json of a folder. Errors begin with `where`."""
    file = folder / CONFIG
    try:
        settings = read_json(file)
    except OSError as e:
        raise UserError(f"{where}: {file}: {e.strerror}; the folder of a PEFT adapter has one") from e
    except ValueError as e:
        raise UserError(f"{where}: {file} is damaged ({quote(e)})") from e
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {file} is damaged (not an object)")
    where = f"{where}: {CONFIG}"
    try:
        _check_settings(settings, where)
        return _read_settings(folder, settings, where)
    except KeyError as e:
        raise UserError(f"{where}: {quote(e)} is missing") from e
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: damaged ({quote(e)})") from e


def _check_settings(settings: dict[str, Any], where: str) -> None:
    """Raises UserError if a setting has a value that this code does not compute."""
    if (kind := settings["peft_type"]) != "LORA":
        raise UserError(f"{where}: peft_type={quote(kind)} is not supported; only LORA")
    if (bias := settings.get("bias", "none")) != "none":
        raise UserError(f"{where}: bias={quote(bias)} is not supported; only none")
    init = settings.get("init_lora_weights", True)
    if init not in INIT_WEIGHTS:
        raise UserError(
            f"{where}: init_lora_weights={quote(init)} changes the base model; convert the adapter with PEFT's"
            " save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for name, value in settings.items():
        if name not in READ | UNUSED and value:
            raise UserError(f"{where}: {quote(name)}={quote(value)} is not supported; merge the adapter with PEFT")


def _read_settings(folder: Path, settings: dict[str, Any], where: str) -> AdapterConfig:
    rank, alpha = _rank(settings["r"]), _number(settings.get("lora_alpha", 8))
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules") or []
    if isinstance(targets, str) or isinstance(excluded, str) or targets is None:
        targets, excluded = None, []  # a regular expression, or all-linear
    targets = None if targets is None else _names(targets)
    if adapted := next((name for name in targets or () if name.rpartition(".")[2] in EMBEDDINGS), None):
        raise UserError(
            f"{where}: target_modules has {quote(adapted)}; only adapters of matrices in blocks are read; merge the"
            " adapter with PEFT"
        )
    layers = settings.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    saved = _names(settings.get("modules_to_save") or [])
    if other := [name for name in saved if name.rpartition(".")[2] not in EMBEDDINGS]:
        raise UserError(
            f"{where}: modules_to_save has {quote(other[0])}; only the embeddings and the output head are read"
            f" ({', '.join(EMBEDDINGS)})"
        )
    return AdapterConfig(
        folder=folder,
        rank=rank,
        alpha=alpha,
        rslora=_switch(settings.get("use_rslora", False)),
        ranks={name: _rank(value) for name, value in _pattern("rank_pattern", settings, where).items()},
        alphas={name: _number(value) for name, value in _pattern("alpha_pattern", settings, where).items()},
        targets=targets,
        excluded=_names(excluded),
        layers=tuple(map(_integer, layers)) if layers else None,
        saved=saved,
        base=_text(settings.get("base_model_name_or_path") or ""),
        revision=_text(settings.get("revision") or ""),
    )


def _pattern(key: str, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns rank_pattern or alpha_pattern. A key that is a regular expression and no plain name is an error."""
    found: dict[str, Any] = dict((settings.get(key) or {}).items())
    if odd := next((name for name in found if not PLAIN.fullmatch(name)), None):
        raise UserError(f"{where}: {key} has {quote(odd)}, a regular expression; only names of modules are read")
    return found


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _rank(value: Any) -> int:
    if not 1 <= _integer(value) <= 2**24:
        raise ValueError(f"rank {value}")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{value!r} is not a list of names")
    return tuple(value)


def base_name(adapter: AdapterConfig, where: str) -> str:
    """Returns the folder, or the name on the hub (OWNER/NAME[@REVISION]), of the model that an adapter belongs to.

    A relative folder is looked for in the adapter's folder, then in the working directory.
    """
    name, where = adapter.base, f"{where}: {CONFIG}"
    if not name:
        raise UserError(
            f"{where}: base_model_name_or_path is empty; put the folder or hub name of the base model there"
        )
    for path in (adapter.folder / os.path.expanduser(name), Path(os.path.expanduser(name))):
        if os.path.isdir(path):
            return str(path.absolute())
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(
            f"{where}: base_model_name_or_path={quote(name)}: no such folder; put the base model there, or change the"
            " setting"
        )
    return name + (f"@{adapter.revision}" if adapter.revision else "")
