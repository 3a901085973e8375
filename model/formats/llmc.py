"""llm.c's model file, read and written: `write_model` in karpathy/llm.c, train_gpt2.py.

256 little-endian int32: magic, version (3: fp32, 5: bf16), positions, vocabulary, layers, heads, width, rows of the
embedding (the vocabulary padded to a multiple of 128). Then the tensors, each kind for all layers. Matrices are
(out, in), and c_attn holds queries, keys and values in this order, as in our model. The versions of April 2024 (1, 2
and 4) are not read.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cfg.flags import ModelConfig, architecture
from model.formats.raw import RawFile, Reader, checked_reader, gpt2_flags, gpt2_tensors, place_tensors, read_header
from util.errors import UserError
from util.files import create_file

if TYPE_CHECKING:
    import torch

MAGIC, HEADER = 20240326, 1024
DTYPES = {3: "float32", 5: "bfloat16"}
OLD = {1: "fp32 without padded vocabulary", 2: "bf16 without padded vocabulary", 4: "bf16 with fp32 norms"}
VOCAB_MULTIPLE = 128


def open_file(path: Path) -> RawFile:
    """Reads and checks the header."""
    head, size = read_header(path, HEADER)
    if len(head) < HEADER:
        raise UserError(f"{path}: {size} bytes are less than llm.c's header of {HEADER}; truncated")
    magic, version, n_positions, vocab_size, n_layer, n_head, n_embd, rows = struct.unpack("<8i", head[:32])
    if magic != MAGIC:
        raise UserError(f"{path}: has magic {magic}, llm.c's GPT-2 model files have {MAGIC}")
    if version not in DTYPES:
        which = f" ({OLD[version]})" if version in OLD else ""
        raise UserError(f"{path}: version {version}{which} of llm.c's model file; 3 (fp32) and 5 (bf16) are read")
    flags = gpt2_flags(
        path, n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, n_positions=n_positions
    )
    if rows < vocab_size:
        raise UserError(f"{path}: {rows} rows of embedding for a vocabulary of {vocab_size}; damaged")
    dtype, tensors = DTYPES[version], gpt2_tensors(rows, n_positions, n_embd, n_layer)
    return RawFile(path, flags, dtype, place_tensors(path, HEADER, dtype, tensors, size))


def reader(path: Path, config: ModelConfig) -> Reader:
    """Returns a function that reads one parameter, fp32 or bf16 as in the file, without vocabulary padding."""
    file = open_file(path)
    stored = {name: shape for name, (_, shape) in file.tensors.items()}
    stored["wte.weight"] = (file.flags["vocab_size"], file.flags["n_embd"])
    heads = file.flags["n_head"], file.flags["n_kv_head"]
    return checked_reader(path, config, stored, heads, lambda name: file.read(name, stored[name]))


def check_writable(config: ModelConfig) -> None:
    """Raises UserError for the first flag that makes the architecture different from GPT-2's."""
    sizes = {"n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "rope_base"}  # nothing is rotated
    gpt2 = ModelConfig.model_validate({"n_kv_head": config.n_head, "mlp_hidden": 4 * config.n_embd})
    for name, value in architecture(config).items():
        if name not in sizes and value != (only := getattr(gpt2, name)):
            value, only = (int(v) if isinstance(v, bool) else v for v in (value, only))
            raise UserError(f"--{name}={value}: llm.c's model files are GPT-2's, and have only --{name}={only}")


def write_file(path: Path, config: ModelConfig, read: Reader, dtype: torch.dtype) -> None:
    """Writes a model file that appears whole or not at all: version 3 for fp32, 5 for bf16.

    `read` returns whole parameters under our names, the embedding with `vocab_size` rows. One is held at a time.
    """
    import torch

    versions = {getattr(torch, kind): version for version, kind in DTYPES.items()}
    if dtype not in versions:
        raise UserError(f"{path}: llm.c's model files hold float32 or bfloat16, not {str(dtype).split('.')[-1]}")
    check_writable(config)
    vocab, positions, width = config.vocab_size, config.n_positions, config.n_embd
    rows = -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    header = np.zeros(HEADER // 4, "<i4")
    header[:8] = MAGIC, versions[dtype], positions, vocab, config.n_layer, config.n_head, width, rows
    try:
        with create_file(path) as f:
            f.write(header.tobytes())
            for name, shape in gpt2_tensors(vocab, positions, width, config.n_layer):
                tensor = read(name).detach().to("cpu", dtype).contiguous()
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
                f.write(tensor.view(torch.uint8).numpy().data)
                if name == "wte.weight":
                    f.write(bytes((rows - vocab) * width * dtype.itemsize))
    except FileExistsError as e:
        raise UserError(f"{e.filename} is already there; choose another name") from e
