"""Counts of parameters for the memory plan (train/memory.py): all or only trained ones, of the model or of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from cfg.config import Config, ModelConfig
from model.gpt import parameter_shapes
from model.lora import adapter_shapes, is_trained
from train.optim import HIDDEN, MUON_GROUPS, muon_group


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, all or those that are trained."""

    total: int
    block: int  # of one block
    products: int  # of one block, the weights that are cast for matrix products: all except norms
    widest: int  # the largest matrix of a block
    root: int  # embeddings, last norm and head: one FSDP group
    head: int  # of the head, including vocabulary padding
    own: int  # this rank's shards
    own_blocks: int  # of the blocks


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. Without LoRA all are trained."""

    all: Sizes
    trained: Sizes
    held: int  # bytes of this rank's shards: frozen parameters in --base_dtype, trained ones in fp32
    states: int  # bytes of optimizer state of this rank's shards


cached_shapes = lru_cache(maxsize=8)(parameter_shapes)


def shapes(config: Config) -> dict[str, torch.Size]:
    """Returns the name and shape of every parameter, adapters included."""
    return cached_shapes(model_part(config), padded=True) | adapter_shapes(config)


def model_part(config: Config) -> ModelConfig:
    """Returns the part of the config that describes the model."""
    return ModelConfig(**{name: getattr(config, name) for name in ModelConfig.model_fields})


def count(config: Config, shards: int) -> Counts:
    """Counts the parameters of the model and of its first rank.

    `shards` is the number of ranks over which FSDP splits each parameter, 1 without FSDP. It splits along the rows, and
    the first rank has the most, ⌈rows / shards⌉.
    """
    everything = shapes(config)
    trained = {name: shape for name, shape in everything.items() if is_trained(name, config)}
    own_elements = {n: -(-s[0] // shards) * prod(s[1:]) for n, s in everything.items()}
    return Counts(
        all=_sizes(everything, own_elements, config),
        trained=_sizes(trained, own_elements, config),
        held=sum(size * (4 if n in trained else base_size(config)) for n, size in own_elements.items()),
        states=sum(state_bytes(config, n, s, own_elements[n]) for n, s in trained.items()),
    )


def _sizes(chosen: dict[str, torch.Size], own_elements: dict[str, int], config: Config) -> Sizes:
    """Returns the counts of the `chosen` parameters. `own_elements`: elements of each parameter on the first rank."""
    blocks = [n for n in chosen if n.startswith("h.")]
    first = {n: prod(chosen[n]) for n in blocks if n.startswith("h.0.")}
    total, block = sum(map(prod, chosen.values())), sum(first.values())
    return Sizes(
        total=total,
        block=block,
        products=sum(size for n, size in first.items() if "c_" in n),  # c_attn, c_proj, c_fc
        widest=max(first.values()),
        root=total - config.n_layer * block,
        head=prod(chosen.get("wte.weight", (0,))),  # as large as an untied head
        own=sum(own_elements[n] for n in chosen),
        own_blocks=sum(own_elements[n] for n in blocks),
    )


def state_bytes(config: Config, name: str, shape: torch.Size, own_elements: int) -> int:
    """Returns the bytes of optimizer state of a parameter of which this rank has `own_elements`.

    AdamW keeps two moments. Muon keeps the momentum of a hidden matrix, and on every rank a number for each row.
    """
    if config.optimizer == "muon" and muon_group(name) in HIDDEN:
        return 4 * own_elements + 4 * shape[0]
    return 8 * own_elements


def base_size(config: Config) -> int:
    """Returns the bytes of an element of a frozen parameter."""
    return 2 if config.base_dtype == "bfloat16" else 4


def largest_partition(config: Config, world_size: int) -> int:
    """Returns the bytes of optimizer state on the rank that has most of them in stage 1.

    ZeroRedundancyOptimizer goes through the parameter groups, and assigns whole parameters, the largest first, to the
    rank with the fewest elements so far.
    """
    elements, states = [0] * world_size, [0] * world_size
    groups: dict[Any, list[tuple[str, torch.Size]]] = {key: [] for key in (MUON_GROUPS + (False, True))}
    for name, shape in shapes(config).items():
        if not is_trained(name, config):
            continue
        groups[muon_group(name) if config.optimizer == "muon" else len(shape) < 2].append((name, shape))
    for group in groups.values():
        for name, shape in sorted(group, key=lambda item: prod(item[1]), reverse=True):
            rank = elements.index(min(elements))
            elements[rank] += prod(shape)
            states[rank] += state_bytes(config, name, shape, prod(shape))
    return max(states)
