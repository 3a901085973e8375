"""Adapters in the format of Hugging Face's PEFT: merged into the base model, as initial values, and written.

adapter_model.safetensors holds lora_A (rank, in) and lora_B (out, rank) of each adapted module of transformers' class.
Our matrices of several modules (query, key and value; SwiGLU's gate and value) have one A, and the rows of all B's. A
folder comes from elsewhere, so everything in it is checked first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cfg.flags import ModelConfig
from model.formats.hf_tensors import FLOATS, open_safetensors, parts_of, rows_of_parts, swap_halves
from model.formats.lora_base import fingerprint
from model.formats.peft_config import CONFIG, TENSORS, AdapterConfig, read_adapter_config
from model.formats.raw import Reader
from model.gpt import parameter_shapes
from model.lora import EMBEDDINGS, VOCABULARY, adapter_shapes, matrix_of, merge_adapter
from model.lora import A as OUR_A
from model.lora import B as OUR_B
from util.errors import UserError, quote

if TYPE_CHECKING:
    from cfg.flags import Config

PREFIX = "base_model.model."  # of all names in the file
A, B = ".lora_A.weight", ".lora_B.weight"  # PEFT's, at the end of a module's name
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Adapter:
    """An adapter's checked files."""

    settings: AdapterConfig
    config: ModelConfig  # of the model with the adapter merged
    tied: bool  # the base's output head is its token embedding
    file: Any  # open safetensors file
    modules: frozenset[str]  # adapted modules of transformers' class
    saved: dict[str, str]  # our name → the name in the file of each parameter that the adapter contains in full

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor by its name without PREFIX."""
        try:
            tensor: Tensor = self.file.get_tensor(PREFIX + name)
        except SafetensorError as e:
            raise UserError(f"{self.settings.folder / TENSORS}: {e}; fetch it again") from e
        return tensor

    def parts(self, name: str) -> list[str]:
        """Returns the modules that make up our parameter NAME.weight."""
        return [part.removesuffix(".weight") for part in parts_of(name, self.config)]


# --- opening and checking -------------------------------------------------------------------------


def vocabulary_of(settings: AdapterConfig, config: ModelConfig) -> tuple[int, bool]:
    """Returns the vocabulary size, and whether the head is tied to the embedding, of the base model with an adapter.

    `config` is the base's. An adapter that contains the embedding has it for its own vocabulary: PEFT saves it too if
    the base was resized. A tied head and embedding that are saved with different values become untied.
    """
    file = open_tensors(settings)
    names = {name: PREFIX + parts_of(name, config)[0] for name in VOCABULARY}
    found = {name: file.get_slice(stored).get_shape() for name, stored in names.items() if stored in file.keys()}  # noqa: SIM118
    if not found:
        return config.vocab_size, config.tie_embeddings
    sizes = {(shape or [0])[0] for shape in found.values()}
    both = len(found) == len(VOCABULARY)
    if len(sizes) > 1 or not min(sizes) or not (both or sizes == {config.vocab_size}):
        raise UserError(
            f"{settings.folder / TENSORS}: {' and '.join(found)} has {' and '.join(map(str, sorted(sizes)))} rows, the"
            f" base model {config.vocab_size}; another vocabulary needs an embedding and a head of one size"
        )
    if not (both and config.tie_embeddings):
        return min(sizes), False
    embedding, head = (file.get_tensor(stored) for stored in names.values())
    return min(sizes), embedding.dtype == head.dtype and torch.equal(embedding, head)


def open_tensors(settings: AdapterConfig) -> Any:
    """Opens adapter_model.safetensors."""
    path = settings.folder / TENSORS
    if not path.is_file():
        pickle = " (only adapter_model.bin, a pickle, which is not read)"
        raise UserError(
            f"{path}: no such file{pickle if path.with_suffix('.bin').is_file() else ''}; save the adapter again with"
            " a newer PEFT, or fetch it again"
        )
    return open_safetensors(path)


def open_adapter(settings: AdapterConfig, config: ModelConfig, tied: bool) -> Adapter:
    """Opens an adapter for the model of `config`, and checks the names, shapes and dtypes of all tensors.

    `tied`: the base's output head is its token embedding.
    """
    path, file = settings.folder / TENSORS, open_tensors(settings)
    shapes = parameter_shapes(config)
    inputs = {}  # (rows, columns) of each module of transformers' class that may have an adapter
    for name, shape in shapes.items():
        if len(shape) == 2 and name not in EMBEDDINGS:
            parts = parts_of(name, config)
            for part, rows in zip(parts, rows_of_parts(shape[0], len(parts), config), strict=True):
                inputs[part.removesuffix(".weight")] = rows, shape[1]
    names = {PREFIX + parts_of(name, config)[0]: name for name in EMBEDDINGS if name in shapes | {HEAD: 0}}
    modules, saved = set(), {}
    for stored in file.keys():  # noqa: SIM118
        about = file.get_slice(stored)
        if about.get_dtype() not in FLOATS:
            raise UserError(f"{path}: {quote(stored)} has dtype {about.get_dtype()}; only {', '.join(FLOATS)} are read")
        module = stored.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
        if stored.startswith(PREFIX) and stored.endswith((A, B)) and module in inputs:
            rank, (rows, columns) = settings.rank_of(module), inputs[module]
            wanted = (rank, columns) if stored.endswith(A) else (rows, rank)
            modules.add(module)
        elif stored in names:
            name = names[stored]
            wanted = tuple(shapes.get(name, shapes["wte.weight"]))
            saved[name] = stored.removeprefix(PREFIX)
        else:
            raise UserError(
                f"{path}: {quote(stored)} is not read; only lora_A and lora_B of matrices in blocks of the base model,"
                " and its embedding and output head in full"
            )
        if tuple(about.get_shape()) != wanted:
            raise UserError(
                f"{path}: {quote(stored)} has shape {tuple(about.get_shape())}, but {CONFIG} and the base model need"
                f" {wanted}"
            )
    adapter = Adapter(settings, config, tied, file, frozenset(modules), saved)
    _check_complete(adapter, path, inputs.keys())
    return adapter


def _check_complete(adapter: Adapter, path: Path, modules: Any) -> None:
    """Raises UserError if the file lacks a tensor that the settings name, or has one that PEFT would ignore."""
    stored, settings = set(adapter.file.keys()), adapter.settings
    for module in modules:
        for end in (A, B):
            name = f"{PREFIX}{module}{end}"
            if name not in stored and (module in adapter.modules or settings.adapts(module)):
                raise UserError(f"{path}: has no tensor {name}; truncated, or of another adapter than {CONFIG}")
        if module in adapter.modules and settings.adapts(module) is False:
            raise UserError(f"{path}: has an adapter of {module}, which {CONFIG} does not name; not merged")
    for name in settings.saved:
        if not any(part.removesuffix(".weight").endswith(name) for part in adapter.saved.values()):
            raise UserError(f"{path}: has no weights of {quote(name)}, which modules_to_save names; truncated")
    if not adapter.modules | adapter.saved.keys():
        raise UserError(f"{path}: has no tensors")


# --- merging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeftMerger:
    """`read(name)` for a base model with an adapter merged into it. A merged matrix is fp32."""

    adapter: Adapter
    read_base: Reader

    def __call__(self, name: str) -> Tensor:
        adapter = self.adapter
        if name in adapter.saved:
            return adapter.tensor(adapter.saved[name])
        weight = self.read_base("wte.weight" if name == HEAD and adapter.tied else name)
        if not (parts := self.products(name, weight)):
            return weight
        weights = weight.split([len(b) for _, b, _ in parts])
        return torch.cat([merge_adapter(w, *part) for w, part in zip(weights, parts, strict=True)])

    def products(self, name: str, weight: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """Returns A, B and scale of each part of a matrix, or nothing if it has no adapter.

        A part without an adapter gets one of rank 0.
        """
        adapter, config = self.adapter, self.adapter.config
        modules = adapter.parts(name) if name.endswith(".weight") else []
        if not adapter.modules.intersection(modules):
            return []
        a = [adapter.tensor(m + A) if m in adapter.modules else torch.empty(0, weight.shape[1]) for m in modules]
        heights = zip(modules, rows_of_parts(len(weight), len(modules), config), strict=True)
        b = [adapter.tensor(m + B) if m in adapter.modules else torch.empty(rows, 0) for m, rows in heights]
        return list(zip(a, swap_halves(b, config), map(adapter.settings.scale_of, modules), strict=True))

    def fingerprint(self, name: str, value: Tensor) -> str:
        """Returns the fingerprint of a parameter, if the model is the base of a run: see model/formats/lora_base.py."""
        if name in self.adapter.saved or not (parts := self.products(name, value)):
            return fingerprint(name, value)
        found = [fingerprint(name, self.read_base(name), self.read_base)]
        for a, b, scale in parts:
            found += [fingerprint("A", a), fingerprint("B", b), f"{scale}"]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()


# --- initial values of our adapters ---------------------------------------------------------------


def read_adapter(folder: str | Path, config: Config) -> Callable[[str, torch.Size], Tensor | None]:
    """Returns a function of name and shape that reads our A or B from the adapter of --lora_init.

    It also reads an embedding or head that the adapter contains in full, and returns None for any other parameter.
    Rank, scale and adapted matrices must be those of the flags, and the parts of each of our matrices must have equal
    A. Raises UserError if not.
    """
    where = f"--lora_init={quote(folder)}"
    settings = read_adapter_config(Path(folder).expanduser(), where)
    adapter = open_adapter(settings, config, config.tie_embeddings)
    _check_against_flags(adapter, config, where)

    def value(name: str, shape: torch.Size) -> Tensor | None:
        if name in adapter.saved:
            found = adapter.tensor(adapter.saved[name]).float()
            padding = found.new_zeros(shape[0] - len(found), shape[1])  # of the vocabulary
            return torch.cat((found, padding))
        if not name.endswith((OUR_A, OUR_B)):
            return None
        modules = adapter.parts(matrix_of(name))
        if name.endswith(OUR_B):
            return torch.cat(swap_halves([adapter.tensor(m + B) for m in modules], config)).float()
        first, *others = (adapter.tensor(m + A) for m in modules)
        if any(not torch.equal(first, other) for other in others):
            raise UserError(
                f"{where}: its A of {' and '.join(m.rpartition('.')[2] for m in modules)} differ, but they have one"
                f" adapter here; merge the adapter with --init_from=peft:{folder}"
            )
        return first.float()

    for name in adapter_shapes(config):  # all errors now, before the run starts
        if name.endswith(OUR_A):
            value(name, torch.Size())
    return value


def _check_against_flags(adapter: Adapter, config: Config, where: str) -> None:
    """Raises UserError if a flag of LoRA differs from the adapter."""
    settings, wanted = adapter.settings, set()
    for name in adapter_shapes(config):
        wanted |= set(adapter.parts(matrix_of(name)))
    if different := sorted(wanted ^ adapter.modules):
        which = "has none" if different[0] in wanted else "has one"
        raise UserError(
            f"--lora_targets={config.lora_targets}: the adapter of {where} {which} of {different[0]}; give the matrices"
            " that it adapts, or merge it with --init_from=peft:FOLDER"
        )
    for module in sorted(adapter.modules):
        rank = settings.rank_of(module)
        has = f"the adapter of {where} has"
        if rank != config.lora_rank:
            raise UserError(f"--lora_rank={config.lora_rank}: {has} rank {rank} ({module}); give {rank}")
        alpha = settings.scale_of(module) * rank  # of our scale, alpha/rank
        if abs(alpha - config.lora_alpha) > 1e-6 * abs(alpha):
            raise UserError(f"--lora_alpha={config.lora_alpha:g}: {has} {alpha:.9g} ({module}); give {alpha:.9g}")
    if adapter.saved and not config.lora_embeddings:
        raise UserError(f"--lora_embeddings=0: the adapter of {where} contains trained embeddings; give 1")
    if HEAD in adapter.saved and config.tie_embeddings:
        one, other = (adapter.tensor(adapter.saved.get(name, adapter.saved[HEAD])) for name in VOCABULARY)
        if "wte.weight" not in adapter.saved or not torch.equal(one, other):
            raise UserError(f"{where}: its output head is not tied to the embedding; use --init_from=peft:FOLDER")


# --- writing --------------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    alpha: float,
    base: str,
    revision: str = "",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes an adapter that PEFT loads for the transformers class of the model (model/formats/hf.py).

    `tensors` are our A and B, and the embeddings and head that are trained in full, without vocabulary padding. `base`
    is the folder or hub name of the base model.
    """
    found: dict[str, Tensor] = {}
    saved: list[str] = []
    for name, value in tensors.items():
        if not name.endswith((OUR_A, OUR_B)):
            # PEFT copies both of two tied modules, so it needs both.
            names = [name, HEAD] if name == "wte.weight" and config.tie_embeddings else [name]
            for part in (parts_of(n, config)[0] for n in names):
                found[part] = value
                saved.append(part.removesuffix(".weight").rpartition(".")[2])
            continue
        modules = [p.removesuffix(".weight") for p in parts_of(matrix_of(name), config)]
        heights = rows_of_parts(len(value), len(modules), config)
        values = [value] * len(modules) if name.endswith(OUR_A) else swap_halves(list(value.split(heights)), config)
        found |= {m + (A if name.endswith(OUR_A) else B): v for m, v in zip(modules, values, strict=True)}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": next(len(value) for name, value in tensors.items() if name.endswith(OUR_A)),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": _targets({name.removesuffix(A) for name in found if name.endswith(A)}, config),
        "modules_to_save": saved or None,
        "ensure_weight_tying": bool(saved) and config.tie_embeddings,
        "fan_in_fan_out": config.positions == "learned",  # transformers' GPT-2 has transposed matrices
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    contents = {PREFIX + name: value.to(dtype).clone().contiguous() for name, value in found.items()}
    save_file(contents, folder / TENSORS, metadata={"format": "pt"})


def _targets(adapted: set[str], config: ModelConfig) -> list[str]:
    """Returns target_modules: the last words of the adapted modules' names, or two words where one is ambiguous.

    GPT-2 has two modules c_proj in a block.
    """
    parts = [part for name in parameter_shapes(config) for part in parts_of(name, config)]
    modules = {part.rpartition(".")[0] for part in parts}
    others = {module.rpartition(".")[2] for module in modules - adapted}
    words = (module.split(".") for module in adapted)
    return sorted({".".join(word[-2 if word[-1] in others else -1 :]) for word in words})
