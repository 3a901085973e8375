"""A loader of several sets of shards, mixed by weight: `--input_train_bin 'web=0.7:GLOB,code=0.3:GLOB'`.

Sample number k of a run belongs to the source in slot k mod SLOTS of a fixed pattern. Within the source it is
sample number j, where j is the number of the source's slots before it. Both come from a table, so a batch is a pure
function of (seed, step). Each source has its own epochs, whose order is chosen by (seed, name, epoch): it does not
depend on the other sources or on the weights.
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
    """Parses the sources of a mixture, sorted by name. Returns [] if `text` is a single glob or an existing file."""
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
            raise UserError(f"--{flag}: two sources are named {name}; rename one")
        sources[name] = Source(name, weight, os.path.expanduser(text[prefix.end() : end].strip()))
    return sorted(sources.values())


def slot_counts(weights: list[float]) -> list[int]:
    """Divides SLOTS by weight: each share is rounded down, and the largest remainders get the slots that are left."""
    total = math.fsum(w / max(weights) for w in weights)
    exact = [SLOTS * (w / max(weights)) / total for w in weights]
    counts = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda m: counts[m] - exact[m])
    for m in by_remainder[: SLOTS - sum(counts)]:
        counts[m] += 1
    return counts


def spread(counts: list[int]) -> np.ndarray:
    """Returns the source of each slot, (sum(counts),) int64: source m has counts[m] slots, spread evenly.

    In every prefix of t slots, the number of a source's slots differs from t * counts[m] / sum(counts) by less than 1.
    This is P-fairness (Baruah, Cohen, Plaxton and Varvel 1996): among the sources whose next window has started, the
    slot goes to the one with the earliest deadline.
    """
    total, used = sum(counts), [0] * len(counts)
    slots = np.empty(total, np.int64)
    for t in range(total):
        ready = [m for m, count in enumerate(counts) if used[m] * total < (t + 1) * count]
        slots[t] = first = min(ready, key=lambda m: -(-(used[m] + 1) * total // counts[m]))
        used[first] += 1
    return slots


class MixedLoader:
    """A loader of several sources mixed by weight, with the methods that training needs of a Loader."""

    def __init__(
        self,
        sources: list[Source],
        shards: list[list[Shard]],
        sequence_length: int,
        sequences_per_batch: int,
        seed: int,
        shuffle: bool,
        flag: str,
        masks: list[list[Shard] | None] | None = None,
    ):
        self.sources, self.sequence_length, self.sequences_per_batch = sources, sequence_length, sequences_per_batch
        self.counts = np.array(slot_counts([source.weight for source in sources]))
        self.loaders = []
        masks = masks or [None] * len(sources)
        for source, count, its_shards, its_masks in zip(sources, self.counts, shards, masks, strict=True):
            tokens = sum(shard.count for shard in its_shards)
            if tokens <= sequence_length:
                raise UserError(
                    f"--{flag}: source {source.name} has {tokens} tokens, too few for one window of"
                    f" {sequence_length + 1}; lower --sequence_length, or add data"
                )
            if not count:
                raise UserError(
                    f"--{flag}: the weight of {source.name} is less than one sample in {SLOTS:,}; raise it or remove"
                    f" the source"
                )
            loader = Loader(its_shards, sequence_length, 1, seed, shuffle, flag, source.name, its_masks)
            self.loaders.append(loader)
        self.slots = spread(self.counts.tolist())
        self.before = np.empty(SLOTS, np.int64)  # the number of the source's earlier slots
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

    @property
    def has_masks(self) -> bool:
        return any(loader.has_masks for loader in self.loaders)

    def counted_tokens(self) -> int:
        """Returns the number of tokens of all sources that are counted as targets. Reads all masks."""
        return sum(loader.counted_tokens() for loader in self.loaders)

    @property
    def windows(self) -> int:
        """The number of windows of all sources together."""
        return sum(loader.windows for loader in self.loaders)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each sample and its number within the source, both (n,) int64."""
        rounds, slots = np.divmod(samples, SLOTS)
        source = self.slots[slots]
        return source, rounds * self.counts[source] + self.before[slots]

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Returns part `part` of `parts` of step's global batch, (sequences_per_batch / parts, T + 1) int32."""
        source, number = self.locate(sample_numbers(step, self.sequences_per_batch, part, parts))
        rows = np.empty((len(source), self.sequence_length + 1), np.int32)
        for m, loader in enumerate(self.loaders):
            rows[source == m] = loader.samples(number[source == m])
        return torch.from_numpy(rows)

    def mask(self, step: int, part: int = 0, parts: int = 1) -> Tensor | None:
        """Returns which tokens of `batch(step, part, parts)` are counted as targets, (…, T + 1) bool. None: all.

        All tokens of a source without masks are counted.
        """
        if not self.has_masks:
            return None
        source, number = self.locate(sample_numbers(step, self.sequences_per_batch, part, parts))
        rows = np.empty((len(source), self.sequence_length + 1), bool)
        for m, loader in enumerate(self.loaders):
            rows[source == m] = loader.sample_masks(number[source == m])
        return torch.from_numpy(rows)

    def describe(self, num_iterations: int) -> str:
        """Returns a line per source: its share, its tokens and its epochs in a run."""
        samples = num_iterations * self.sequences_per_batch
        lines = []
        for source, count, loader in zip(self.sources, self.counts.tolist(), self.loaders, strict=True):
            epochs = samples * count / SLOTS / loader.windows
            lines.append(
                f"{source.name}: {count / SLOTS:.2%} of the samples, {len(loader.stream):,} tokens, {epochs:.3g} epochs"
            )
        return "\n".join(lines)
