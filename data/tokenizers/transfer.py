"""From one tokenizer to another: which rows of the old embeddings each new id's row is the mean of.

Fast Vocabulary Transfer (Gee, Zugarini, Rigutini, Torroni: Fast Vocabulary Transfer for Language Model Compression,
EMNLP 2022 industry track, https://arxiv.org/abs/2402.09977): a token that both have keeps its row, and a new one gets
the mean of the rows of the tokens that the old tokenizer writes it in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from data.tokenizers.bpe import merge
from data.tokenizers.tokenizer import Tokenizer


def token_rows(old: Tokenizer, new: Tokenizer, old_size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Old ids, (n,) int64, and offsets, (new_size + 1,) int64: row i of the new embeddings is the mean of the old rows
    ids[offsets[i]:offsets[i + 1]], and where there are none, of all old rows that are a token's.

    `old_size` and `new_size` are the rows of the embeddings, at least as many as the tokenizers have ids. A token has
    the old one of the same bytes, else those that spell it; a special token has the old one of its name, the
    end-of-text token the old end-of-text token. None are left for special tokens that are new, and for ids without a
    token. Of one and the same tokenizer every row stays, without a token too.
    """
    if old.vocab_size > old_size or new.vocab_size > new_size:
        raise ValueError(f"{old.vocab_size} and {new.vocab_size} ids in {old_size} and {new_size} rows")
    if old.sha256 == new.sha256:
        bags = {i: [i] for i in range(min(old_size, new_size))}
    else:
        bags = _of_the_same_bytes(old.token_bytes, new.token_bytes)
        bags |= _spelled(old, {i: token for i, token in new.token_bytes.items() if i not in bags})
        bags |= {i: [old.special[name]] for name, i in new.special.items() if name in old.special}
        bags[new.end_of_text] = [old.end_of_text]
    offsets = np.zeros(new_size + 1, np.int64)
    np.cumsum([len(bags.get(i, ())) for i in range(new_size)], out=offsets[1:])
    return np.array([j for i in range(new_size) for j in bags.get(i, ())], np.int64), offsets


def _of_the_same_bytes(old: dict[int, bytes], new: dict[int, bytes]) -> dict[int, list[int]]:
    """Of each new id the old one of the same bytes.

    SentencePiece has some bytes twice, <0x41> and later A: the last of the one is matched with the last of the other,
    and so on back, since it is the last that text is written in.
    """
    old_ids, new_ids = _by_bytes(old), _by_bytes(new)
    return {
        i: [same[min(back, len(same) - 1)]]
        for token, ids in new_ids.items()
        if (same := old_ids.get(token))
        for back, i in enumerate(ids)
    }


def _by_bytes(token_bytes: dict[int, bytes]) -> dict[bytes, list[int]]:
    """The ids of the same bytes, the last first."""
    ids = defaultdict(list)
    for i in sorted(token_bytes, reverse=True):
        ids[token_bytes[i]].append(i)
    return ids


def _spelled(old: Tokenizer, tokens: dict[int, bytes]) -> dict[int, list[int]]:
    """Of each of the tokens the old ids that it is written in, which together are its bytes."""
    texts = {}
    for i, token in tokens.items():
        with suppress(UnicodeDecodeError):  # part of a character, say
            texts[i] = token.decode()
    bags: dict[int, list[int]] = {}
    # An encoder that puts a space before a text is given it without its own, or behind a character to cut off.
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
    return bags | {i: [ranks[part] for part in merge(t, ranks)] for i, t in tokens.items() if i not in bags}


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterable[list[int]]:
    """Ids of many short texts: by tiktoken's core one by one, which is quicker than its batches."""
    return tokenizer.library.encode_ordinary_batch(texts) if tokenizer.library else map(tokenizer.encode, texts)
