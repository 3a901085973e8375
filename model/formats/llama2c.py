"""llama2.c's model files, versions 0 and 1: `legacy_export` and `version1_export` in karpathy/llama2.c, export.py.

Version 0 begins with 7 little-endian int32: width, hidden width, layers, heads, key/value heads, vocabulary (negative
if the head is not the embedding), positions. Version 1 has a magic and the version before them, a byte after them that
says whether the head is the embedding, and is padded to 256 bytes. All tensors are fp32. Their names here are the
project's, with "h.0." and so on before the names of a layer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfg.flags import ModelConfig
from model.formats.raw import RawFile, Reader, Shape, checked_reader, gpt2_flags, place_tensors, read_header
from util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC, HEADER, LEGACY_HEADER = 0x616B3432, 256, 28
ROPE_BASE = 10000.0  # a constant in run.c
# The tensors of the file that make up each of our parameters, stacked in this order.
PARTS = {
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


def open_file(path: Path) -> RawFile:
    """Reads and checks the header, and of version 0 the rotary tables."""
    head, size = read_header(path, HEADER)
    if len(head) < LEGACY_HEADER:
        raise UserError(f"{path}: {size} bytes are less than llama2.c's header of {LEGACY_HEADER}; truncated")
    versioned = struct.unpack("<I", head[:4])[0] == MAGIC
    if versioned:
        if len(head) < HEADER:
            raise UserError(f"{path}: {size} bytes are less than llama2.c's header of {HEADER}; truncated")
        version = struct.unpack("<i", head[4:8])[0]
        if version != 1:
            which = " (int8, Q8_0)" if version == 2 else ""
            raise UserError(f"{path}: version {version}{which} of llama2.c's model file; 0 and 1 (fp32) are read")
    n_embd, hidden, n_layer, n_head, n_kv_head, vocab, n_positions = struct.unpack_from("<7i", head, 8 * versioned)
    flags = gpt2_flags(
        path,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        vocab_size=vocab if versioned else abs(vocab),
        n_positions=n_positions,
        positions="rotary",
        norm="rmsnorm",
        mlp="swiglu",
        mlp_hidden=hidden,
        bias=False,
        tie_embeddings=bool(head[36]) if versioned else vocab > 0,
    )
    start = HEADER if versioned else LEGACY_HEADER
    places = place_tensors(path, start, "float32", _tensors(flags, legacy=not versioned), size)
    if not versioned:
        flags["rope_base"] = _base_of_tables(path, places["freqs_cos"], places["freqs_sin"])
    return RawFile(path, flags, "float32", places)


def _tensors(flags: dict[str, Any], legacy: bool) -> Iterable[tuple[str, Shape]]:
    """Yields name and shape of the tensors in the order of the file."""
    width, hidden, vocab, heads = (flags[name] for name in ("n_embd", "mlp_hidden", "vocab_size", "n_head"))
    kv, table = width // heads * flags["n_kv_head"], (flags["n_positions"], width // heads // 2)
    shapes = {
        "tok_embeddings": (vocab, width),
        "output": (vocab, width),
        "norm": (width,),
        "freqs_cos": table,
        "freqs_sin": table,
    }
    layer_shapes = {
        "attention_norm": (width,),
        "ffn_norm": (width,),
        "wq": (width, width),
        "wk": (kv, width),
        "wv": (kv, width),
        "wo": (width, width),
        "w1": (hidden, width),
        "w2": (width, hidden),
        "w3": (hidden, width),
    }
    if legacy:
        order = "tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm freqs_cos freqs_sin"
    else:
        order = "attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3"
    for name in order.split() + ([] if flags["tie_embeddings"] else ["output"]):
        if name in shapes:
            yield name, shapes[name]
        else:
            yield from ((f"h.{i}.{name}", layer_shapes[name]) for i in range(flags["n_layer"]))


def _base_of_tables(path: Path, cosines: tuple[int, Shape], sines: tuple[int, Shape]) -> float:
    """Returns the base of the rotary angles in version 0's tables, cosines and sines of (position, pair).

    Pair i of D/2 turns by base^(-2i/D) from one position to the next. So the base follows from position 1, and the
    other positions are checked against it: scaled positions, for example, are refused. Some exporters write zeros,
    since run.c computes its own tables with base 10000.
    """
    positions, pairs = cosines[1]
    tables = [np.memmap(path, "<f4", "r", offset=at, shape=shape) for at, shape in (cosines, sines)]
    rows = np.unique(np.linspace(0, positions - 1, 64).astype(np.int64))
    cos, sin = (np.asarray(table[np.append(rows, min(1, positions - 1))], np.float64) for table in tables)
    if not cos.any() and not sin.any():
        return ROPE_BASE
    base = ROPE_BASE
    with np.errstate(all="ignore"):  # the tables may hold anything
        angle = float(np.arctan2(sin[-1, -1], cos[-1, -1]))  # of the slowest pair, at position 1
        if positions > 1 and pairs > 1 and 0 < angle < 1:
            base = _nearest(float(np.exp(-log(angle) * pairs / (pairs - 1))))
        angles = rows[:, None] * base ** -(np.arange(pairs) / pairs)
        tolerance = 1e-4 + 1e-6 * rows[:, None]  # the angles were rounded to fp32
        close = (np.abs(cos[:-1] - np.cos(angles)) < tolerance) & (np.abs(sin[:-1] - np.sin(angles)) < tolerance)
    if not close.all():
        raise UserError(f"{path}: its rotary tables do not follow from any base (scaled positions?); not supported")
    return base


def _nearest(base: float) -> float:
    """Rounds a base computed from fp32 tables to four digits if those are within 1e-5."""
    short = float(f"{base:.4g}")
    return short if abs(short / base - 1) < 1e-5 else base


def reader(path: Path, config: ModelConfig) -> Reader:
    """Returns a function that reads one parameter in fp32, with the rotary pairs in our order."""
    import torch

    from model.gpt import parameter_shapes

    file = open_file(path)
    flags = file.flags
    head_dim = flags["n_embd"] // flags["n_head"]

    def parts(name: str) -> list[str]:
        layer = ".".join(name.split(".")[:2]) + "." if name.startswith("h.") else ""
        return [layer + part for part in PARTS[name.removeprefix(layer)]]

    def load(name: str) -> Tensor:
        read = []
        for part in parts(name):
            tensor = file.read(part, file.tensors[part][1])
            read.append(halves_from_pairs(tensor, head_dim) if part.endswith(("wq", "wk")) else tensor)
        return torch.cat(read) if len(read) > 1 else read[0]

    stored = {}
    for name in parameter_shapes(ModelConfig(**flags)):
        shapes = [file.tensors[part][1] for part in parts(name)]
        stored[name] = (sum(s[0] for s in shapes), *shapes[0][1:])
    return checked_reader(path, config, stored, (flags["n_head"], flags["n_kv_head"]), load)


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of a query or key projection (heads × D, C) from rotary pairs (2i, 2i + 1) to (i, i + D/2).

    Within a head the even rows come first, then the odd ones. Attention scores do not change: queries and keys are
    reordered alike.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (heads, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)
