"""Cached keys and values of earlier tokens: the next token then costs the work of one token."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """A static cache with space for `length` tokens per row. Column p belongs to the token at position p.

    Rows may have different lengths. `used` is the length of the longest; columns past the end of a shorter row are
    masked.
    """

    def __init__(self, length: int):
        self.length = length
        self.used = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, (B, H_kv, length, D) each
        self._columns: Tensor | int = 0  # of the current tokens: the first one, or all (B, T)

    def advance(self, tokens: int, positions: Tensor | None, device: torch.device, window: int = 0) -> Tensor | None:
        """Reserves columns for the next `tokens` of each row: the next free ones, or those at `positions` (B, T).

        Returns the attention mask (B or 1, 1, T, used), bool: a token attends to itself and to earlier columns, to
        `window` in all if that is not 0. Returns None if plain causal attention does this. Raises ValueError if the
        cache is full.
        """
        if self.used + tokens > self.length:
            raise ValueError(f"{tokens} tokens after {self.used}, but the cache has space for {self.length}")
        start, self.used = self.used, self.used + tokens
        self._columns = start if positions is None else positions
        if positions is None:
            if (tokens == 1 or start == 0) and not 0 < window < self.used:
                return None
            positions = torch.arange(start, self.used, device=device)[None]
        columns, queries = torch.arange(self.used, device=device), positions[:, None, :, None]
        mask = columns <= queries
        return mask & (columns > queries - window) if window else mask

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values (B, H_kv, T, D) of the current tokens; returns those of all used columns."""
        if layer not in self._layers:
            shape = (*k.shape[:2], self.length, k.size(3))
            self._layers[layer] = k.new_zeros(shape), v.new_zeros(shape)  # not empty: a masked NaN is still a NaN
        for stored, new in zip(self._layers[layer], (k, v), strict=True):
            if isinstance(self._columns, int):
                stored[:, :, self._columns : self.used] = new
            else:
                stored.scatter_(2, self._columns[:, None, :, None].expand_as(new), new)
        keys, values = self._layers[layer]
        return keys[:, :, : self.used], values[:, :, : self.used]

    def truncate(self, used: int) -> None:
        """Forgets the tokens from position `used` on. All rows must be at least that long."""
        self.used = used

    def reserve(self, length: int) -> None:
        """Makes space for at least `length` tokens per row, and keeps what is stored."""
        if length <= self.length:
            return
        for layer, stored in self._layers.items():
            k, v = (t.new_zeros(*t.shape[:2], length, t.size(3)) for t in stored)
            for new, old in zip((k, v), stored, strict=True):
                new[:, :, : old.size(2)] = old
            self._layers[layer] = k, v
        self.length = length

    def repeat(self, times: int) -> None:
        """Repeats every row `times` times, so that a prompt is processed once for all its continuations."""
        for layer, (k, v) in self._layers.items():
            self._layers[layer] = k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)

    def keep(self, rows: list[int], used: int) -> None:
        """Drops all other rows. The longest of the kept `rows` has `used` tokens."""
        for layer, (k, v) in self._layers.items():
            self._layers[layer] = k[rows], v[rows]
        self.used = used
