"""Export of a tokenizer to the files of a Hugging Face folder. `transformers` gives the same ids with them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from data.tokenizers.bpe import merges
from data.tokenizers.hf_json import SAME_CUTS, TOKENIZER, TOKENIZER_CONFIG, _byte_letters, byte_level_steps
from data.tokenizers.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizer_files(tokenizer: Tokenizer, limit: int | None = None) -> dict[str, bytes]:
    """Returns names and contents of the files. `limit` is the model's context length (model_max_length).

    A tokenizer that was read from a tokenizer.json keeps that file byte for byte. Its bos_token is the token that
    documents start with. Without a BOS token this is the end-of-text token, as for GPT-2.
    """
    if tokenizer.files:
        content = tokenizer.files[TOKENIZER]
        config: dict[str, Any] = json.loads(tokenizer.files[TOKENIZER_CONFIG])
        names = {i: name for name, i in tokenizer.special.items()}
        if tokenizer.bos_tokens[0] in names:
            config["bos_token"] = names[tokenizer.bos_tokens[0]]
    else:
        content = json.dumps(_named_json(tokenizer), ensure_ascii=False).encode()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    config["clean_up_tokenization_spaces"] = False
    if steps := byte_level_steps(json.loads(content)):  # otherwise `transformers` 4 uses its default
        config["add_prefix_space"] = any(step.get("add_prefix_space", True) for step in steps)
    if limit is not None:
        config["model_max_length"] = limit
    return {TOKENIZER: content, TOKENIZER_CONFIG: (json.dumps(config, indent=1) + "\n").encode()}


def extended_files(tokenizer: Tokenizer, names: list[str], end_of_text: str, chat_template: str) -> dict[str, bytes]:
    """Returns names and contents of a tokenizer's files with additional special tokens, which get the next ids.

    `end_of_text` is the name of its end-of-text token, a special token or one of `names`.
    """
    files = tokenizer_files(tokenizer)
    data, config = json.loads(files[TOKENIZER]), json.loads(files[TOKENIZER_CONFIG])
    if tokenizer.files and "bos_token" not in json.loads(tokenizer.files[TOKENIZER_CONFIG]):
        config.pop("bos_token", None)  # which `tokenizer_files` has set for models that begin every text with it
    for name, i in zip(names, range(tokenizer.vocab_size, tokenizer.vocab_size + len(names)), strict=True):
        data["added_tokens"].append({"id": i, "content": name, **FLAGS})
        data["model"]["vocab"][name] = i  # otherwise ids after a gap would be renumbered
    if names:
        files[TOKENIZER] = json.dumps(data, ensure_ascii=False).encode()
    config |= {"eos_token": end_of_text, "chat_template": chat_template}
    return {**files, TOKENIZER_CONFIG: (json.dumps(config, indent=1) + "\n").encode()}


def _named_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer.json of a named tokenizer.

    The ids are the same by the proof in data/tokenizers/hf_json.py: the list of merges has the pair of each token, in
    the order of ids. `ignore_merges` is needed if a token has no pair.
    """
    assert tokenizer.ranks is not None, "a named tokenizer has ranks"
    pairs = merges(tokenizer.ranks)
    vocab = {_written(token): i for token, i in sorted(tokenizer.ranks.items(), key=lambda item: item[1])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **FLAGS} for name, i in tokenizer.special.items()],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(tokenizer.pattern, byte_level),
        "post_processor": byte_level | {"trim_offsets": False, "use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": len(pairs) < len(vocab) - 256,
            # With the special tokens: otherwise ids after a gap, which cl100k has, would be renumbered.
            "vocab": vocab | tokenizer.special,
            "merges": [f"{_written(left)} {_written(right)}" for left, right in pairs],
        },
    }


def _written(token: bytes) -> str:
    """Writes bytes as GPT-2's letters."""
    letters = _letters()
    return "".join(letters[b] for b in token)


@cache
def _letters() -> dict[int, str]:
    return {b: letter for letter, b in _byte_letters().items()}


def _pre_tokenizer(pattern: str | None, byte_level: dict[str, Any]) -> dict[str, Any]:
    if pattern == GPT2_PATTERN:  # built into ByteLevel
        return byte_level | {"use_regex": True}
    regex = next(theirs for theirs, ours in SAME_CUTS.items() if ours == pattern)
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
