"""A pseudo-random permutation of range(n), computed index by index: the order of the samples in an epoch."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

FEISTEL_ROUNDS = 6
BLOCK = 2**14  # indices permuted at once, to spread the cost of a numpy call


def _mix(x: np.ndarray) -> np.ndarray:
    """Mixes the bits of `x` in place: Stafford's variant 13 of SplitMix64's finaliser (Steele et al. 2014)."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """Applies the permutation of range(n) that belongs to `key` to `index` (any shape, uint64).

    A Feistel network on the smallest even number of bits that holds n. Results of n or more are encrypted again until
    they are below n ("cycle walking", Black and Rogaway 2002). Each index is computed alone, so an epoch of any size
    takes no memory.
    """
    digest = hashlib.shake_128(key.encode()).digest(8 * FEISTEL_ROUNDS)
    round_keys = np.frombuffer(digest, "<u8")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for k in round_keys:
            mixed = _mix(right + k)
            mixed &= mask
            mixed ^= left
            left, right = right, mixed
        return (left << half) | right

    x = np.asarray(index, np.uint64).reshape(-1)
    with np.errstate(over="ignore"):
        x = encrypt(x)
        outside = np.flatnonzero(x >= n)
        while len(outside):
            x[outside] = walked = encrypt(x[outside])
            outside = outside[walked >= n]
    return x.reshape(np.shape(index))


@lru_cache(maxsize=32)
def permuted_block(n: int, key: str, block: int) -> np.ndarray:
    """Returns permute(i, n, key) of the BLOCK indices i of block number `block`, int64. The last block is shorter."""
    start = block * BLOCK
    return permute(np.arange(start, min(start + BLOCK, n), dtype=np.uint64), n, key).astype(np.int64)
