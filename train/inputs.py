"""Inputs of a run besides the shards: the tokenizer and pretrained weights."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

from cfg.config import Config
from data.loader import Loader
from data.mixed_loader import MixedLoader
from data.tokenizers.load import NAMES, load_tokenizer
from data.tokenizers.tokenizer import NAMED_FINGERPRINTS, Tokenizer
from data.tokenizers.transfer import token_rows
from model.formats.pretrained import initial_values, newest_checkpoint, open_pretrained, open_weights
from model.gpt import InitialValue
from util.errors import UserError
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
    """Replaces --num_epochs with the number of steps that reads the training data so often; prints it.

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


def load_pretrained(config: Config, ranks: Ranks) -> InitialValue | None:
    """Returns the weights of the --init_from model, or None for random initialisation.

    With --resize_embeddings its embeddings are converted to the vocabulary of --tokenizer.
    """
    if config.init_from == "scratch":
        return None
    pretrained, rows = open_pretrained(config.init_from), None
    if not pretrained.kind:  # a rawgpt run, which may be training now: rank 0 chooses the checkpoint for all ranks
        run_dir = pretrained.path
        pretrained = replace(pretrained, path=ranks.on_main(lambda: newest_checkpoint(run_dir)))
    if config.resize_embeddings:
        sizes = pretrained.flags["vocab_size"], config.vocab_size
        old, new = load_tokenizer(pretrained.tokenizer, sizes[0]), load_tokenizer(config.tokenizer, sizes[1])
        rows = token_rows(old, new, *sizes)
    return initial_values(open_weights(pretrained), config, rows)
