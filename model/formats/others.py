"""The weights of llm.c, llama2.c and nanoGPT under our names, one at a time; and our weights as a file of llm.c's.

cfg/neighbours.py has checked the files and knows what lies where.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfg.config import ModelConfig
from cfg.neighbours import (
    LLMC_DTYPES,
    LLMC_HEADER,
    LLMC_MAGIC,
    LLMC_VOCAB_MULTIPLE,
    Layout,
    Shape,
    each_layer,
    gpt2_flags,
    gpt2_tensors,
    llama2c_layout,
    llmc_layout,
    nanogpt_checkpoint,
)
from model.gpt import VOCABULARY, parameter_shapes
from util.errors import UserError
from util.files import create_file

Reader = Callable[[str], Tensor]


def _reader(path: Path, config: ModelConfig, there: dict[str, Shape], heads: tuple[int, int], load: Reader) -> Reader:
    """`load` behind the checks that all readers make: `there` is what the file holds, under our names.

    Raises UserError if the file's model and the flags' have different parameters or (query, key/value) `heads`.
    """
    wanted = {name: tuple(shape) for name, shape in parameter_shapes(config).items()}
    if different := sorted(wanted.keys() ^ there.keys()):
        where = "the file" if different[0] in there else "the model of the flags"
        raise UserError(f"{path}: another model than that of the flags: {different[0]} is only in {where}")
    if heads != (config.n_head, config.n_kv_head):  # which shapes do not show
        flags = f"--n_head={config.n_head} --n_kv_head={config.n_kv_head}"
        raise UserError(f"{path}: its heads are {heads[0]}, and {heads[1]} of keys and values, not {flags}")

    def read(name: str) -> Tensor:
        if name not in there:
            raise UserError(f"{path}: holds no parameter {name}")
        if wanted[name] != there[name]:
            raise UserError(f"{path}: {name} has shape {there[name]}, the model of the flags {wanted[name]}")
        return load(name)

    return read


def _read_rows(path: Path, layout: Layout, name: str, shape: Shape) -> Tensor:
    """The first numbers of a tensor of the file, as many as `shape` has. Raises UserError if they are gone."""
    at, _ = layout.places[name]
    kind = "<f4" if layout.dtype == "float32" else "<i2"  # numpy has no bfloat16
    try:
        numbers = np.fromfile(path, kind, prod(shape), offset=at)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    if len(numbers) != prod(shape):
        raise UserError(f"{path}: {name} is no longer there; the file changed while it was read")
    tensor = torch.from_numpy(numbers).view(shape)
    return tensor if layout.dtype == "float32" else tensor.view(torch.bfloat16)


def llmc_reader(path: Path, config: ModelConfig) -> Reader:
    """Gives parameters of a model file of llm.c by name: whole, fp32 or bf16 as in the file, read when asked for.

    Its matrices are (out, in) and its queries, keys and values in this order, as ours. Raises UserError if the file is
    not one that is read or not of the model of `config`; so does the reader for a name or shape that it does not have.
    """
    layout = llmc_layout(path)
    there = {name: shape for name, (_, shape) in layout.places.items()}
    there["wte.weight"] = (layout.flags["vocab_size"], *there["wte.weight"][1:])  # less the padding
    heads = layout.flags["n_head"], layout.flags["n_kv_head"]
    return _reader(path, config, there, heads, lambda name: _read_rows(path, layout, name, there[name]))


# Where our parameters come from in a file of llama2.c: one tensor there, or several, one above the other.
LLAMA2C_PARTS = {
    "wte.weight": ["tok_embeddings"],
    "lm_head.weight": ["output"],
    "ln_f.weight": ["norm"],
    "ln_1.weight": ["attention_norm"],
    "attn.c_attn.weight": ["wq", "wk", "wv"],
    "attn.c_proj.weight": ["wo"],
    "ln_2.weight": ["ffn_norm"],
    "mlp.c_fc.weight": ["w1", "w3"],  # gate and value
    "mlp.c_proj.weight": ["w2"],
}


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of a query or key projection (heads × D, C), from rotary pairs (2i, 2i + 1) to our pairs (i, i + D/2).

    Within a head the even rows come first, then the odd ones. Scores do not change: q and k are reordered alike.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (heads, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)


def llama2c_reader(path: Path, config: ModelConfig) -> Reader:
    """As `llmc_reader`, of a model file of llama2.c: fp32, its rotary pairs reordered."""
    layout = llama2c_layout(path)
    flags = layout.flags
    head_dim = flags["n_embd"] // flags["n_head"]

    def parts(name: str) -> list[str]:
        layer = ".".join(name.split(".")[:2]) + "." if name.startswith("h.") else ""
        return [layer + part for part in LLAMA2C_PARTS[name.removeprefix(layer)]]

    def load(name: str) -> Tensor:
        read = []
        for part in parts(name):
            tensor = _read_rows(path, layout, part, layout.places[part][1])
            read.append(halves_from_pairs(tensor, head_dim) if part.endswith(("wq", "wk")) else tensor)
        return read[0] if len(read) == 1 else torch.cat(read)

    names = [n for n in LLAMA2C_PARTS if n not in VOCABULARY and n != "ln_f.weight"]
    all_names = ["wte.weight", *(f"h.{i}.{n}" for i in range(flags["n_layer"]) for n in names), "ln_f.weight"]
    all_names += [] if flags["tie_embeddings"] else ["lm_head.weight"]
    there = {}
    for name in all_names:
        shapes = [layout.places[part][1] for part in parts(name)]
        there[name] = (sum(s[0] for s in shapes), *shapes[0][1:])
    return _reader(path, config, there, (flags["n_head"], flags["n_kv_head"]), load)


def nanogpt_reader(path: Path, config: ModelConfig) -> Reader:
    """As `llmc_reader`, of a checkpoint of nanoGPT: mapped from the file, in the dtype it was saved in."""
    flags, state = nanogpt_checkpoint(path)
    there = {name: tuple(tensor.shape) for name, tensor in state.items()}
    heads = flags["n_head"], flags["n_kv_head"]
    return _reader(path, config, there, heads, lambda name: state[name].detach())


# Flags that say how to train or compute, and nothing of the function that the weights stand for.
NOT_OF_THE_WEIGHTS = ("vocab_pad", "zero_init", "dropout", "flash")


def refuse_what_llmc_cannot_hold(config: ModelConfig) -> None:
    """Raises UserError naming the first flag of the architecture that is not GPT-2's."""
    held = gpt2_flags(config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.n_positions)
    for name, field in ModelConfig.model_fields.items():
        value, only = getattr(config, name), held.get(name, field.default)
        if name in NOT_OF_THE_WEIGHTS or name == "rope_base" or value == only:  # nothing is rotated
            continue
        value, only = (int(v) if isinstance(v, bool) else v for v in (value, only))
        raise UserError(f"--{name}={value} has no place in llm.c's model files, which are GPT-2's: --{name}={only}")


