"""Inputs of a run besides the shards: the tokenizer and pretrained weights."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfg.config import Config
from data.loader import Loader
from data.mixed_loader import MixedLoader
from data.tokenizers.load import NAMES, load_tokenizer
from data.tokenizers.tokenizer import NAMED_FINGERPRINTS, Tokenizer
from data.tokenizers.transfer import token_rows
from model.formats.checkpoint import MANIFEST, find_damage, step_of
from model.formats.lora_base import Base, recorded_base
from model.formats.peft_config import read_adapter_config
from model.formats.pretrained import (
    PretrainedModel,
    absolute_name,
    initial_values,
    newest_checkpoint,
    open_pretrained,
    open_weights,
)
from model.gpt import InitialValue, parameter_shapes
from model.lora import adapter_value, is_adapter, saved_names
from util.errors import UserError, quote
from util.ranks import Ranks


def open_tokenizer(config: Config, ranks: Ranks) -> Tokenizer | None:
    """Returns the tokenizer for samples, bits per byte, HellaSwag and --doc_mask, or None if it is unknown.

    None for --tokenizer=none. Also None for the default gpt2 if nothing needs it, or, with a message, if it cannot be
    loaded or does not fit the vocabulary. Every other tokenizer, and any that HellaSwag or --doc_mask needs, must load.
    """
    is_default = config.tokenizer == "gpt2" and not (config.doc_mask or config.hellaswag_every)
    if config.tokenizer == "none" or (is_default and not (config.sample_every or config.input_val_bin)):
        return None
    if config.tokenizer not in NAMES:
        return load_tokenizer(config.tokenizer, config.vocab_size)  # a local file

    def fetch() -> str:  # rank 0 downloads it; the other ranks then find it in the cache
        try:
            load_tokenizer(config.tokenizer, config.vocab_size)
            return ""
        except UserError as error:
            if not is_default:
                raise
            return str(error)

    if problem := ranks.on_main(fetch):
        if ranks.is_main:
            print(f"no bits per byte, and samples as token ids: {problem}")
        return None
    return load_tokenizer(config.tokenizer, config.vocab_size)


def tokenizer_fingerprint(config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns name, size and hash of the tokenizer, which shards and checkpoints are compared with."""
    return tokenizer.fingerprint if tokenizer else NAMED_FINGERPRINTS.get(config.tokenizer, {"name": "none"})


def count_iterations(config: Config, data: Loader | MixedLoader, ranks: Ranks) -> Config:
    """Returns the config with --num_iterations computed from --num_epochs, and prints it.

    An epoch of a mixture has as many windows as all its sources together.
    """
    if not config.num_epochs:
        return config
    rows = config.total_batch_size // config.sequence_length
    steps = max(1, math.ceil(Fraction(str(config.num_epochs)) * data.windows / rows))
    if ranks.is_main:
        about = f"{data.windows:,} sequences an epoch, {rows:,} a step"
        print(f"--num_epochs={config.num_epochs:g}: --num_iterations={steps} ({about})")
    return config.model_copy(update={"num_iterations": steps, "num_epochs": 0.0})


def load_pretrained(config: Config, ranks: Ranks) -> tuple[InitialValue | None, Base | None]:
    """Returns the weights of the --init_from model, and with LoRA the base that checkpoints record.

    The weights are None for random initialisation. With --resize_embeddings embeddings and head are converted to the
    vocabulary of --tokenizer. The fingerprints of the base are complete when all weights have been read.
    """
    if config.init_from == "scratch":
        return None, None
    pretrained, rows = open_pretrained(config.init_from), None
    recorded = (
        ranks.on_main(lambda: recorded_base(Path(config.output_dir), config.resume)) if config.lora_rank else None
    )
    if not pretrained.kind:
        run = pretrained
        # This run may be training now and write newer checkpoints, so rank 0 chooses one for all ranks.
        pretrained = replace(pretrained, path=ranks.on_main(lambda: find_base(run, recorded)))
    if config.resize_embeddings:
        sizes = pretrained.flags["vocab_size"], config.vocab_size
        old, new = load_tokenizer(pretrained.tokenizer, sizes[0]), load_tokenizer(config.tokenizer, sizes[1])
        rows = token_rows(old, new, *sizes)
    read = open_weights(pretrained)
    if not config.lora_rank:
        return initial_values(read, config, rows), None
    if config.lora_init and recorded is None and ranks.is_main:
        report_other_base(config, pretrained)
    base, names = Base(absolute_name(pretrained)), parameter_shapes(config).keys()
    read = base.recording(read, names - saved_names(names, config))
    # A run that is resumed gets its adapters from the checkpoint.
    return with_adapters(initial_values(read, config, rows), config, from_init=recorded is None), base


def find_base(run: PretrainedModel, recorded: Base | None, report: Any = print) -> Path:
    """Returns the checkpoint of the rawgpt run `run` that training starts from: the newest one.

    A run that is resumed, whose base is `recorded`, keeps the checkpoint of this name, even if there are newer ones.
    """
    began = Path(recorded.init_from).name if recorded and ":" not in recorded.init_from else ""
    if step_of(Path(began)) < 0 or step_of(run.path) >= 0 or (run.path / MANIFEST).exists():
        return newest_checkpoint(run.path, report)
    found = next((p for p in (run.path / "checkpoints" / began, run.path / began) if p.is_dir()), None)
    problem = find_damage(found, skip="optimizer/") if found else "it does not exist"
    if found is None or problem:
        raise UserError(
            f"--init_from={run.path}: the run to resume began from its checkpoint {began}, which cannot be used"
            f" ({problem}); put it back, or use another --output_dir"
        )
    return found


def report_other_base(config: Config, pretrained: PretrainedModel, report: Any = print) -> None:
    """Prints a warning if the adapter of --lora_init was trained on another model than --init_from."""
    settings = read_adapter_config(Path(config.lora_init).expanduser(), f"--lora_init={quote(config.lora_init)}")
    if not settings.base or not pretrained.kind:  # an adapter never names a rawgpt run
        return
    folders = (settings.folder / settings.base, Path(settings.base).expanduser())
    named = settings.base + (f"@{settings.revision}" if settings.revision else "")
    same_folder = any(os.path.realpath(folder) == os.path.realpath(pretrained.path) for folder in folders)
    if not same_folder and pretrained.hub not in (named, settings.base):
        report(
            f"--lora_init={quote(config.lora_init)}: the adapter was trained on {quote(named)}, not on"
            f" --init_from={config.init_from}; give that model if they differ"
        )


def with_adapters(value: InitialValue, config: Config, from_init: bool) -> InitialValue:
    """Returns `value` with initial values of the adapters, and `from_init` with those of --lora_init."""
    adapter = None
    if config.lora_init and from_init:
        from model.formats.peft import read_adapter

        adapter = read_adapter(config.lora_init, config)

    def value_or_adapter(name: str, shape: torch.Size) -> Tensor:
        if adapter is not None and (found := adapter(name, shape)) is not None:
            return found
        return adapter_value(name, shape, config.seed) if is_adapter(name) else value(name, shape)

    return value_or_adapter
