"""Inputs of a run besides the shards: the tokenizer and pretrained weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cfg.config import Config
from cfg.origin import open_origin
from data.tokenizers.load import NAMES, load_tokenizer
from data.tokenizers.tokenizer import NAMED_FINGERPRINTS, Tokenizer
from data.tokenizers.transfer import token_rows
from model.formats.pretrained import initial_values, newest, reader
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


def load_pretrained(config: Config, ranks: Ranks) -> InitialValue | None:
    """Returns the weights of the --init_from model, or None for random initialisation.

    With --resize_embeddings its embeddings are converted to the vocabulary of --tokenizer.
    """
    if config.init_from == "scratch":
        return None
    origin, rows = open_origin(config.init_from), None
    if not origin.kind:  # a rawgpt run, which may be training now: rank 0 chooses the checkpoint for all ranks
        run_dir = origin.path
        origin = replace(origin, path=ranks.on_main(lambda: newest(run_dir)))
    if config.resize_embeddings:
        sizes = origin.flags["vocab_size"], config.vocab_size
        old, new = load_tokenizer(origin.tokenizer, sizes[0]), load_tokenizer(config.tokenizer, sizes[1])
        rows = token_rows(old, new, *sizes)
    return initial_values(reader(origin), config, rows)
