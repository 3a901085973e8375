"""Loader of tokenizers, by name or from a file."""

from __future__ import annotations

import os
from pathlib import Path

from data import assets
from data.tokenizers.hf_json import load_tokenizer_json
from data.tokenizers.llama2c import load_llama2c_tokenizer
from data.tokenizers.tokenizer import (
    BYTE_RANKS,
    CL100K_PATTERN,
    END_OF_TEXT,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    GPT2_PATTERN,
    MAX_UNUSED_IDS,
    NAMED_FINGERPRINTS,
    O200K_PATTERN,
    Tokenizer,
    read_rank_file,
)
from util.errors import UserError, closest, quote
from util.hub import model_folder

_FIM = (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX)
# name: (file in data/assets.py, pattern, special tokens)
NAMED = {
    "gpt2": ("gpt2.tiktoken", GPT2_PATTERN, {END_OF_TEXT: 50256}),
    "gpt2-fim": ("gpt2.tiktoken", GPT2_PATTERN, {t: 50256 + i for i, t in enumerate((END_OF_TEXT, *_FIM))}),
    "cl100k_base": (
        "cl100k_base.tiktoken",
        CL100K_PATTERN,
        {t: 100257 + i for i, t in enumerate((END_OF_TEXT, *_FIM))} | {"<|endofprompt|>": 100276},
    ),
    "o200k_base": ("o200k_base.tiktoken", O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}
NAMES = (*NAMED, "bytes")
_sized: dict[str, Tokenizer] = {}  # loaded by tokenizer_size; a run loads the same tokenizer next


def load_tokenizer(name: str = "gpt2", vocab_size: int | None = None) -> Tokenizer:
    """Loads one of NAMES, a tokenizer.json, a folder with a tokenizer.json, or llama2.c's tokenizer.bin.

    hf:NAME downloads the tokenizer of a model on the Hugging Face hub. `vocab_size` is the model's vocabulary, which
    may be up to MAX_UNUSED_IDS larger than the tokenizer's.
    """
    if name in NAMES:
        tokenizer = _load_named(name)
    elif name in _sized:
        tokenizer = _sized.pop(name)
    elif name.startswith("hf:"):
        tokenizer = _load_path(model_folder(name.removeprefix("hf:"), f"--tokenizer={name}")[0])
    elif os.path.exists(path := os.path.expanduser(name)):
        tokenizer = _load_path(Path(path))
    else:
        near = closest(name, (*NAMES, "none"))
        hint = f"did you mean {near}?" if near else f"give one of {', '.join(NAMES)}, or the path of a tokenizer.json"
        raise UserError(f"--tokenizer={quote(name)}: no such tokenizer or file; {hint}")
    if vocab_size is not None and not tokenizer.vocab_size <= vocab_size <= tokenizer.vocab_size + MAX_UNUSED_IDS:
        raise UserError(
            f"--vocab_size={vocab_size} does not fit tokenizer {name}; give --vocab_size={tokenizer.vocab_size}"
            f" or a little more, or --resize_embeddings=1 for a model of --init_from"
        )
    return tokenizer


def tokenizer_size(name: str) -> int:
    """Returns the number of ids of a tokenizer. Those of a named tokenizer are known without its files."""
    if name in NAMES:
        return int(NAMED_FINGERPRINTS[name]["vocab_size"])
    _sized[name] = load_tokenizer(name)
    return _sized[name].vocab_size


def _load_path(path: Path) -> Tokenizer:
    return load_llama2c_tokenizer(path) if path.suffix == ".bin" and path.is_file() else load_tokenizer_json(path)


def _load_named(name: str) -> Tokenizer:
    if name == "bytes":  # GPT-2's pattern is for the export: without merges every pattern gives the same ids
        return Tokenizer(name, BYTE_RANKS, GPT2_PATTERN, {END_OF_TEXT: 256}, 256)
    file, pattern, special = NAMED[name]
    ranks = read_rank_file(assets.fetch(file).read_bytes())
    return Tokenizer(name, ranks, pattern, special, special[END_OF_TEXT])
