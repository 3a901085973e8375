"""Keys and values of the tokens that a model has seen, so that the next one costs one token's work."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """A static cache: room for `length` tokens a row, column p of which belongs to the token at position p.

    Rows may differ in length: `used` is that of the longest, and what lies beyond a shorter row's own tokens is
    masked until they get there.
    """

    def __init__(self, length: int):
        self.length = length
        self.used = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, (B, H_kv, length, D) each
        self._columns: Tensor | int = 0  # where the tokens at hand go: from here on, or (B, T) to these

    def advance(self, tokens: int, positions: Tensor | None, device: torch.device, window: int = 0) -> Tensor | None:
        """Makes room for the next `tokens` of each row: at the `used` next positions, or at `positions` (B, T).

        Returns who sees whom, (B or 1, 1, T, used) bool: itself and the columns before, with a `window` as many as
        that in all; None where causal attention says the same. Raises ValueError if the cache is full.
        """
        if self.used + tokens > self.length:
            raise ValueError(f"{tokens} tokens after {self.used}, but the cache has room for {self.length}")
        start, self.used = self.used, self.used + tokens
        self._columns = start if positions is None else positions
        if positions is None:
            if (tokens == 1 or start == 0) and not 0 < window < self.used:
                return None
            positions = torch.arange(start, self.used, device=device)[None]
        columns, queries = torch.arange(self.used, device=device), positions[:, None, :, None]
        seen = columns <= queries
        return seen & (columns > queries - window) if window else seen

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps a layer's keys and values (B, H_kv, T, D) of the tokens at hand; returns those of all in use."""
        if layer not in self._layers:
            shape = (*k.shape[:2], self.length, k.size(3))
            self._layers[layer] = k.new_zeros(shape), v.new_zeros(shape)  # not empty: a masked NaN is still a NaN
        for room, new in zip(self._layers[layer], (k, v), strict=True):
            if isinstance(self._columns, int):
                room[:, :, self._columns : self.used] = new
            else:
                room.scatter_(2, self._columns[:, None, :, None].expand_as(new), new)
        keys, values = self._layers[layer]
        return keys[:, :, : self.used], values[:, :, : self.used]

    def repeat(self, times: int) -> None:
        """Every row becomes `times` rows: a prompt is read once for all its continuations."""
        for layer, (k, v) in self._layers.items():
            self._layers[layer] = k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)

    def keep(self, rows: list[int], used: int) -> None:
        """Only these rows stay, the longest of which has `used` tokens."""
        for layer, (k, v) in self._layers.items():
            self._layers[layer] = k[rows], v[rows]
        self.used = used