def write_llmc(path: Path, config: ModelConfig, read: Reader, dtype: torch.dtype) -> None:
    """Writes llm.c's model file (`cfg.neighbours.llmc_layout`), version 3 for fp32, 5 for bf16.

    `read` gives whole parameters under our names, the embedding with `vocab_size` rows; one is held at a time. The
    file appears whole or not at all. Raises UserError for an architecture that the format cannot hold, another dtype,
    or if `path` exists; ValueError if `read` gives another shape.
    """
    versions = {getattr(torch, kind): version for version, kind in LLMC_DTYPES.items()}
    if dtype not in versions:
        raise UserError(f"{path}: llm.c's model files hold float32 or bfloat16, not {str(dtype).split('.')[-1]}")
    refuse_what_llmc_cannot_hold(config)
    vocab, positions, width = config.vocab_size, config.n_positions, config.n_embd
    rows = -(-vocab // LLMC_VOCAB_MULTIPLE) * LLMC_VOCAB_MULTIPLE
    header = np.zeros(LLMC_HEADER // 4, "<i4")
    header[:8] = LLMC_MAGIC, versions[dtype], positions, vocab, config.n_layer, config.n_head, width, rows
    try:
        with create_file(path) as f:
            f.write(header.tobytes())
            for name, shape in each_layer(gpt2_tensors(vocab, positions, width), config.n_layer):
                tensor = read(name).detach().to("cpu", dtype).contiguous()
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
                f.write(tensor.view(torch.uint8).numpy().data)
                if name == "wte.weight":
                    f.write(bytes((rows - vocab) * width * dtype.itemsize))
    except FileExistsError as e:
        raise UserError(f"{e.filename} is already there; choose another name") from e
