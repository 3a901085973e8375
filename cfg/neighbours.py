"""What the model files of llm.c, llama2.c and nanoGPT say of themselves: flags, and where each tensor lies.

Everything is checked from the header's numbers and the file's size before a tensor is read: headers are data from
elsewhere, and may hold anything. Nothing here imports torch, but for nanoGPT's checkpoints, which are torch's.
model/formats/others.py reads the tensors.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError

Shape = tuple[int, ...]
Tensors = list[tuple[str, Shape]]  # in a file's order; a name with {} stands for one such tensor per layer, in a row
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "n_positions", "mlp_hidden")  # none may be 0
NORM_EPS, ROPE_BASE = 1e-5, 10000.0  # constants in all three projects' code
MAX_LAYERS = 10_000  # more than any model has; a damaged header must not make long lists


@dataclass(frozen=True)
class Layout:
    """A checked file of raw tensors: the flags it fixes, the numbers' type, and each tensor's byte offset and shape."""

    flags: dict[str, Any]
    dtype: str  # float32 or bfloat16
    places: dict[str, tuple[int, Shape]]


def gpt2_flags(n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int) -> dict[str, Any]:
    """The architecture of GPT-2, all of it."""
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_head,
        "n_embd": n_embd,
        "head_dim": 0,
        "vocab_size": vocab_size,
        "n_positions": n_positions,
        "positions": "learned",
        "rope_base": ROPE_BASE,
        "rope_scaling": "",
        "sliding_window": 0,
        "norm": "layernorm",
        "norm_eps": NORM_EPS,
        "mlp": "gelu",
        "mlp_hidden": 4 * n_embd,
        "bias": True,
        "qkv_bias": False,
        "tie_embeddings": True,
        "qk_norm": False,
        "logit_softcap": 0.0,
    }


def gpt2_tensors(rows: int, n_positions: int, n_embd: int, bias: bool = True) -> Tensors:
    """GPT-2's parameters under our names, in llm.c's order; `rows` of the embedding."""
    width = n_embd
    tensors: Tensors = [("wte.weight", (rows, width)), ("wpe.weight", (n_positions, width))]
    for name, shape in [
        ("h.{}.ln_1", (width,)),
        ("h.{}.attn.c_attn", (3 * width, width)),
        ("h.{}.attn.c_proj", (width, width)),
        ("h.{}.ln_2", (width,)),
        ("h.{}.mlp.c_fc", (4 * width, width)),
        ("h.{}.mlp.c_proj", (width, 4 * width)),
        ("ln_f", (width,)),
    ]:
        tensors.append((f"{name}.weight", shape))
        if bias:
            tensors.append((f"{name}.bias", shape[:1]))
    return tensors


def each_layer(tensors: Tensors, n_layer: int) -> Iterable[tuple[str, Shape]]:
    """Every single tensor, in the file's order."""
    for name, shape in tensors:
        for i in range(n_layer if "{}" in name else 1):
            yield name.format(i), shape


def file_bytes(start: int, itemsize: int, tensors: Tensors, n_layer: int) -> int:
    """The size of a file whose tensors begin at byte `start`; plain integers, so that nothing overflows."""
    return start + itemsize * sum(prod(shape) * (n_layer if "{}" in name else 1) for name, shape in tensors)


def _places(
    path: Path, start: int, dtype: str, tensors: Tensors, n_layer: int, size: int
) -> dict[str, tuple[int, Shape]]:
    """Raises UserError if the tensors do not fill the file exactly."""
    itemsize = 4 if dtype == "float32" else 2
    expected = file_bytes(start, itemsize, tensors, n_layer)
    if size != expected:
        what = "truncated, or not such a file" if size < expected else "too long, or not such a file"
        raise UserError(f"{path}: {what}: its header's sizes make {expected:,} bytes, the file has {size:,}")
    places, at = {}, start
    for name, shape in each_layer(tensors, n_layer):
        places[name] = at, shape
        at += itemsize * prod(shape)
    return places


