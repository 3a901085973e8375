"""The loader: a pure function from step to batch.

The shards are one stream of tokens, cut into windows of T + 1 that overlap by one token: the last target of a window is
the first input of the next. Sample number k of a run, counted over all steps and ranks, is window π(k mod W) of epoch
k // W, where W is the number of windows and π a permutation chosen by (seed, epoch). The data cursor is therefore one
integer, the step: the loader has no state to save, and any number of ranks sees the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data import permutation
from data.shards import Shard, open_file
from model.loss import IGNORE_INDEX
from util.errors import UserError

if TYPE_CHECKING:
    from data.mixed_loader import MixedLoader

MAX_OPEN_FILES = 64
FINGERPRINT_TOKENS = 4096


class TokenStream:
    """A concatenation of shards. At most MAX_OPEN_FILES files are open at a time."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.ends = list(accumulate(s.count for s in shards))
        self._ends = np.array(self.ends)
        # Byte offset of a token in its file = index in the stream * item size + self._offsets[shard].
        starts = self._ends - [s.count for s in shards]
        self._itemsizes = np.array([s.dtype.itemsize for s in shards])
        self._offsets = np.array([s.offset for s in shards]) - starts * self._itemsizes
        self._vocab_size = min(s.vocab_size for s in shards)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1]

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Reads n tokens from index `start` on into `out` (n,), across shard boundaries."""
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
        """Reads the `length` tokens from each of `starts` (n,) on. Returns (n, length) int32.

        Each window is read by one system call into its row of an array, which is then checked and converted at once.
        """
        out = np.empty((len(starts), length), np.int32)
        shard = np.searchsorted(self._ends, starts, side="right")
        whole = starts + length <= self._ends[shard]
        for row in np.flatnonzero(~whole).tolist():
            self.read_into(out[row], int(starts[row]))
        for itemsize in np.unique(self._itemsizes):
            rows = np.flatnonzero(whole & (self._itemsizes[shard] == itemsize))
            rows = rows[np.argsort(starts[rows])]  # in file order, so that a batch opens each file at most once
            if len(rows):
                out[rows] = self._read_rows(starts[rows], length, shard[rows])
        return out

    def _read_rows(self, starts: np.ndarray, length: int, shard: np.ndarray) -> np.ndarray:
        """Reads and checks windows that each lie within one shard. All shards have one dtype, which is kept."""
        raw = np.empty((len(starts), length), self.shards[shard[0]].dtype)
        places = (starts * raw.itemsize + self._offsets[shard]).tolist()
        size, opened, fd = length * raw.itemsize, -1, -1
        for row, place, i in zip(raw, places, shard.tolist(), strict=True):
            if i != opened:
                opened, fd = i, self._fd(i)
            if (
                os.preadv(fd, (row,), place) != size
            ):  # a short read: Shard.read continues it, or reports a truncated file
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

    def shard_fingerprints(self) -> list[dict[str, Any]]:
        """Returns name, token count and a hash of both ends of each shard, to detect that a file was replaced."""
        rows = []
        for shard in self.shards:
            n = min(shard.count, FINGERPRINT_TOKENS)
            ends = shard.read(0, n).tobytes() + shard.read(shard.count - n, n).tobytes()
            rows.append({"name": shard.path.name, "tokens": shard.count, "ends": hashlib.sha256(ends).hexdigest()[:16]})
        return rows


def sample_numbers(step: int, sequences_per_batch: int, part: int, parts: int) -> np.ndarray:
    """Returns the numbers, counted over the run, of the samples in part `part` of `parts` of step's global batch."""
    size = sequences_per_batch // parts
    return (step - 1) * sequences_per_batch + part * size + np.arange(size)


