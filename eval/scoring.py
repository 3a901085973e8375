"""What a model makes of given text: the loss of each ending of a context, many at a time.

All evaluation that asks "how likely is this text" comes through here. The endings of one context share one forward
of it: a row holds the context and then its endings side by side, each of which sees the context and itself (tree
attention, as in SpecInfer, Miao et al. 2024). Rows of about one length make a batch, so that hardly anything is
padding, and of the positions only those that predict an ending meet the output head.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Request:
    """Token ids of a context, one at least, and of endings that are to be scored after it."""

    context: list[int]
    endings: list[list[int]]


@dataclass(frozen=True)
class Score:
    """Of an ending: its loss in nats, summed over its tokens, and whether each was the likeliest where it stands."""

    loss: float
    greedy: bool


@dataclass(frozen=True)
class Row:
    """What goes through the model together: a request, or as much of it as the model can see at once."""

    context: list[int]
    endings: list[list[int]]
    owners: list[tuple[int, int, int]]  # of each ending: its request, its number there, its first token's place in it

    @property
    def length(self) -> int:
        return len(self.context) - 1 + sum(map(len, self.endings))


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, (B, T) but for the mask, (B, 1, T, T), which is None where causal attention says the same."""

    idx: Tensor
    targets: Tensor  # IGNORE_INDEX where nothing is predicted
    positions: Tensor | None
    mask: Tensor | None


Encode = Callable[[str], list[int]]
Piece = tuple[int, int, int, float, bool]  # an owner, its loss, whether it is greedy
# Losses (N,) of a batch's targets, row by row, and whether each is the likeliest token: `GPT.forward(each=True)`.
Forward = Callable[[Batch], tuple[Tensor, Tensor]]


def gpt_forward(model: Callable[..., Any]) -> Forward:
    return lambda batch: model(batch.idx, batch.targets, positions=batch.positions, mask=batch.mask, each=True)


def rows_of(number: int, request: Request, limit: int, shared: bool) -> Iterator[Row]:
    """One row, or one for each ending if not `shared` or if the model's `limit` of positions is too small for that.

    An ending of its own sees as much of the text before it as the model does at once: the last `limit` + 1 tokens of
    the whole, the last of which is only predicted (as in lm-evaluation-harness). One longer than the limit is cut
    into pieces.
    """
    context, endings = request.context, request.endings
    if not context or not all(endings):
        raise ValueError(f"request {number} has an empty context or ending")
    if shared and len(context) - 1 + max(map(len, endings)) <= limit:
        yield Row(context, endings, [(number, i, 0) for i in range(len(endings))])
        return
    for i, ending in enumerate(endings):
        text, start = context + ending, len(context)
        for first in range(start, len(text), limit):
            end = min(first + limit, len(text))
            yield Row(text[max(0, end - limit - 1) : first], [text[first:end]], [(number, i, first - start)])


def plan(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Batches of rows of about one length, longest first, each padded to at most `batch_tokens` (or of one row).

    Longest first, so that what does not fit into memory shows at once. A function of the rows alone: on any number
    of ranks the same rows share a batch, and their numbers are the same to the last bit.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (-row.length, row.owners[0])):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].length > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def pack(rows: list[Row], device: torch.device) -> Batch:
    """Tensors of rows: the context without its last token, then for each ending that token and all but its own last.

    So every position has one token to predict. Positions count on from the context in each ending.
    """
    shape = len(rows), max(row.length for row in rows)
    idx, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE_INDEX, np.int64)
    branch = np.full(shape, -1)  # 0 the context, then 1, 2, ... its endings; what pads a row sees itself
    for b, row in enumerate(rows):
        at = len(row.context) - 1
        idx[b, :at], positions[b, :at], branch[b, :at] = row.context[:-1], range(at), 0
        for i, ending in enumerate(row.endings, 1):
            here = slice(at, at + len(ending))
            idx[b, here], targets[b, here] = [row.context[-1], *ending[:-1]], ending
            positions[b, here] = np.arange(len(ending)) + len(row.context) - 1
            branch[b, here], at = i, at + len(ending)
    ids, wanted = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
    if all(len(row.endings) == 1 for row in rows):
        return Batch(ids, wanted, None, None)
    kind = torch.from_numpy(branch).to(device)
    sees = (kind[:, None, :] == 0) | (kind[:, None, :] == kind[:, :, None])
    return Batch(ids, wanted, torch.from_numpy(positions).to(device), sees.tril()[:, None])


def pieces_of(rows: list[Row], losses: list[float], likeliest: list[bool]) -> list[Piece]:
    """One for each ending of each row of a batch, from what the model says of the batch's targets."""
    pieces, at = [], 0
    for row in rows:
        for owner, ending in zip(row.owners, row.endings, strict=True):
            here = slice(at, at + len(ending))
            pieces.append((*owner, math.fsum(losses[here]), all(likeliest[here])))
            at += len(ending)
    return pieces


def score(
    forward: Forward,
    requests: list[Request],
    limit: int,
    batch_tokens: int,
    device: torch.device,
    shared: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[int, None, list[Piece]]:
    """Scores this rank's share of the batches; `merge` makes scores of what all ranks return.

    Yields before each of its forwards, when all else that it takes is done, the number of rows that all ranks then
    score. Every rank makes as many forwards as any other, which a sharded model needs: who has no batch left repeats
    the last row. Not `shared`, every ending is a row of its own, for a model that takes no mask.
    """
    rows = [row for i, request in enumerate(requests) for row in rows_of(i, request, limit, shared)]
    batches = plan(rows, batch_tokens)
    pieces: list[Piece] = []
    for start in range(0, len(batches), world_size):
        mine = batches[start + rank] if start + rank < len(batches) else []
        batch = pack(mine or rows[-1:], device)
        yield sum(map(len, batches[start : start + world_size]))
        losses, likeliest = forward(batch)
        if mine:
            pieces += pieces_of(mine, losses.tolist(), likeliest.tolist())
    return pieces


def merge(pieces: Iterable[Piece], requests: list[Request]) -> list[list[Score]]:
    """The score of every ending of every request, from the pieces of all ranks."""
    found: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in sorted(pieces):
        found[piece[:2]].append(piece)
    return [
        [
            Score(math.fsum(p[3] for p in found[i, e]), all(p[4] for p in found[i, e]))
            for e in range(len(request.endings))
        ]
        for i, request in enumerate(requests)
    ]


def follow_on(encode: Encode) -> Encode:
    """Encodes text that follows on another: SentencePiece's encoders would put a space of their own before it."""
    before = encode("x")
    return lambda text: encode("x" + text)[len(before) :]


def encode_pair(context: str, continuation: str, encode: Encode) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, cut where the context ends in the ids of both together.

    Spaces at the context's end go to what follows, where most tokenizers have them (as in lm-evaluation-harness).
    """
    bare = context.rstrip()
    both, first = encode(context + continuation), encode(bare)
    return first, both[len(first) :]
