"""Opens the training and validation data of a run."""

from __future__ import annotations

from typing import Any

from cfg.config import Config
from data.fingerprint import check_shards_tokenizer
from data.loader import Loader
from data.masks import open_masks
from data.mixed_loader import MixedLoader, parse_sources
from data.shards import Shard, find_shards, open_shard
from util.errors import UserError


def open_shards(config: Config, pattern: str, flag: str, tokenizer: dict[str, Any]) -> list[Shard]:
    """Opens and checks the shards of a glob. `tokenizer` is the fingerprint that manifests beside them must have."""
    paths = find_shards(pattern, flag)
    check_shards_tokenizer(paths, tokenizer, config.vocab_size, flag)
    return [open_shard(path, config.vocab_size, config.check_data) for path in paths]


def open_train_data(config: Config, tokenizer: dict[str, Any]) -> Loader | MixedLoader:
    """Opens --input_train_bin: one glob, or several mixed by weight."""
    pattern, flag = config.input_train_bin, "input_train_bin"
    order = (config.sequence_length, config.total_batch_size // config.sequence_length, config.seed, config.shuffle)
    if sources := parse_sources(pattern, flag):
        each = [open_shards(config, source.pattern, flag, tokenizer) for source in sources]
        masks = [open_masks(shards, config.sequence_length, flag) for shards in each]
        return MixedLoader(sources, each, *order, flag, masks)
    shards = open_shards(config, pattern, flag, tokenizer)
    return Loader(shards, *order, flag, masks=open_masks(shards, config.sequence_length, flag))


def open_val_data(config: Config, tokenizer: dict[str, Any]) -> Loader:
    """Opens --input_val_bin: one glob."""
    pattern, flag = config.input_val_bin, "input_val_bin"
    if parse_sources(pattern, flag):
        raise UserError(f"--{flag}={pattern}: validation reads one set of shards; give one glob without name=weight:")
    shards = open_shards(config, pattern, flag, tokenizer)
    masks = open_masks(shards, config.sequence_length, flag)
    return Loader(shards, config.sequence_length, 1, config.seed, config.shuffle, flag, masks=masks)
