"""Byte-pair merging in plain Python: what pair each token comes from. Text is encoded by tiktoken or `tokenizers`."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T", bytes, str)


def merge(token: T, ranks: dict[T, int], until: int = 1) -> list[T]:
    """The parts that are left of `token`, a string or bytes, when no more of them make a token or `until` are left.

    Of the adjacent parts whose concatenation is a token, those of the lowest rank are merged, leftmost first.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > until:
        rank, i = min((ranks.get(left + right, math.inf), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges(ranks: dict[T, int]) -> list[tuple[T, T]]:
    """The one pair that each token is ever merged of, in the order of ranks.

    That there is only one, and that it is found in the token alone, is point 1 in data/tokenizers/hf_json.py. Tokens
    that merging never makes (three or more parts are left, or a letter of them is no token) have no pair.
    """
    pairs: list[tuple[T, T]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1 and all(token[i : i + 1] in ranks for i in range(len(token))):
            parts = merge(token, ranks, until=2)
            if len(parts) == 2:
                pairs.append((parts[0], parts[1]))
    return pairs
