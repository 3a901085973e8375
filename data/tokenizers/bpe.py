"""Byte-pair merging in plain Python, to find the pair that each token is merged from. It does not encode text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T", bytes, str)


def merge(token: T, ranks: Mapping[T, float], until: int = 1) -> list[T]:
    """Merges the letters of `token`, a string or bytes, until `until` parts are left or no pair of parts is a token.

    Each step merges the adjacent pair whose concatenation has the lowest rank, the leftmost if there are several.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > until:
        rank, i = min((ranks.get(left + right, math.inf), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges(ranks: dict[T, int]) -> list[tuple[T, T]]:
    """Returns the pair that each token is merged from, in the order of ranks.

    Point 1 in data/tokenizers/hf_json.py shows that each token has only one pair, and that merging the token alone
    finds it. Tokens that merging cannot make have no pair: three or more parts are left, or a letter is not a token.
    """
    pairs: list[tuple[T, T]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1 and all(token[i : i + 1] in ranks for i in range(len(token))):
            parts = merge(token, ranks, until=2)
            if len(parts) == 2:
                pairs.append((parts[0], parts[1]))
    return pairs
