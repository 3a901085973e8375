"""Weights in Hugging Face's folders: their names for our parameters, and reading them a tensor at a time.

cfg/hf.py has the configurations, scripts/export.py writes. Only safetensors are read, which hold numbers and nothing
that could run; a folder is somebody else's, so nothing in it is believed before it is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from util.errors import UserError

HEAD = "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 2**24  # a model of 1,000 tensors has some 100 kB
FLOATS = ("F64", "F32", "F16", "BF16")
# What is in a Llama-like layer for each of ours; several are stacked, one below the other.
ROTARY_PARTS = {
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
ROTARY_OUTER = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
# Buffers that older versions of transformers saved, and nobody needs.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


def parts_of(name: str, learned: bool) -> list[str]:
    """The tensors that make up our parameter `name`, stacked in this order.

    GPT-2 (`learned` positions) has our names; its matrices other than embeddings and head are transposed (Conv1D).
    """
    if learned:
        return [name if name.startswith("lm_head") else f"transformer.{name}"]
    module, _, kind = name.rpartition(".")
    if module in ROTARY_OUTER:
        return [f"{ROTARY_OUTER[module]}.{kind}"]
    _, layer, inner = module.split(".", 2)
    return [f"model.layers.{layer}.{part}.{kind}" for part in ROTARY_PARTS[inner]]


def is_transposed(name: str, learned: bool) -> bool:
    return learned and ".c_" in name and name.endswith(".weight")


def rows_of_parts(name: str, shapes: Mapping[str, torch.Size], count: int) -> list[int]:
    """How many rows each of `count` parts has: of three, query has as many as the projection behind it has columns."""
    rows = shapes[name][0]
    if count < 3:
        return [rows // count] * count
    query = shapes[f"{name.rpartition('.attn.')[0]}.attn.c_proj.weight"][1]
    return [query, (rows - query) // 2, (rows - query) // 2]


def find_files(folder: Path) -> dict[str, Path]:
    """Tensor name → file of a folder. Raises UserError if it holds none, or an index that names what is not in it."""
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_bytes())["weight_map"]
            pairs = {str(name): str(file) for name, file in listed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{index}: damaged ({e})") from e
        for file in sorted(set(pairs.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{index}: names {file!r}, which is not a .safetensors file of this folder; not read")
            if not (folder / file).is_file():
                raise UserError(f"{index}: names {file}, which is missing; fetch it again")
        return {name: folder / file for name, file in pairs.items()}
    if not (folder / SINGLE).is_file():
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth")]
        only = f"only {pickles[0]}, a pickle, which is not read" if pickles else "nothing of the kind"
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} ({only})")
    with open_safetensors(folder / SINGLE) as file:
        return {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118


def open_safetensors(path: Path) -> Any:
    """An open file. Raises UserError if it is not safetensors, or claims a header that no model has."""
    try:
        with open(path, "rb") as f:
            header = int.from_bytes(f.read(8), "little")
        if header > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise UserError(f"{path}: claims a header of {header:,} bytes; damaged, or made to do harm")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path}: not a safetensors file that can be read ({e}); fetch it again") from e


class Reader:
    """Our parameters, whole, one at a time, from the folder of a model whose flags cfg/hf.py gave."""

    def __init__(self, folder: Path, learned: bool, shapes: Mapping[str, torch.Size]):
        """`shapes` of all our parameters. Raises UserError if the folder has not just the tensors of these."""
        self.learned, self.folder = learned, folder
        self._open: dict[Path, Any] = {}
        files = find_files(folder)
        bare = learned and "wte.weight" in files  # without the head around it, as GPT-2's own release
        self._stored = {n if n == HEAD or not bare else f"transformer.{n}": (file, n) for n, file in files.items()}
        wanted = {part for name in shapes for part in parts_of(name, learned)}
        if missing := sorted(wanted - self._stored.keys()):
            raise UserError(f"{folder}: has no tensor {missing[0]}; not the model that its config.json describes")
        rest = self._stored.keys() - wanted - {HEAD}  # a tied head may be written all the same
        if unknown := sorted(n for n in rest if not BUFFERS.fullmatch(n)):
            raise UserError(f"{folder}: has a tensor {unknown[0]}, which is not of the model in its config.json")
        for name in shapes:
            self._check(name, shapes)

    def _file(self, part: str) -> tuple[Any, Path, str]:
        """Open, its path, and what the part is called in it."""
        path, stored = self._stored[part]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path], path, stored

    def _check(self, name: str, shapes: Mapping[str, torch.Size]) -> None:
        """Raises UserError unless the parts of a parameter are floats of the right shapes; reads no numbers."""
        found = []
        for part in parts_of(name, self.learned):
            file, path, stored = self._file(part)
            try:
                about = file.get_slice(stored)
            except SafetensorError as e:
                raise UserError(f"{path}: {e}; fetch it again") from e
            if about.get_dtype() not in FLOATS:
                raise UserError(f"{path}: {stored} is of {about.get_dtype()}; only {', '.join(FLOATS)} are read")
            found.append(about.get_shape()[:: -1 if is_transposed(name, self.learned) else 1])
        wanted = [[rows, *shapes[name][1:]] for rows in rows_of_parts(name, shapes, len(found))]
        if found != wanted:
            raise UserError(
                f"{self.folder}: {' and '.join(parts_of(name, self.learned))}: of shape"
                f" {' and '.join(str(tuple(part)) for part in found)}, but its config.json wants"
                f" {' and '.join(str(tuple(part)) for part in wanted)}"
            )

    def part(self, name: str) -> Tensor:
        file, path, stored = self._file(name)
        try:
            tensor: Tensor = file.get_tensor(stored)
        except SafetensorError as e:
            raise UserError(f"{path}: {e}; fetch it again") from e
        return tensor

    def __call__(self, name: str) -> Tensor:
        """The parameter of our `name`, in the dtype of the file."""
        parts = [self.part(part) for part in parts_of(name, self.learned)]
        if is_transposed(name, self.learned):
            parts = [part.t() for part in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def split_for_export(name: str, value: Tensor, learned: bool, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """One of our parameters, of which all have these `shapes`, as the tensors of a Hugging Face folder."""
    names = parts_of(name, learned)
    parts = value.split(rows_of_parts(name, shapes, len(names)))
    transposed = is_transposed(name, learned)
    return {n: (part.t() if transposed else part).contiguous() for n, part in zip(names, parts, strict=True)}