class Loader:
    """A loader of one set of shards: `batch(step)` for training, `gather(windows)` for evaluation.

    Steps count from 1. Shards of conversations have masks, which `mask` and `gather_mask` read.
    """

    def __init__(
        self,
        shards: list[Shard],
        sequence_length: int,
        sequences_per_batch: int,
        seed: int,
        shuffle: bool,
        flag: str,
        name: str = "",
        masks: list[Shard] | None = None,
    ):
        self.key = f"{seed}:{name}" if name else str(seed)  # the name is a source of a mixture
        self.stream = TokenStream(shards)
        self.masks = TokenStream(masks) if masks is not None else None
        self.sequence_length, self.sequences_per_batch = sequence_length, sequences_per_batch
        self.shuffle = shuffle
        self.windows = max(0, len(self.stream) - 1) // sequence_length
        if self.windows < sequences_per_batch:
            need = sequences_per_batch * sequence_length + 1
            what, lower = "batch", "--total_batch_size or --sequence_length"
            if sequences_per_batch == 1:  # as in validation, which does not depend on the batch
                what, lower = "sequence", "--sequence_length"
            raise UserError(
                f"--{flag} has {len(self.stream)} tokens, too few for one {what} of {need}; lower {lower}, or add data"
            )
        # Everything that decides which tokens a step sees. Checkpoints store it, and a resume compares it. It is
        # computed now, because the files could be replaced during the run.
        rows = self.stream.shard_fingerprints()
        if self.masks is not None:
            for row, mask in zip(rows, self.masks.shard_fingerprints(), strict=True):
                row["mask_ends"] = mask["ends"]
        self.fingerprint = {
            "seed": seed,
            "sequence_length": sequence_length,
            "total_batch_size": sequences_per_batch * sequence_length,
            "shuffle": shuffle,
            "shards": rows,
        }

    @property
    def shards(self) -> list[Shard]:
        return self.stream.shards

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def counted_tokens(self) -> int:
        """Returns the number of tokens that are counted as targets. Reads all masks."""
        if self.masks is None:
            return len(self.stream)
        return sum(int(np.count_nonzero(np.fromfile(shard.path, np.uint8))) for shard in self.masks.shards)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs and windows, both (n,) int64, of the samples with these numbers."""
        epochs, places = np.divmod(samples, self.windows)
        if self.shuffle:
            blocks_per_epoch = -(-self.windows // permutation.BLOCK)
            blocks = epochs * blocks_per_epoch + places // permutation.BLOCK
            for which in np.unique(blocks).tolist():
                epoch, block = divmod(which, blocks_per_epoch)
                here = blocks == which
                permuted = permutation.permuted_block(self.windows, f"{self.key}:{epoch}", block)
                places[here] = permuted[places[here] % permutation.BLOCK]
        return epochs, places

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the samples with these numbers, (n, T + 1) int32."""
        return self.stream.read_windows(self.locate(numbers)[1] * self.sequence_length, self.sequence_length + 1)

    def sample_masks(self, numbers: np.ndarray) -> np.ndarray:
        """Returns which tokens of the samples with these numbers are counted, (n, T + 1) bool. Without masks, all."""
        return self._read_masks(self.locate(numbers)[1])

    def _read_masks(self, windows: np.ndarray) -> np.ndarray:
        if self.masks is None:
            return np.ones((len(windows), self.sequence_length + 1), bool)
        return self.masks.read_windows(windows * self.sequence_length, self.sequence_length + 1) != 0

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Returns part `part` of `parts` of step's global batch, (sequences_per_batch / parts, T + 1) int32.

        Inputs are [:, :-1], targets [:, 1:].
        """
        return torch.from_numpy(self.samples(sample_numbers(step, self.sequences_per_batch, part, parts)))

    def mask(self, step: int, part: int = 0, parts: int = 1) -> Tensor | None:
        """Returns which tokens of `batch(step, part, parts)` are counted as targets, (…, T + 1) bool. None: all."""
        if self.masks is None:
            return None
        return torch.from_numpy(self.sample_masks(sample_numbers(step, self.sequences_per_batch, part, parts)))

    def gather(self, windows: list[int]) -> Tensor:
        """Returns windows by their index in the stream, (len(windows), T + 1) int32."""
        starts = np.array(windows, np.int64) * self.sequence_length
        return torch.from_numpy(self.stream.read_windows(starts, self.sequence_length + 1))

    def gather_mask(self, windows: list[int]) -> Tensor | None:
        """Returns which tokens of `gather(windows)` are counted as targets, (…, T + 1) bool. None: all."""
        return None if self.masks is None else torch.from_numpy(self._read_masks(np.array(windows, np.int64)))


def inputs_and_targets(data: Loader | MixedLoader, step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets of part `part` of `parts` of step's global batch, (rows, T) int32 each.

    A target that is not counted is IGNORE_INDEX.
    """
    rows, mask = data.batch(step, part, parts), data.mask(step, part, parts)
    targets = rows[:, 1:] if mask is None else rows[:, 1:].where(mask[:, 1:], IGNORE_INDEX)
    return rows[:, :-1].contiguous(), targets.contiguous()  # so that pinned memory is copied to the GPU asynchronously


class Prefetcher:
    """A thread that makes the next step's batch while the current one is in use."""

    def __init__(self, make: Callable[[int], Sequence[Tensor]], pin: bool):
        self._make = (lambda step: [tensor.pin_memory() for tensor in make(step)]) if pin else make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[Sequence[Tensor]]] | None = None

    def get(self, step: int) -> Sequence[Tensor]:
        """Returns step's batch and starts to make the next one."""
        # A single thread does all reads, so the stream's open files need no lock.
        ahead = self._ahead
        future = ahead[1] if ahead is not None and ahead[0] == step else self._pool.submit(self._make, step)
        batch = future.result()
        self._ahead = (step + 1, self._pool.submit(self._make, step + 1))
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
