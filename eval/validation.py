"""Validation during training: the loss on a fixed set of windows, as sums that can be added over ranks."""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
import torch

from data.documents import document_positions
from data.loader import Loader
from model.gpt import GPT
from model.loss import IGNORE_INDEX


def fixed_windows(available: int, wanted: int) -> list[int]:
    """Returns the numbers of `wanted` evenly spaced windows of `available` ones, or of all if there are fewer."""
    wanted = min(available, wanted)
    return [i * available // wanted for i in range(wanted)]


def windows_loss(
    model: GPT,
    loader: Loader,
    windows: list[int],
    batch_size: int,
    rounds: int,
    device: torch.device,
    token_bytes: np.ndarray | None,
    end_of_text: int | None = None,
) -> Generator[None, None, list[float]]:
    """Returns [summed loss in nats, tokens, bytes] over `windows`, in exactly `rounds` forward passes of `batch_size`.

    Of shards with masks only the counted tokens enter the three sums.
    Yields before each forward pass, after the data has been read. Missing rows are padded with rows that have no
    targets. So all passes have one shape, and all ranks make the same number of passes, which a sharded model needs.
    `token_bytes` (vocab_size,) gives the number of bytes of each token's text; without it the byte count is 0.
    `end_of_text`, if given, limits attention to documents.
    """
    padded: list[int | None] = [*windows, *[None] * (rounds * batch_size - len(windows))]
    loss_sum = tokens = count_bytes = 0.0
    for start in range(0, len(padded), batch_size):
        chosen = padded[start : start + batch_size]
        indices = [0 if w is None else w for w in chosen]
        rows, mask = loader.gather(indices).long(), loader.gather_mask(indices)
        empty = torch.tensor([w is None for w in chosen])
        targets = rows[:, 1:].masked_fill(empty[:, None], IGNORE_INDEX)
        if mask is not None:
            targets = targets.where(mask[:, 1:], IGNORE_INDEX)
        idx = rows[:, :-1].to(device)
        positions = document_positions(idx, end_of_text) if end_of_text is not None else None
        counted = targets[targets != IGNORE_INDEX]
        targets = targets.to(device)
        yield
        loss, count = model(idx, targets, positions=positions)  # not model.loss: FSDP gathers weights in __call__
        loss_sum += loss.item()
        tokens += count.item()
        if token_bytes is not None:
            count_bytes += float(token_bytes[counted.numpy()].sum())
    return [loss_sum, tokens, count_bytes]


def summarize(loss_sum: float, tokens: float, count_bytes: float) -> dict[str, float | None]:
    """Returns `val_loss` in nats per token and `val_bpb` in bits per byte of the text (None without byte counts).

    The loss is NaN if no token is counted.

    Bits per byte are comparable between tokenizers. End-of-text tokens cost bits but have no bytes.
    """
    return {
        "val_loss": loss_sum / tokens if tokens else math.nan,
        "val_bpb": loss_sum / math.log(2) / count_bytes if count_bytes else None,
    }
