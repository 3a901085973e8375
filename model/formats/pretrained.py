"""The weights of a model that somebody has trained: what cfg/origin.py names, as values of our parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from cfg.checks import check_model
from cfg.config import ModelConfig
from cfg.origin import WEIGHTS, Origin, fetch, open_origin, split
from model.formats import hf, others
from model.formats.checkpoint import find_checkpoint, load_tensors, read_manifest, tensor_shapes
from model.gpt import GPT, VOCABULARY, InitialValue, init_weights, parameter_shapes
from util.errors import UserError, quote

# For each new token the old ones whose mean it becomes: their ids, one after another, and where each token's begin.
Rows = tuple[np.ndarray, np.ndarray]
READERS = {"nanogpt": others.nanogpt_reader, "llmc": others.llmc_reader, "llama2c": others.llama2c_reader}


def reader(origin: Origin, report: Any = print) -> Callable[[str], Tensor]:
    """What gives the parameter of a name, whole, embeddings and head without padding, in the dtype it is stored in.

    It holds none of them. Raises UserError if the files are not those of the model they describe.
    """
    config = model_config(origin.flags, str(origin.path))
    if origin.kind in READERS:
        return READERS[origin.kind](origin.path, config)
    if origin.kind == "hf":
        if origin.hub:
            fetch(origin.hub, WEIGHTS, f"hf:{origin.hub}")
        return hf.Reader(origin.path, config.positions == "learned", parameter_shapes(config))
    return checkpoint_reader(newest(origin.path, report), config)


def newest(path: Path, report: Any = print) -> Path:
    """The newest whole checkpoint of a run; the optimizer's files, which are not asked for, are not hashed."""
    found = find_checkpoint(path, report, skip="optimizer/")
    if found is None:
        raise UserError(f"{path}: holds no checkpoint")
    return found


def checkpoint_reader(path: Path, config: ModelConfig) -> Callable[[str], Tensor]:
    """As `reader`, of one checkpoint of ours."""
    shapes = tensor_shapes(path, "model")

    def read(name: str) -> Tensor:
        if name not in shapes:
            raise UserError(f"{path}: has no {name}")
        tensor = torch.empty(shapes[name])
        load_tensors(path, "model", {name: tensor}, subset=True)
        return tensor[: config.vocab_size] if name in VOCABULARY else tensor

    return read


def initial_values(read: Callable[[str], Tensor], config: ModelConfig, rows: Rows | None = None) -> InitialValue:
    """For `init_weights`: what `read` gives, the vocabulary padded with zeros.

    `rows` say how embeddings and head get those of another vocabulary. Raises UserError for a shape that is not the
    model's.
    """

    def value(name: str, shape: torch.Size) -> Tensor:
        found = read(name)
        expected = shape
        if name in VOCABULARY:
            found = found if rows is None else mixed_rows(found, rows)
            expected = torch.Size((config.vocab_size, *shape[1:]))
        if found.shape != expected:
            raise UserError(
                f"--init_from: {name} has shape {tuple(found.shape)}, but the model that comes with it wants"
                f" {tuple(expected)}; the files are damaged, or not of one model"
            )
        if expected != shape:
            found = torch.cat((found, found.new_zeros(shape[0] - expected[0], *shape[1:])))
        return found

    return value


def mixed_rows(table: Tensor, rows: Rows) -> Tensor:
    """(V_new, C) from (V_old, C): each the mean of the `rows` it is made of, or of all in use where there are none."""
    ids, offsets = (torch.from_numpy(a) for a in rows)
    table = table.float()
    mixed = torch.nn.functional.embedding_bag(ids, table, offsets, mode="mean", include_last_offset=True)
    mixed[offsets.diff() == 0] = table[ids.unique()].mean(0)  # not of rows that pad the vocabulary
    return mixed


def model_config(flags: dict[str, Any], where: str) -> ModelConfig:
    """The part of `flags` that describes a model."""
    try:
        config = ModelConfig(**{k: v for k, v in flags.items() if k in ModelConfig.model_fields})
    except ValidationError as e:
        first = e.errors()[0]
        name = f"{first['loc'][0]}={quote(first['input'])}" if first["loc"] else "the whole"
        raise UserError(f"{where}: describes no model that this version knows: {name}: {first['msg']}") from e
    try:
        check_model(config)
    except UserError as e:
        raise UserError(f"{where}: describes no model that this version knows: {e}") from e
    return config


def load_model(path: Path | str, device: torch.device, report: Any = print) -> tuple[GPT, dict[str, Any], Path]:
    """The model of a checkpoint or run directory, or of what else --checkpoint may name, in eval mode.

    With the flags it was trained with, as far as they are known, and the checkpoint, folder or file that was read.
    """
    if split(str(path))[0]:
        return load_foreign(open_origin(str(path), "checkpoint"), device)
    found = newest(Path(path), report)
    flags = read_manifest(found)["config"]
    model = GPT(model_config(flags, str(found)))
    load_tensors(found, "model", {name: p.detach() for name, p in model.named_parameters()})
    return model.to(device).eval(), flags, found


def load_foreign(origin: Origin, device: torch.device) -> tuple[GPT, dict[str, Any], Path]:
    """As `load_model`."""
    config = model_config(origin.flags, str(origin.path))
    read = reader(origin)  # refuses files that are not of this model, before there is memory for it
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    init_weights(model, initial_values(read, config))
    flags = {**config.model_dump(), "tokenizer": origin.tokenizer, "doc_mask": False}
    return model.to(device).eval(), flags, origin.path
