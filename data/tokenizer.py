"""GPT-2's byte-pair encoding through tiktoken, from a verified rank file and without its network access."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from cfg.errors import UserError
from data import assets

if TYPE_CHECKING:
    from tiktoken import Encoding

GPT2_END_OF_TEXT = 50256


def load_tokenizer(name: str = "gpt2", vocab_size: int | None = None) -> Encoding:
    """The tokenizer called `name`.

    Raises UserError if its rank file cannot be had, or if a model of `vocab_size` must be another one's.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}")
    if vocab_size is not None and not GPT2_END_OF_TEXT < vocab_size <= 2**16:
        raise UserError(
            f"--vocab_size={vocab_size} is not that of tokenizer gpt2, {GPT2_END_OF_TEXT + 1} or a little more"
        )
    # Not tiktoken's own reader: it keeps copies in a temporary folder that everybody can write to.
    lines = assets.fetch("gpt2.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": GPT2_END_OF_TEXT},
    )


def token_bytes(tokenizer: Encoding, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes that each token id stands for, (vocab_size,) int64; special and unused ids count 0."""
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for token in tokenizer.token_byte_values():
        rank = tokenizer.encode_single_token(token)
        if rank < vocab_size:
            lengths[rank] = len(token)
    return lengths


def decode(tokenizer: Encoding, tokens: list[int]) -> str:
    """Text of `tokens`; ids the tokenizer does not have (a larger --vocab_size) show as �."""
    return "".join(
        tokenizer.decode_bytes([t for t in run]).decode("utf-8", errors="replace") if known else "�" * len(run)
        for known, run in _runs(tokens, tokenizer.n_vocab)
    )


def _runs(tokens: list[int], n_vocab: int) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for t in tokens:
        known = t < n_vocab
        if not runs or runs[-1][0] != known:
            runs.append((known, []))
        runs[-1][1].append(t)
    return runs