def _head_of(path: Path, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file, or as many as there are, and its size. Raises UserError."""
    try:
        with open(path, "rb") as f:
            head, size = f.read(count), f.seek(0, 2)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    if not size:
        raise UserError(f"{path}: empty file")
    return head, size


def _check_sizes(path: Path, flags: dict[str, Any]) -> None:
    """Raises UserError unless every number is a possible size, and they divide as a model's must."""
    for name, value in flags.items():
        least, most = 2 if name == "vocab_size" else 1, MAX_LAYERS if name == "n_layer" else 2**40
        if name in SIZES and not least <= value <= most:
            raise UserError(f"{path}: says that its {name} is {value}; damaged, or not such a file")
    head, kv, width = flags["n_head"], flags["n_kv_head"], flags["n_embd"]
    unit = 2 * head if flags["positions"] == "rotary" else head
    if width % unit or head % kv:
        raise UserError(
            f"{path}: {head} heads, {kv} of keys and values, of width {width} do not divide evenly; damaged"
        )


# llm.c

LLMC_MAGIC, LLMC_HEADER = 20240326, 1024
LLMC_DTYPES = {3: "float32", 5: "bfloat16"}
LLMC_OLD = {1: "fp32 without padded vocabulary", 2: "bf16 without padded vocabulary", 4: "bf16 with fp32 norms"}
LLMC_VOCAB_MULTIPLE = 128


def llmc_layout(path: Path) -> Layout:
    """A model file of llm.c: karpathy/llm.c, `write_model` in train_gpt2.py, `gpt2_build_from_checkpoint` in its .cu.

    256 little-endian int32: magic, version (3 fp32, 5 bf16), positions, vocabulary, layers, heads, width, rows of the
    embedding (the vocabulary padded to a multiple of 128); then the tensors, each kind for all layers in a row. The
    older versions, of April 2024, are refused by number. Raises UserError.
    """
    head, size = _head_of(path, LLMC_HEADER)
    if len(head) < LLMC_HEADER:
        raise UserError(f"{path}: {size} bytes are less than llm.c's header of {LLMC_HEADER}; truncated")
    magic, version, n_positions, vocab_size, n_layer, n_head, n_embd, rows = struct.unpack("<8i", head[:32])
    if magic != LLMC_MAGIC:
        raise UserError(f"{path}: magic {magic} is not that of llm.c's GPT-2 model files, {LLMC_MAGIC}")
    if version not in LLMC_DTYPES:
        which = f" ({LLMC_OLD[version]})" if version in LLMC_OLD else ""
        raise UserError(f"{path}: version {version}{which} of llm.c's model file; 3 (fp32) and 5 (bf16) are read")
    flags = gpt2_flags(n_layer, n_head, n_embd, vocab_size, n_positions)
    _check_sizes(path, flags)
    if rows < vocab_size:
        raise UserError(f"{path}: {rows} rows of embedding for a vocabulary of {vocab_size}; damaged")
    dtype = LLMC_DTYPES[version]
    return Layout(
        flags, dtype, _places(path, LLMC_HEADER, dtype, gpt2_tensors(rows, n_positions, n_embd), n_layer, size)
    )


def llmc_flags(path: Path) -> dict[str, Any]:
    """The flags of ModelConfig that a model file of llm.c fixes. Raises UserError if it is not one that is read."""
    return llmc_layout(path).flags


# llama2.c

LLAMA2C_MAGIC, LLAMA2C_HEADER = 0x616B3432, 256


def llama2c_layout(path: Path) -> Layout:
    """A model file of llama2.c, version 0 or 1: karpathy/llama2.c, `legacy_export` and `version1_export` in export.py.

    Version 0 begins with 7 little-endian int32: width, hidden width, layers, heads, key/value heads, vocabulary
    (negative if the head is not the embedding), positions. Version 1 puts a magic and the version before them, a byte
    that says whether the head is the embedding behind, and pads to 256 bytes. All tensors are fp32. Their names here
    are the project's, with "h.{}." before those of a layer. Raises UserError.
    """
    head, size = _head_of(path, LLAMA2C_HEADER)
    if len(head) < 28:
        raise UserError(f"{path}: {size} bytes are less than llama2.c's header of 28; truncated")
    versioned = struct.unpack("<I", head[:4])[0] == LLAMA2C_MAGIC
    if versioned:
        if len(head) < LLAMA2C_HEADER:
            raise UserError(f"{path}: {size} bytes are less than llama2.c's header of {LLAMA2C_HEADER}; truncated")
        version = struct.unpack("<i", head[4:8])[0]
        if version != 1:
            which = " (int8, Q8_0)" if version == 2 else ""
            raise UserError(f"{path}: version {version}{which} of llama2.c's model file; 0 and 1 (fp32) are read")
    n_embd, hidden, n_layer, n_head, n_kv_head, vocab, n_positions = struct.unpack_from("<7i", head, 8 * versioned)
    tied = bool(head[36]) if versioned else vocab > 0
    flags = gpt2_flags(n_layer, n_head, n_embd, vocab if versioned else abs(vocab), n_positions) | {
        "n_kv_head": n_kv_head,
        "positions": "rotary",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "mlp_hidden": hidden,
        "bias": False,
        "tie_embeddings": tied,
    }
    _check_sizes(path, flags)
    tensors = _llama2c_tensors(flags, legacy=not versioned)
    start = LLAMA2C_HEADER if versioned else 28
    layout = Layout(flags, "float32", _places(path, start, "float32", tensors, n_layer, size))
    if not versioned:
        flags["rope_base"] = _base_of_tables(path, layout.places["freqs_cos"], layout.places["freqs_sin"])
    return layout


def _llama2c_tensors(flags: dict[str, Any], legacy: bool) -> Tensors:
    width, hidden, vocab, heads = (flags[name] for name in ("n_embd", "mlp_hidden", "vocab_size", "n_head"))
    kv, table = width // heads * flags["n_kv_head"], (flags["n_positions"], width // heads // 2)
    attention_norm: Tensors = [("h.{}.attention_norm", (width,))]
    ffn_norm: Tensors = [("h.{}.ffn_norm", (width,))]
    norm: Tensors = [("norm", (width,))]
    embedding: Tensors = [("tok_embeddings", (vocab, width))]
    attention: Tensors = [
        ("h.{}.wq", (width, width)),
        ("h.{}.wk", (kv, width)),
        ("h.{}.wv", (kv, width)),
        ("h.{}.wo", (width, width)),
    ]
    feed_forward: Tensors = [("h.{}.w1", (hidden, width)), ("h.{}.w2", (width, hidden)), ("h.{}.w3", (hidden, width))]
    head: Tensors = [] if flags["tie_embeddings"] else [("output", (vocab, width))]
    if legacy:
        tables: Tensors = [("freqs_cos", table), ("freqs_sin", table)]
        return embedding + attention_norm + attention + ffn_norm + feed_forward + norm + tables + head
    return attention_norm + ffn_norm + norm + embedding + attention + feed_forward + head


def _base_of_tables(path: Path, cosines: tuple[int, Shape], sines: tuple[int, Shape]) -> float:
    """The base of the rotary angles in version 0's tables, cosines and sines of (position, pair).

    Pair i of D/2 turns by base^(-2i/D) a position, so position 1 gives the base away, and the other positions must
    follow from it. Tables of zeros are of an exporter that knew that run.c computes its own, with base 10000.
    Raises UserError if the tables are no such thing: scaled positions, say.
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
        tolerance = 1e-4 + 1e-6 * rows[:, None]  # of angles that were rounded to fp32
        close = (np.abs(cos[:-1] - np.cos(angles)) < tolerance) & (np.abs(sin[:-1] - np.sin(angles)) < tolerance)
    if not close.all():
        raise UserError(f"{path}: its rotary tables are not those of any base (scaled positions?), and cannot be kept")
    return base


def _nearest(base: float) -> float:
    """The rounded number that a base read off fp32 tables must have been: four digits, if those are within 1e-5."""
    short = float(f"{base:.4g}")
    return short if abs(short / base - 1) < 1e-5 else base


def llama2c_flags(path: Path) -> dict[str, Any]:
    """The flags of ModelConfig that a model file of llama2.c fixes. Raises UserError if it is not one that is read."""
    return llama2c_layout(path).flags


# nanoGPT

NANOGPT_MASK = re.compile(r"h\.\d+\.attn\.bias")  # the causal mask, a buffer where torch had no flash attention


def nanogpt_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of nanoGPT: its flags, and its parameters under our names, mapped from the file but not read.

    karpathy/nanoGPT, train.py writes a dict with the model's state and the arguments it was made with; the names are
    ours behind "transformer.", or behind "_orig_mod." too where the model was compiled. Nothing but tensors and plain
    values is unpickled. Raises UserError.

    The file does not say which nanoGPT wrote it. GELU is taken to be exact, as since May 2023 (commit 594068e); only
    where the arguments lack `bias`, so are older than 27 January 2023, it must have been the tanh.
    """
    loaded = _load_without_code(path)
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(key), dict) for key in ("model", "model_args")):
        raise UserError(f"{path}: not a checkpoint of nanoGPT, which holds model and model_args")
    args = loaded["model_args"]
    state = {str(k).removeprefix("_orig_mod.").removeprefix("transformer."): v for k, v in loaded["model"].items()}
    state = {name: tensor for name, tensor in state.items() if not NANOGPT_MASK.fullmatch(name)}
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    rows, places = (shapes.get(name, ()) for name in ("wte.weight", "wpe.weight"))
    if len(rows) != 2 or len(places) != 2:
        raise UserError(f"{path}: not a checkpoint of nanoGPT: no transformer.wte.weight or transformer.wpe.weight")
    n_layer, n_head = (args.get(name) for name in ("n_layer", "n_head"))
    if type(n_layer) is not int or type(n_head) is not int:
        raise UserError(f"{path}: its model_args give no n_layer or no n_head")
    bias = "ln_f.bias" in state
    flags = gpt2_flags(n_layer, n_head, rows[1], rows[0], places[0]) | {
        "mlp": "gelu_exact" if "bias" in args else "gelu",
        "bias": bias,
    }
    _check_sizes(path, flags)
    _check_names(path, shapes, gpt2_tensors(*rows[:1], *places[:1], rows[1], bias), n_layer)
    head = state.get("lm_head.weight")
    if head is not None and not _same(head, state["wte.weight"]):  # not tied before 14 January 2023
        flags["tie_embeddings"] = False
    if flags["tie_embeddings"]:
        state.pop("lm_head.weight", None)
    said = {"n_embd": "n_embd", "block_size": "n_positions", "vocab_size": "vocab_size", "bias": "bias"}
    for theirs, ours in said.items():
        if theirs in args and args[theirs] != flags[ours]:
            raise UserError(f"{path}: model_args say {theirs}={args[theirs]}, but the tensors {flags[ours]}; damaged")
    return flags, state


