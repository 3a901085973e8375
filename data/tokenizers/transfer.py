"""Embeddings for a new tokenizer: each new row is the mean of old rows.

Fast Vocabulary Transfer (Gee, Zugarini, Rigutini, Torroni: Fast Vocabulary Transfer for Language Model Compression,
EMNLP 2022 industry track, https://arxiv.org/abs/2402.09977): a token in both vocabularies keeps its row. A new token
gets the mean of the rows of the tokens that the old tokenizer encodes it to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from data.tokenizers.bpe import merge
from data.tokenizers.tokenizer import Tokenizer


def token_rows(old: Tokenizer, new: Tokenizer, old_size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns old ids, (n,) int64, and offsets, (new_size + 1,) int64.

    Row i of the new embeddings is the mean of the old rows ids[offsets[i]:offsets[i + 1]]. If this is empty, it is the
    mean of all old rows that belong to a token. `old_size` and `new_size` are the numbers of rows, at least the sizes
    of the vocabularies.

    A token gets the old token with its bytes, otherwise the old tokens that spell it. A special token gets the old
    special token with its name. The end-of-text token gets the old end-of-text token, unless both of these exist in
    both tokenizers. New special tokens and unused ids get nothing. If both tokenizers are equal, every row is kept,
    including rows without a token.
    """
    if old.vocab_size > old_size or new.vocab_size > new_size:
        raise ValueError(f"{old.vocab_size} and {new.vocab_size} ids in {old_size} and {new_size} rows")
    if old.sha256 == new.sha256:
        bags = {i: [i] for i in range(min(old_size, new_size))}
    else:
        bags = _with_equal_bytes(old.token_bytes, new.token_bytes)
        bags |= _spelled(old, {i: token for i, token in new.token_bytes.items() if i not in bags})
        by_name = {i: [old.special[name]] for name, i in new.special.items() if name in old.special}
        if new.end_of_text not in by_name or [old.end_of_text] not in by_name.values():
            by_name[new.end_of_text] = [old.end_of_text]
        bags |= by_name
    offsets = np.zeros(new_size + 1, np.int64)
    np.cumsum([len(bags.get(i, ())) for i in range(new_size)], out=offsets[1:])
    return np.array([j for i in range(new_size) for j in bags.get(i, ())], np.int64), offsets


def _with_equal_bytes(old: dict[int, bytes], new: dict[int, bytes]) -> dict[int, list[int]]:
    """Maps each new token id to the old id with the same bytes.

    SentencePiece has some bytes twice, such as <0x41> and later A. The last old id is matched with the last new id, the
    second to last with the second to last, because text is encoded with the last one.
    """
    old_ids, new_ids = _by_bytes(old), _by_bytes(new)
    return {
        i: [same[min(back, len(same) - 1)]]
        for token, ids in new_ids.items()
        if (same := old_ids.get(token))
        for back, i in enumerate(ids)
    }


def _by_bytes(token_bytes: dict[int, bytes]) -> dict[bytes, list[int]]:
    """Groups ids by their bytes, the last id first."""
    ids = defaultdict(list)
    for i in sorted(token_bytes, reverse=True):
        ids[token_bytes[i]].append(i)
    return ids


def _spelled(old: Tokenizer, tokens: dict[int, bytes]) -> dict[int, list[int]]:
    """Maps each token to the old ids that spell its bytes."""
    texts = {}
    for i, token in tokens.items():
        with suppress(UnicodeDecodeError):  # for example part of a character
            if old.find_missing_byte(text := token.decode()) is None:
                texts[i] = text
    bags: dict[int, list[int]] = {}
    # An encoder that puts a space before a text gets the token without its space, or after a newline that is removed.
    more = ((1, ""), (0, "\n")) if old.library and old.library.prepends_space else ()
    for taken, put in ((0, ""), *more):
        rest = {i: text for i, text in texts.items() if i not in bags and text[:taken] in ("", " ")}
        before = b" \n" if put else b""
        for i, ids in zip(rest, _encode(old, [put + text[taken:] for text in rest.values()]), strict=True):
            start = next((n for n in range(len(before) + 1) if old.decode_bytes(ids[:n]) == before), len(ids))
            if old.decode_bytes(ids[start:]) == tokens[i]:
                bags[i] = ids[start:]
    one_byte = {token: i for i, token in old.token_bytes.items() if len(token) == 1}
    ranks = old.ranks or one_byte
    left = {i: token for i, token in tokens.items() if i not in bags and not set(token) & set(old.missing_bytes)}
    return bags | {i: [ranks[part] for part in merge(token, ranks)] for i, token in left.items()}


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterable[list[int]]:
    """Encodes many short texts. tiktoken is faster one by one than in batches."""
    return tokenizer.library.encode_ordinary_batch(texts) if tokenizer.library else map(tokenizer.encode, texts)
