"""Packing of conversations into blocks of a fixed number of tokens, without cutting any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUFFER = 4096  # conversations that are packed together


def pack(lengths: Sequence[int], size: int, buffer: int = BUFFER) -> list[list[int]]:
    """Returns blocks, each a list of indices into `lengths`, whose lengths add up to `size` at most.

    First-fit decreasing: of `buffer` conversations at a time, the longest first, each goes into the first block with
    room for it. No length may exceed `size`.
    """
    blocks: list[list[int]] = []
    for start in range(0, len(lengths), buffer):
        some = range(start, min(start + buffer, len(lengths)))
        room = np.full(len(some), size)  # of blocks begun in this round
        begun: list[list[int]] = []
        for i in sorted(some, key=lambda i: (-lengths[i], i)):
            block = int(np.argmax(room >= lengths[i]))
            if block == len(begun):
                begun.append([])
            begun[block].append(i)
            room[block] -= lengths[i]
        blocks += begun
    return blocks