def _load_without_code(path: Path) -> Any:
    """torch.load of tensors and plain values, mapped. Raises UserError for any other content."""
    import torch

    _head_of(path, 1)
    try:
        with zipfile.ZipFile(path) as archive:  # as torch writes it; a packed entry could not be mapped
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(
                    f"{path}: a compressed zip file, not torch's; a checkpoint's numbers lie in it as they are"
                )
        return torch.load(str(path), weights_only=True, mmap=True, map_location="cpu")
    except UserError:
        raise
    except Exception as e:  # whatever a file made by someone else makes torch's reader raise
        asked = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.[\w.]+)", str(e))
        if asked:
            raise UserError(f"{path}: refused: to be loaded it wants to run {asked[1]}, which may do anything") from e
        raise UserError(f"{path}: not a checkpoint of nanoGPT, or damaged: torch cannot read it") from e


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Raises UserError unless all of the tensor's numbers are in the file, in order, as floats."""
    import torch

    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or not tensor.is_contiguous() or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{path}: {name} is not a plain tensor of fp32, bf16 or fp16")


def _check_names(path: Path, shapes: dict[str, Shape], tensors: Tensors, n_layer: int) -> None:
    """Raises UserError unless these are GPT-2's parameters, a head being optional."""
    count = sum(n_layer if "{}" in name else 1 for name, _ in tensors)  # before a list of so many is made
    given = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    if len(given) != count:
        raise UserError(f"{path}: {len(given)} parameters, not the {count} of {n_layer} layers of nanoGPT's model")
    for name, shape in each_layer(tensors, n_layer):
        if shapes.get(name) != shape:
            is_there = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(f"{path}: {name} {is_there}, nanoGPT's model of these sizes has {shape}")
    if shapes.get("lm_head.weight", shapes["wte.weight"]) != shapes["wte.weight"]:
        raise UserError(f"{path}: lm_head.weight has shape {shapes['lm_head.weight']}, wte {shapes['wte.weight']}")


def _same(a: Any, b: Any) -> bool:
    import torch

    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def nanogpt_flags(path: Path) -> dict[str, Any]:
    """The flags of ModelConfig that a checkpoint of nanoGPT fixes. Raises UserError if it is not one that is read."""
    return nanogpt_checkpoint(path)[0]
