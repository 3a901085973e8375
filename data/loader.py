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
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.shards import Shard, open_file
from util.errors import UserError, quote

FEISTEL_ROUNDS = 6
PERMUTED_BLOCK = 2**14  # places permuted at once: numpy's cost per call is then small beside that per place
MAX_OPEN_FILES = 64
FINGERPRINT_TOKENS = 4096


def _mix(x: np.ndarray) -> np.ndarray:
    """Stafford's variant 13 of the 64-bit finaliser, as in SplitMix64 (Steele et al. 2014). Works in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
def _permuted_block(n: int, key: str, block: int) -> np.ndarray:
    """Where `permute` takes the places of range(n) that make up the `block`-th block; the last one is shorter."""
    start = block * PERMUTED_BLOCK
    return permute(np.arange(start, min(start + PERMUTED_BLOCK, n), dtype=np.uint64), n, key).astype(np.int64)


class TokenStream:
    """Shards end to end. Reads go through a bounded set of open files."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.ends = list(accumulate(s.count for s in shards))
        self._ends = np.array(self.ends)
        # A token's place in its file, in bytes, is its place in the stream times the item size plus this.
        starts = self._ends - [s.count for s in shards]
        self._itemsizes = np.array([s.dtype.itemsize for s in shards])
        self._offsets = np.array([s.offset for s in shards]) - starts * self._itemsizes
        self._vocab_size = min(s.vocab_size for s in shards)
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

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` (n,) on, (n, length) int32.

        The kernel copies each window into its row of one array, which is checked and converted as a whole:
        Python's cost per window is that of the system call.
        """
        out = np.empty((len(starts), length), np.int32)
        shard = np.searchsorted(self._ends, starts, side="right")
        whole = starts + length <= self._ends[shard]
        for row in np.flatnonzero(~whole).tolist():
            self.read_into(out[row], int(starts[row]))
        for itemsize in np.unique(self._itemsizes):
            rows = np.flatnonzero(whole & (self._itemsizes[shard] == itemsize))
            rows = rows[np.argsort(starts[rows])]  # in file order: each file is opened once a batch, if at all
            if len(rows):
                out[rows] = self._read_rows(starts[rows], length, shard[rows])
        return out

    def _read_rows(self, starts: np.ndarray, length: int, shard: np.ndarray) -> np.ndarray:
        """Windows that lie within the shards of these numbers, all of one dtype, (n, length) of it, checked."""
        raw = np.empty((len(starts), length), self.shards[shard[0]].dtype)
        places = (starts * raw.itemsize + self._offsets[shard]).tolist()
        size, opened, fd = length * raw.itemsize, -1, -1
        for row, place, i in zip(raw, places, shard.tolist(), strict=True):
            if i != opened:
                opened, fd = i, self._fd(i)
            if os.preadv(fd, (row,), place) != size:  # a short read: goes on, or says that the file has become shorter
                row[:] = self.shards[i].read((place - self.shards[i].offset) // raw.itemsize, length, fd)
        if int(raw.max()) >= self._vocab_size:
            for row, place, i in zip(raw, places, shard.tolist(), strict=True):
                self.shards[i].check(row, (place - self.shards[i].offset) // raw.itemsize)
        return raw

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


def sample_numbers(step: int, sequences_per_batch: int, part: int, parts: int) -> np.ndarray:
    """Numbers of the samples in the `part`-th of `parts` of the global batch of `step`, counted over the run."""
    size = sequences_per_batch // parts
    return (step - 1) * sequences_per_batch + part * size + np.arange(size)


class Loader:
    """`batch(step)` for training, `gather(windows)` for evaluation. Steps count from 1."""

    def __init__(
        self,
        shards: list[Shard],
        sequence_length: int,
        sequences_per_batch: int,
        seed: int,
        shuffle: bool,
        flag: str,
        name: str = "",
    ):
        self.key = f"{seed}:{name}" if name else str(seed)  # sources of one name have one order
        self.stream = TokenStream(shards)
        self.sequence_length, self.sequences_per_batch = sequence_length, sequences_per_batch
        self.shuffle = shuffle
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

    @property
    def shards(self) -> list[Shard]:
        return self.stream.shards

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, windows), both (n,) int64, of the samples of these numbers, counted from 0 over the run."""
        epochs, places = np.divmod(samples, self.windows)
        if self.shuffle:
            blocks_per_epoch = -(-self.windows // PERMUTED_BLOCK)
            blocks = epochs * blocks_per_epoch + places // PERMUTED_BLOCK
            for which in np.unique(blocks).tolist():
                epoch, block = divmod(which, blocks_per_epoch)
                here = blocks == which
                permuted = _permuted_block(self.windows, f"{self.key}:{epoch}", block)
                places[here] = permuted[places[here] % PERMUTED_BLOCK]
        return epochs, places

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """The samples of these numbers, (n, T + 1) int32."""
        return self.stream.read_windows(self.locate(numbers)[1] * self.sequence_length, self.sequence_length + 1)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Rows of the global batch of `step`, (sequences_per_batch / parts, T + 1) int32: the `part`-th of `parts`.

        Inputs are [:, :-1], targets [:, 1:].
        """
        return torch.from_numpy(self.samples(sample_numbers(step, self.sequences_per_batch, part, parts)))

    def gather(self, windows: list[int]) -> Tensor:
        """The windows of these numbers, which count in file order, (len(windows), T + 1) int32."""
        starts = np.array(windows, np.int64) * self.sequence_length
        return torch.from_numpy(self.stream.read_windows(starts, self.sequence_length + 1))


ORDER = ("seed", "sequence_length", "total_batch_size", "shuffle")  # flags that decide it, beside the shards
_WAY_OUT = "restore the shards, or start a new run in another --output_dir"


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError naming the flag, source or shard if a resumed run would see other tokens than its checkpoint."""
    if not _is_identity(saved):
        raise UserError(f"what the checkpoint says of its data is damaged; {_WAY_OUT}")
    for flag in ORDER:
        if saved[flag] != now[flag]:
            raise UserError(
                f"--{flag}={now[flag]}, but the checkpoint was trained with {quote(saved[flag])}, and the order of the"
                f" data depends on it; set it back, or start a new run in another --output_dir"
            )
    old, new = (_sources(identity) for identity in (saved, now))
    for name in sorted(old.keys() ^ new.keys()):
        what = f"source {quote(name)}" if name else "a single glob without name=weight:"
        when = (
            "belongs to the checkpoint and is missing now" if name in old else "is new since the checkpoint was written"
        )
        raise UserError(f"--input_train_bin: {what} {when}; set it back, or start a new run in another --output_dir")
    for name in old:
        if old[name]["weight"] != new[name]["weight"]:
            raise UserError(
                f"--input_train_bin: source {name} has a share of {new[name]['weight']}, but the checkpoint was trained"
                f" with {quote(old[name]['weight'])}; set it back, or start a new run in another --output_dir"
            )
        _check_same_shards(old[name]["shards"], new[name]["shards"], f"source {name}: " if name else "")


def _is_identity(saved: dict[str, Any]) -> bool:
    """Whether it is made as that of a loader is."""
    sources = saved.get("sources") or [{"name": "", "weight": 1, "shards": saved.get("shards")}]
    if not set(ORDER) <= saved.keys() or not isinstance(sources, list):
        return False
    for source in sources:
        if not isinstance(source, dict) or not isinstance(source.get("name"), str) or "weight" not in source:
            return False
        rows = source.get("shards")
        if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("name"), str) for r in rows):
            return False
    return True


def _sources(identity: dict[str, Any]) -> dict[str, Any]:
    """The sources by name; what is one glob counts as one without a name."""
    sources = identity.get("sources") or [{"name": "", "weight": 1, "shards": identity["shards"]}]
    return {source["name"]: source for source in sources}


def _check_same_shards(saved: list[dict[str, Any]], now: list[dict[str, Any]], where: str) -> None:
    for old, new in zip(saved, now, strict=False):
        if old["name"] != new["name"]:
            raise UserError(
                f"--input_train_bin: {where}the checkpoint has {quote(old['name'])} where there is now {new['name']};"
                f" {_WAY_OUT}"
            )
        if old != new:
            raise UserError(
                f"--input_train_bin: {where}{new['name']} is not the file the checkpoint was trained on; {_WAY_OUT}"
            )
    if len(saved) != len(now):
        longer = max(saved, now, key=len)
        odd = longer[min(len(saved), len(now))]["name"]
        what = "is missing" if longer is saved else "is new"
        raise UserError(f"--input_train_bin: {where}{quote(odd)} {what} since the checkpoint was written; {_WAY_OUT}")


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
