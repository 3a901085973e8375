"""Files of raw tensors behind a header, as llm.c and llama2.c write them.

A header comes from elsewhere and may hold any numbers. So its sizes and the size of the file are checked before a
tensor is read. torch is only imported to read tensors: a wrong --init_from is reported before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfg.config import model_config
from cfg.flags import ModelConfig, architecture
from util.errors import UserError, user_errors

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Reader = Callable[[str], "Tensor"]  # returns the whole parameter of a name, in its stored dtype


@dataclass(frozen=True)
class RawFile:
    """A checked file of raw tensors."""

    path: Path
    flags: dict[str, Any]  # of ModelConfig, those that decide what the weights compute
    dtype: str  # float32 or bfloat16
    tensors: dict[str, tuple[int, Shape]]  # name → byte offset and shape

    def read(self, name: str, shape: Shape) -> Tensor:
        """Reads a tensor, or its first rows if `shape` has fewer."""
        import torch

        offset, _ = self.tensors[name]
        kind = "<f4" if self.dtype == "float32" else "<i2"  # numpy has no bfloat16
        with user_errors(self.path):
            numbers = np.fromfile(self.path, kind, prod(shape), offset=offset)
        if len(numbers) != prod(shape):
            raise UserError(f"{self.path}: {name} is cut off; the file changed while it was read")
        tensor = torch.from_numpy(numbers).view(shape)
        return tensor if self.dtype == "float32" else tensor.view(torch.bfloat16)


def read_header(path: Path, count: int) -> tuple[bytes, int]:
    """Returns the first `count` bytes of a file, fewer if it is shorter, and its size."""
    with user_errors(path), open(path, "rb") as f:
        head, size = f.read(count), f.seek(0, 2)
    if not size:
        raise UserError(f"{path}: empty file")
    return head, size


def place_tensors(
    path: Path, start: int, dtype: str, tensors: Iterable[tuple[str, Shape]], size: int
) -> dict[str, tuple[int, Shape]]:
    """Returns the byte offset and shape of each of the `tensors`, which begin at `start` and must end with the file."""
    places, end = {}, start
    for name, shape in tensors:
        places[name] = end, shape
        end += prod(shape) * (4 if dtype == "float32" else 2)
    if size != end:
        what = "truncated" if size < end else "too long"
        raise UserError(
            f"{path}: {what}, or another kind of file: its header's sizes make {end:,} bytes, the file has {size:,}"
        )
    return places


def gpt2_flags(path: Path, **sizes: Any) -> dict[str, Any]:
    """Returns the architecture of a GPT-2 of these sizes, after a check; other flags among `sizes` are kept."""
    derived = {"n_kv_head": sizes["n_head"], "mlp_hidden": 4 * sizes["n_embd"]}
    return architecture(model_config(derived | sizes, str(path)))


def gpt2_tensors(
    rows: int, n_positions: int, n_embd: int, n_layer: int, bias: bool = True
) -> Iterable[tuple[str, Shape]]:
    """Yields name and shape of GPT-2's parameters in llm.c's order: each kind for all layers. `rows`: of wte."""
    yield "wte.weight", (rows, n_embd)
    yield "wpe.weight", (n_positions, n_embd)
    kinds = ("weight", "bias") if bias else ("weight",)
    for module, shape in [
        ("ln_1", (n_embd,)),
        ("attn.c_attn", (3 * n_embd, n_embd)),
        ("attn.c_proj", (n_embd, n_embd)),
        ("ln_2", (n_embd,)),
        ("mlp.c_fc", (4 * n_embd, n_embd)),
        ("mlp.c_proj", (n_embd, 4 * n_embd)),
    ]:
        for kind in kinds:
            for i in range(n_layer):
                yield f"h.{i}.{module}.{kind}", shape if kind == "weight" else shape[:1]
    for kind in kinds:
        yield f"ln_f.{kind}", (n_embd,)


def checked_reader(
    path: Path, config: ModelConfig, stored: dict[str, Shape], heads: tuple[int, int], load: Reader
) -> Reader:
    """Returns `load` with a check of the name and the shape of each parameter that is asked for.

    `stored` has the shapes in the file under our names, `heads` the numbers of query and of key/value heads. Both must
    belong to the model of `config`.
    """
    from model.gpt import parameter_shapes

    wanted = {name: tuple(shape) for name, shape in parameter_shapes(config).items()}
    if different := sorted(wanted.keys() ^ stored.keys()):
        where = "the file" if different[0] in stored else "the model of the flags"
        raise UserError(f"{path}: another model than that of the flags: {different[0]} is only in {where}")
    if heads != (config.n_head, config.n_kv_head):  # the shapes do not show them
        flags = f"--n_head={config.n_head} --n_kv_head={config.n_kv_head}"
        raise UserError(f"{path}: it has {heads[0]} heads, {heads[1]} of keys and values, not {flags}")

    def read(name: str) -> Tensor:
        if name not in stored:
            raise UserError(f"{path}: has no parameter {name}")
        if wanted[name] != stored[name]:
            raise UserError(f"{path}: {name} has shape {stored[name]}, the model of the flags {wanted[name]}")
        return load(name)

    return read
