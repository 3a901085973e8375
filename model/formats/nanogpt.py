"""nanoGPT's checkpoints: karpathy/nanoGPT, train.py, writes a dict with the model's state and its arguments.

Parameter names are ours behind "transformer.", and behind "_orig_mod." too if the model was compiled. Only tensors and
plain values are unpickled.

The file does not say which version of nanoGPT wrote it. GELU is taken to be exact, as it is since May 2023 (commit
594068e). Arguments without `bias` are older than 27 January 2023, when it was the tanh approximation.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from cfg.flags import ModelConfig
from model.formats.raw import Reader, Shape, checked_reader, gpt2_flags, gpt2_tensors, read_header
from util.errors import UserError

CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.bias")  # a buffer where torch had no flash attention


def open_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the flags and the parameters under our names. Parameters are mapped from the file, not read yet."""
    loaded = _load_without_code(path)
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(key), dict) for key in ("model", "model_args")):
        raise UserError(f"{path}: not a nanoGPT checkpoint, which has model and model_args")
    args = loaded["model_args"]
    state = {str(k).removeprefix("_orig_mod.").removeprefix("transformer."): v for k, v in loaded["model"].items()}
    state = {name: tensor for name, tensor in state.items() if not CAUSAL_MASK.fullmatch(name)}
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)

    # The sizes come from the tensors. Only the numbers of layers and heads need the arguments.
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wte, wpe = (shapes.get(name, ()) for name in ("wte.weight", "wpe.weight"))
    if len(wte) != 2 or len(wpe) != 2:
        raise UserError(f"{path}: not a nanoGPT checkpoint: no transformer.wte.weight or transformer.wpe.weight")
    n_layer, n_head = (args.get(name) for name in ("n_layer", "n_head"))
    if type(n_layer) is not int or type(n_head) is not int:
        raise UserError(f"{path}: its model_args have no n_layer or no n_head")
    head = state.get("lm_head.weight")
    tied = head is None or _are_equal(head, state["wte.weight"])  # before 14 January 2023 they were not
    flags = gpt2_flags(
        path,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=wte[1],
        vocab_size=wte[0],
        n_positions=wpe[0],
        mlp="gelu_exact" if "bias" in args else "gelu",
        bias="ln_f.bias" in state,
        tie_embeddings=tied,
    )
    _check_names(path, shapes, dict(gpt2_tensors(*wte[:1], *wpe[:1], wte[1], n_layer, flags["bias"])), n_layer)
    if tied:
        state.pop("lm_head.weight", None)
    for theirs, ours in {
        "n_embd": "n_embd",
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "bias": "bias",
    }.items():
        if theirs in args and args[theirs] != flags[ours]:
            raise UserError(f"{path}: model_args say {theirs}={args[theirs]}, but the tensors {flags[ours]}; damaged")
    return flags, state


def _load_without_code(path: Path) -> Any:
    """Maps a checkpoint of tensors and plain values. Any other content is a UserError."""
    import torch

    read_header(path, 1)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compress, and compressed entries cannot be mapped
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path}: a compressed zip file; torch's checkpoints are not compressed")
        return torch.load(str(path), weights_only=True, mmap=True, map_location="cpu")
    except UserError:
        raise
    except Exception as e:  # torch's reader raises many kinds of exceptions for files from elsewhere
        asked = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.[\w.]+)", str(e))
        if asked:
            raise UserError(f"{path}: refused: loading it would run {asked[1]}, which could do anything") from e
        raise UserError(f"{path}: not a nanoGPT checkpoint, or damaged: torch cannot read it") from e


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Checks that all numbers of the tensor are in the file, in order, as floats."""
    import torch

    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or not tensor.is_contiguous() or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{path}: {name} is not a plain tensor of fp32, bf16 or fp16")


def _check_names(path: Path, shapes: dict[str, Shape], expected: dict[str, Shape], n_layer: int) -> None:
    """Checks that the `shapes` are GPT-2's parameters; a head is optional."""
    given = shapes.keys() - {"lm_head.weight"}
    if len(given) != len(expected):
        raise UserError(f"{path}: {len(given)} parameters; nanoGPT's model of {n_layer} layers has {len(expected)}")
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(f"{path}: {name} {found}, nanoGPT's model of these sizes has {shape}")
    if shapes.get("lm_head.weight", shapes["wte.weight"]) != shapes["wte.weight"]:
        raise UserError(f"{path}: lm_head.weight has shape {shapes['lm_head.weight']}, wte {shapes['wte.weight']}")


def _are_equal(a: Any, b: Any) -> bool:
    import torch

    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def reader(path: Path, config: ModelConfig) -> Reader:
    """Returns a function that maps one parameter from the file, in the dtype it was saved in."""
    flags, state = open_file(path)
    stored = {name: tuple(tensor.shape) for name, tensor in state.items()}
    heads = flags["n_head"], flags["n_kv_head"]
    return checked_reader(path, config, stored, heads, lambda name: state[name].detach())
