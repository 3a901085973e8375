"""Weights in Hugging Face's folders: their names for our parameters, and reading them one tensor at a time.

Only safetensors are read: they hold numbers and no code. A folder comes from elsewhere, so everything in it is checked
first. hf.py reads config.json, scripts/export.py writes folders.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cfg.flags import ModelConfig
from model.gpt import parameter_shapes
from util.errors import UserError, quote

HEAD = "lm_head.weight"
EMBEDDINGS = ("transformer.wte.weight", "wte.weight", "model.embed_tokens.weight")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 2**24  # the header of a model with 1,000 tensors has about 100 kB
BLOCK_ROWS = 2**14  # of the head and the embedding that are compared at a time
FLOATS = ("F64", "F32", "F16", "BF16")
# The tensors of a Llama-like layer that make up each of our parameters, stacked in this order.
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
NANOCHAT_PARTS = ROTARY_PARTS | {"mlp.c_fc": ["mlp.fc1"], "mlp.c_proj": ["mlp.fc2"]}
ROTARY_OUTER = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
# Buffers that older versions of transformers saved; they are computed, not loaded.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


def parts_of(name: str, config: ModelConfig) -> list[str]:
    """Returns the names of the tensors that make up our parameter `name`, in the order in which they are stacked.

    GPT-2 (learned positions) has our names. Its matrices are transposed (Conv1D), except the embeddings and the head.
    """
    if config.positions == "learned":
        return [name if name.startswith("lm_head") else f"transformer.{name}"]
    module, _, kind = name.rpartition(".")
    if module in ROTARY_OUTER:
        return [f"{ROTARY_OUTER[module]}.{kind}"]
    _, layer, inner = module.split(".", 2)
    layer_parts = NANOCHAT_PARTS if is_nanochat(config) else ROTARY_PARTS
    return [f"model.layers.{layer}.{part}.{kind}" for part in layer_parts[inner]]


def is_nanochat(config: ModelConfig) -> bool:
    """Returns whether the class of the model is NanoChatForCausalLM, the only one with squared ReLU."""
    return config.positions == "rotary" and config.mlp == "relu2"


def is_transposed(name: str, config: ModelConfig) -> bool:
    """Returns whether the file holds our parameter `name` transposed."""
    return config.positions == "learned" and ".c_" in name and name.endswith(".weight")


def rows_of_parts(rows: int, count: int, config: ModelConfig) -> list[int]:
    """Returns the rows of each of the `count` tensors that make up a parameter: of three, query, key and value."""
    if count < 3:
        return [rows // count] * count
    return [heads * config.head_size for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]


def swap_halves(parts: list[Tensor], config: ModelConfig) -> list[Tensor]:
    """Swaps the halves of each query and key head of nanochat, whose class rotates in the other direction.

    The class rotates the pair (a, b) to (a cos + b sin, b cos - a sin). With a and b swapped, this is our rotation.
    Scores and norms of queries and keys do not depend on the order of dimensions. Swapping twice changes nothing.
    """
    if len(parts) < 3 or not is_nanochat(config):
        return parts
    query, key, value = parts
    return [*(p.unflatten(0, (-1, 2, config.head_size // 2)).flip(1).reshape(p.shape) for p in (query, key)), value]


def find_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor in a folder. An index that names a file outside the folder is an error."""
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_bytes())["weight_map"]
            pairs = {str(name): str(file) for name, file in listed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{index}: damaged ({quote(e)})") from e
        for file in sorted(set(pairs.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{index}: names {file!r}, which is not a .safetensors file of this folder; not read")
            if not (folder / file).is_file():
                raise UserError(f"{index}: names {file}, which is missing; fetch it again")
        return {name: folder / file for name, file in pairs.items()}
    if not (folder / SINGLE).is_file():
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth")]
        only = f"only {pickles[0]}, a pickle, which is not read" if pickles else "no weights at all"
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} ({only})")
    with open_safetensors(folder / SINGLE) as file:
        return {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118


def has_other_head(folder: Path) -> bool:
    """Returns whether a folder has an output head that differs from its token embedding."""
    files = find_files(folder)
    embedding = next((name for name in EMBEDDINGS if name in files), "")
    if not embedding or HEAD not in files:
        return False
    with open_safetensors(files[HEAD]) as one, open_safetensors(files[embedding]) as other:
        head, table = one.get_slice(HEAD), other.get_slice(embedding)
        if head.get_shape() != table.get_shape():
            return True
        blocks = range(0, head.get_shape()[0], BLOCK_ROWS)
        return not all(bool((head[i : i + BLOCK_ROWS] == table[i : i + BLOCK_ROWS]).all()) for i in blocks)


def open_safetensors(path: Path) -> Any:
    """Opens a safetensors file after a check of the size of its header."""
    try:
        with open(path, "rb") as f:
            header = int.from_bytes(f.read(8), "little")
        if header > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise UserError(f"{path}: claims a header of {header:,} bytes; corrupt or malicious")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path}: not a safetensors file that can be read ({quote(e)}); fetch it again") from e


class HFReader:
    """A function from the name of our parameter to its value, read from a folder whose config.json hf.py has read."""

    def __init__(self, folder: Path, config: ModelConfig):
        """Checks that the folder has the tensors for all our parameters, of the right shapes, and no others."""
        self.folder, self.config = folder, config
        self._open: dict[Path, Any] = {}
        shapes, files = parameter_shapes(config), find_files(folder)
        # GPT-2's own release has no "transformer." in its names.
        bare = config.positions == "learned" and "wte.weight" in files
        self._stored = {n if n == HEAD or not bare else f"transformer.{n}": (file, n) for n, file in files.items()}
        wanted = {part for name in shapes for part in parts_of(name, config)}
        if missing := sorted(wanted - self._stored.keys()):
            raise UserError(f"{folder}: has no tensor {missing[0]}; not the model in its config.json")
        rest = self._stored.keys() - wanted - {HEAD}  # some folders hold a tied head too
        if unknown := sorted(n for n in rest if not BUFFERS.fullmatch(n)):
            raise UserError(f"{folder}: has a tensor {unknown[0]}, which the model in its config.json does not have")
        for name, shape in shapes.items():
            self._check(name, shape)

    def _file(self, part: str) -> tuple[Any, Path, str]:
        """Returns the open file of a tensor, its path, and the name of the tensor in it."""
        path, stored = self._stored[part]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path], path, stored

    def _check(self, name: str, shape: torch.Size) -> None:
        """Checks that the tensors of a parameter are floats of the right shapes, without reading them."""
        found = []
        for part in parts_of(name, self.config):
            file, path, stored = self._file(part)
            try:
                about = file.get_slice(stored)
            except SafetensorError as e:
                raise UserError(f"{path}: {quote(e)}; fetch it again") from e
            if about.get_dtype() not in FLOATS:
                raise UserError(f"{path}: {stored} has dtype {about.get_dtype()}; only {', '.join(FLOATS)} are read")
            found.append(about.get_shape()[:: -1 if is_transposed(name, self.config) else 1])
        wanted = [[rows, *shape[1:]] for rows in rows_of_parts(shape[0], len(found), self.config)]
        if found != wanted:
            raise UserError(
                f"{self.folder}: {' and '.join(parts_of(name, self.config))}: shape"
                f" {' and '.join(str(tuple(part)) for part in found)}, but its config.json needs"
                f" {' and '.join(str(tuple(part)) for part in wanted)}"
            )

    def _read_part(self, name: str) -> Tensor:
        file, path, stored = self._file(name)
        try:
            tensor: Tensor = file.get_tensor(stored)
        except SafetensorError as e:
            raise UserError(f"{path}: {quote(e)}; fetch it again") from e
        return tensor

    def __call__(self, name: str) -> Tensor:
        """Returns our parameter `name`, in the dtype of the file."""
        parts = [self._read_part(part) for part in parts_of(name, self.config)]
        if is_transposed(name, self.config):
            parts = [part.t() for part in parts]
        parts = swap_halves(parts, self.config)
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def split_for_export(name: str, value: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Returns one parameter of our model as the tensors of a Hugging Face folder."""
    names = parts_of(name, config)
    parts = swap_halves(list(value.split(rows_of_parts(len(value), len(names), config))), config)
    transposed = is_transposed(name, config)
    return {n: (part.t() if transposed else part).contiguous() for n, part in zip(names, parts, strict=True)}
