"""Step → batch, as a pure function.

The shards are one long stream of tokens, cut into windows of T + 1 that overlap by one token (the
last target of a window is the first input of the next). Sample number k of a run, counted over all
steps and ranks, is window π(k mod W) of epoch k // W, where W is the number of windows and π a
permutation drawn from (seed, epoch). So the place in the data is one integer, the step: nothing to
save, and any number of ranks sees the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfg.errors import UserError
from data.shards import Shard, open_file

FEISTEL_ROUNDS = 6
MAX_OPEN_FILES = 64
FINGERPRINT_TOKENS = 4096


def _mix(x: np.ndarray) -> np.ndarray:
    """Stafford's variant 13 of the 64-bit finaliser, as in SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by `key`, takes `index` (any shape, uint64).

    A Feistel network on the smallest even number of bits that holds n, repeated on what falls outside
    ("cycle walking", Black and Rogaway 2002): a bijection computed point by point, so an epoch of any
    size takes no memory.
    """
    digest = hashlib.shake_128(key.encode()).digest(8 * FEISTEL_ROUNDS)
    round_keys = np.frombuffer(digest, "<u8")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for k in round_keys:
            left, right = right, left ^ (_mix(right + k) & mask)
        return (left << half) | right

    x = np.atleast_1d(np.asarray(index, np.uint64))
    with np.errstate(over="ignore"):
        x = encrypt(x)
        while (outside := x >= n).any():
            x[outside] = encrypt(x[outside])
    return x.reshape(np.shape(index))


class TokenStream:
    """Shards end to end. Reads go through a bounded set of open files."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.ends = list(accumulate(s.count for s in shards))
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1]

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fills `out` (n,) with the tokens from `start` on, across shard boundaries."""
        i, filled = bisect_right(self.ends, start), 0
        while filled < len(out):
            begin = self.ends[i] - self.shards[i].count
            length = min(len(out) - filled, self.ends[i] - start)
            if length:
                tokens = self.shards[i].read(start - begin, length, self._fd(i))
                self.shards[i].check(tokens, start - begin)
                out[filled : filled + length] = tokens
            filled, start, i = filled + length, start + length, i + 1

    def _fd(self, i: int) -> int:
        if i not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[i] = open_file(self.shards[i].path)
        self._open.move_to_end(i)
        return self._open[i]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, token count and a hash of both ends of each shard: enough to notice another file."""
        rows = []
        for shard in self.shards:
            n = min(shard.count, FINGERPRINT_TOKENS)
            ends = shard.read(0, n).tobytes() + shard.read(shard.count - n, n).tobytes()
            rows.append({"name": shard.path.name, "tokens": shard.count, "ends": hashlib.sha256(ends).hexdigest()[:16]})
        return rows


class Loader:
    """`batch(step)` for training, `gather(windows)` for evaluation. Steps count from 1."""

    def __init__(
        self, shards: list[Shard], sequence_length: int, sequences_per_batch: int, seed: int, shuffle: bool, flag: str
    ):
        self.stream = TokenStream(shards)
        self.sequence_length, self.sequences_per_batch = sequence_length, sequences_per_batch
        self.seed, self.shuffle = seed, shuffle
        self.windows = max(0, len(self.stream) - 1) // sequence_length
        if self.windows < sequences_per_batch:
            need = sequences_per_batch * sequence_length + 1
            raise UserError(
                f"--{flag} holds {len(self.stream)} tokens, too few for one batch of {need};"
                f" lower --total_batch_size or --sequence_length, or add data"
            )
        # What decides which tokens a step sees: kept in the checkpoint and compared on resume. Taken now, since
        # it describes the files that are read, not what may stand in their place when the run ends.
        self.identity = {
            "seed": seed,
            "sequence_length": sequence_length,
            "total_batch_size": sequences_per_batch * sequence_length,
            "shuffle": shuffle,
            "shards": self.stream.fingerprint(),
        }

    def sample_ids(self, step: int) -> list[tuple[int, int]]:
        """(epoch, window) of each sequence of the global batch of `step`, in order."""
        first = (step - 1) * self.sequences_per_batch
        samples = np.arange(first, first + self.sequences_per_batch, dtype=np.uint64)
        epochs, places = samples // np.uint64(self.windows), samples % np.uint64(self.windows)
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                places[here] = permute(places[here], self.windows, f"{self.seed}:{epoch}")
        return list(zip(epochs.tolist(), places.tolist(), strict=True))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Rows of the global batch of `step`, (sequences_per_batch / parts, T + 1) int32: the `part`-th of `parts`.

        Inputs are [:, :-1], targets [:, 1:].
        """
        size = self.sequences_per_batch // parts
        return self.gather([window for _, window in self.sample_ids(step)[part * size : (part + 1) * size]])

    def gather(self, windows: list[int]) -> Tensor:
        """The windows of these numbers, which count in file order, (len(windows), T + 1) int32."""
        rows = np.empty((len(windows), self.sequence_length + 1), np.int32)
        for row, window in zip(rows, windows, strict=True):
            self.stream.read_into(row, window * self.sequence_length)
        return torch.from_numpy(rows)


_WAY_OUT = "restore the shards, or start a new run in another --output_dir"


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError naming the flag or the shard if a resumed run would see other tokens than its checkpoint."""
    for flag in ("seed", "sequence_length", "total_batch_size", "shuffle"):
        if saved[flag] != now[flag]:
            raise UserError(
                f"--{flag}={now[flag]}, but the checkpoint was trained with {saved[flag]}, and the order of the data"
                f" depends on it; set it back, or start a new run in another --output_dir"
            )
    for old, new in zip(saved["shards"], now["shards"], strict=False):
        if old["name"] != new["name"]:
            raise UserError(
                f"--input_train_bin: the checkpoint has {old['name']} where there is now {new['name']}; {_WAY_OUT}"
            )
        if old != new:
            raise UserError(
                f"--input_train_bin: {new['name']} is not the file the checkpoint was trained on; {_WAY_OUT}"
            )
    if len(saved["shards"]) != len(now["shards"]):
        longer = max(saved["shards"], now["shards"], key=len)
        odd = longer[min(len(saved["shards"]), len(now["shards"]))]["name"]
        what = "is missing" if longer is saved["shards"] else "is new"
        raise UserError(f"--input_train_bin: {odd} {what} since the checkpoint was written; {_WAY_OUT}")


class Prefetcher:
    """Makes the next step's batch in a thread while this step's is in use."""

    def __init__(self, make: Callable[[int], Tensor], pin: bool):
        self._make = (lambda step: make(step).pin_memory()) if pin else make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def get(self, step: int) -> Tensor:
        # One worker, and every read is its own: the stream's open files need no lock.
        ahead = self._ahead
        future = ahead[1] if ahead is not None and ahead[0] == step else self._pool.submit(self._make, step)
        batch = future.result()
        self._ahead = (step + 1, self._pool.submit(self._make, step + 1))
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
