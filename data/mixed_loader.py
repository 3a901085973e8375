"""Several sets of shards, mixed by weight: `--input_train_bin 'web=0.7:GLOB,code=0.3:GLOB'`.

Sample number k of a run belongs to the source in slot k mod SLOTS of a fixed pattern, and is the j-th
sample of that source, where j is the number of its slots up to there. Both are looked up in a table, so
a batch stays a pure function of (seed, step). A source goes through its own windows in its own epochs,
each in an order drawn from (seed, name, epoch): what the others hold or weigh changes nothing in it.
"""

from __future__ import annotations

import math
import os
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.loader import Loader, sample_numbers
from data.shards import Shard
from util.errors import UserError

SLOTS = 10_000  # weights are rounded to ten-thousandths
PREFIX = re.compile(r"(?:^|,)\s*([\w.-]+)=([^,:/]*):")  # name=weight: at the start and after commas


class Source(NamedTuple):
    name: str
    weight: float
    pattern: str  # the glob of its shards


def parse_sources(text: str, flag: str) -> list[Source]:
    """The sources of a mixture, in name order; none if `text` is one glob, or the name of a file.

    Raises UserError for a weight that is no positive number and for a name that comes twice.
    """
    prefixes = list(PREFIX.finditer(text))
    if not prefixes or prefixes[0].start() > 0 or os.path.isfile(text):
        return []
    sources: dict[str, Source] = {}
    ends = [p.start() for p in prefixes[1:]] + [len(text)]
    for prefix, end in zip(prefixes, ends, strict=True):
        name, number = prefix.groups()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"--{flag}: the weight of {name} is {number!r}; it must be a number above 0")
        if name in sources:
            raise UserError(f"--{flag}: there are two sources called {name}; rename one")
        sources[name] = Source(name, weight, os.path.expanduser(text[prefix.end() : end].strip()))
    return sorted(sources.values())


def slot_counts(weights: list[float]) -> list[int]:
    """How many of SLOTS each weight gets: its share rounded down, and what is left to the largest remainders."""
    total = math.fsum(w / max(weights) for w in weights)
    exact = [SLOTS * (w / max(weights)) / total for w in weights]
    counts = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda m: counts[m] - exact[m])
    for m in by_remainder[: SLOTS - sum(counts)]:
        counts[m] += 1
    return counts


def spread(counts: list[int]) -> np.ndarray:
    """A row of sum(counts) slots in which source m has counts[m], laid out evenly, (sum(counts),) int64.

    In every prefix of t slots a source has less than one more or less than t · counts[m] / sum(counts).
    A slot goes to the source whose next turn is due first, among those whose turn has begun: earliest
    deadline first on the windows of P-fairness (Baruah, Cohen, Plaxton and Varvel 1996), which misses none.
    """
    total, taken = sum(counts), [0] * len(counts)
    slots = np.empty(total, np.int64)
    for t in range(total):
        begun = [m for m, count in enumerate(counts) if taken[m] * total < (t + 1) * count]
        slots[t] = first = min(begun, key=lambda m: -(-(taken[m] + 1) * total // counts[m]))
        taken[first] += 1
    return slots


class MixedLoader:
    """A loader of several sources, drawn by weight: `batch` and `fingerprint` as data.loader.Loader has them."""

    def __init__(
        self,
        sources: list[Source],
        shards: list[list[Shard]],
        sequence_length: int,
        sequences_per_batch: int,
        seed: int,
        shuffle: bool,
        flag: str,
    ):
        self.sources, self.sequence_length, self.sequences_per_batch = sources, sequence_length, sequences_per_batch
        self.counts = np.array(slot_counts([source.weight for source in sources]))
        self.loaders = []
        for source, count, its_shards in zip(sources, self.counts, shards, strict=True):
            tokens = sum(shard.count for shard in its_shards)
            if tokens <= sequence_length:
                raise UserError(
                    f"--{flag}: source {source.name} holds {tokens} tokens, too few for one window of"
                    f" {sequence_length + 1}; lower --sequence_length, or add data"
                )
            if not count:
                raise UserError(
                    f"--{flag}: the weight of {source.name} is less than one sample in {SLOTS:,}; raise it or leave"
                    f" the source out"
                )
            self.loaders.append(Loader(its_shards, sequence_length, 1, seed, shuffle, flag, source.name))
        self.slots = spread(self.counts.tolist())
        self.before = np.empty(SLOTS, np.int64)  # of the same source, in earlier slots
        for m, count in enumerate(self.counts):
            self.before[self.slots == m] = np.arange(count)
        self.fingerprint = {
            "seed": seed,
            "sequence_length": sequence_length,
            "total_batch_size": sequences_per_batch * sequence_length,
            "shuffle": shuffle,
            "sources": [
                {"name": source.name, "weight": count / SLOTS, "shards": loader.fingerprint["shards"]}
                for source, count, loader in zip(sources, self.counts.tolist(), self.loaders, strict=True)
            ],
        }

    @property
    def shards(self) -> list[Shard]:
        return [shard for loader in self.loaders for shard in loader.shards]

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number among that source's samples), both (n,) int64, of the run's samples of these numbers."""
        rounds, slots = np.divmod(samples, SLOTS)
        source = self.slots[slots]
        return source, rounds * self.counts[source] + self.before[slots]

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Rows of the global batch of `step`, (sequences_per_batch / parts, T + 1) int32: the `part`-th of `parts`."""
        source, number = self.locate(sample_numbers(step, self.sequences_per_batch, part, parts))
        rows = np.empty((len(source), self.sequence_length + 1), np.int32)
        for m, loader in enumerate(self.loaders):
            rows[source == m] = loader.samples(number[source == m])
        return torch.from_numpy(rows)

    def describe(self, num_iterations: int) -> str:
        """A line per source: its share, its tokens, and how often a run goes through them."""
        samples = num_iterations * self.sequences_per_batch
        lines = []
        for source, count, loader in zip(self.sources, self.counts.tolist(), self.loaders, strict=True):
            epochs = samples * count / SLOTS / loader.windows
            lines.append(
                f"{source.name}: {count / SLOTS:.2%} of the samples, {len(loader.stream):,} tokens, {epochs:.3g} epochs"
            )
        return "\n".join(lines)
