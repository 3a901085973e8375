"""Batched log-likelihoods of continuations given a context.

All continuations of one context share its computation: a row holds the context and then its continuations
side by side, and a mask lets each of them attend to the context and to itself only (tree attention, as in SpecInfer,
Miao et al. 2024). Rows of similar length make a batch, so there is little padding. The output head sees only the
positions that predict a continuation.

`score_requests` is the entry point. `score_in_steps` is the generator beneath it, for evaluation during training.
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
from util.ranks import Ranks

# --- what callers use -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Token ids of a context (at least one) and of the continuations to score after it."""

    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Score:
    """The loss of a continuation in nats, summed over its tokens. `greedy`: each token is the most likely one."""

    loss: float
    greedy: bool


@dataclass(frozen=True)
class Batch:
    """Rows as tensors of shape (B, T); the mask is (B, 1, T, T), or None for causal attention."""

    idx: Tensor
    targets: Tensor  # IGNORE_INDEX where nothing is predicted
    positions: Tensor | None
    mask: Tensor | None


# Returns two tensors (N,) over all targets of the batch, row by row: the losses, and whether the target is the argmax.
Forward = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ScoringModel:
    """A model's forward pass with the limits of its batches, and the ranks that share the work."""

    forward: Forward
    ranks: Ranks
    n_positions: int
    batch_tokens: int  # per forward pass, padding included
    shares_context: bool = True  # `forward` supports masks; otherwise each continuation gets a row


def gpt_forward(model: Callable[..., Any]) -> Forward:
    """Returns the forward pass of a GPT."""
    return lambda batch: model(batch.idx, batch.targets, positions=batch.positions, mask=batch.mask, each=True)


def score_requests(
    model: ScoringModel, requests: list[Request], desc: str = "", on_progress: Callable[[int], Any] | None = None
) -> list[list[Score]]:
    """Returns the score of every continuation of every request, on every rank.

    Rank 0 shows a progress bar named `desc`, if given. `on_progress` is called with the number of rows to be scored
    before each forward pass.
    """
    from tqdm import tqdm

    total = len(requests) if model.shares_context else sum(len(request.continuations) for request in requests)
    hidden = None if desc and model.ranks.is_main else True  # None: shown on a terminal only
    steps = score_in_steps(model, requests)
    with tqdm(total=total, desc=desc, unit="", disable=hidden) as bar:
        while True:
            try:
                rows = next(steps)
            except StopIteration as end:
                scores: list[list[Score]] = end.value
                return scores
            bar.update(rows)
            if on_progress:
                on_progress(rows)


def score_in_steps(model: ScoringModel, requests: list[Request]) -> Generator[int, None, list[list[Score]]]:
    """Scores requests like `score_requests`, and yields before each forward pass and before ranks exchange scores.

    Yields the number of rows that all ranks together score next. The host work (building the batch) comes before
    the yield. The caller can therefore stop all ranks together at a yield, or after one of them failed, while none of
    them is in a collective. Every rank yields and calls the model equally often, which a sharded model needs: a rank
    without a batch repeats the last row and drops the result.
    """
    rank, world_size, device = model.ranks.rank, model.ranks.world_size, model.ranks.device
    rows = [row for i, r in enumerate(requests) for row in to_rows(i, r, model.n_positions, model.shares_context)]
    batches = make_batches(rows, model.batch_tokens)
    partial_scores: list[PartialScore] = []
    for start in range(0, len(batches), world_size):
        mine = batches[start + rank] if start + rank < len(batches) else []
        batch = collate(mine or rows[-1:], device)
        yield sum(map(len, batches[start : start + world_size]))
        losses, greedy = model.forward(batch)
        if mine:
            partial_scores += sum_losses(mine, losses.tolist(), greedy.tolist())
    yield 0
    shares = model.ranks.gather(partial_scores)
    return combine_scores((part for share in shares for part in share), requests)


# --- from requests to batches ---------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Span:
    """A piece of a continuation: the number of its request, its number in the request, and its first token."""

    request: int
    continuation: int
    start: int


@dataclass(frozen=True)
class Row:
    """One row of a batch: a request, or as much of it as the model can see at once."""

    context: list[int]
    continuations: list[list[int]]
    spans: list[Span]  # one per continuation

    @property
    def length(self) -> int:
        return len(self.context) - 1 + sum(map(len, self.continuations))


def to_rows(number: int, request: Request, n_positions: int, shares_context: bool) -> Iterator[Row]:
    """Yields one row for the request, or one per continuation.

    Each continuation gets a row if the context cannot be shared, or if the longest continuation does not fit into
    `n_positions` after it. The row then holds as much context as fits: the last `n_positions` + 1 tokens of the text,
    of which the last is only predicted (as in lm-evaluation-harness). A continuation longer than `n_positions` is cut
    into several rows.
    """
    context, continuations = request.context, request.continuations
    if not context or not all(continuations):
        raise ValueError(f"request {number} has an empty context or continuation")
    if shares_context and len(context) - 1 + max(map(len, continuations)) <= n_positions:
        yield Row(context, continuations, [Span(number, i, 0) for i in range(len(continuations))])
        return
    for i, continuation in enumerate(continuations):
        text, start = context + continuation, len(context)
        for first in range(start, len(text), n_positions):
            end = min(first + n_positions, len(text))
            yield Row(text[max(0, end - n_positions - 1) : first], [text[first:end]], [Span(number, i, first - start)])


def make_batches(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Groups rows of similar length, longest first, into batches of at most `batch_tokens` padded tokens.

    A row that is longer than `batch_tokens` is a batch. Longest first, so that a batch too large for the memory fails
    at once. The batches depend on the rows only: on any number of ranks the same rows share a batch, which keeps the
    results bit-identical.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (-row.length, row.spans[0])):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].length > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(rows: list[Row], device: torch.device) -> Batch:
    """Returns the tensors of a batch.

    A row is the context without its last token, then for each continuation that token and all but the continuation's
    last token. So every position has one token to predict. The positions of each continuation count from the context.
    """
    shape = len(rows), max(row.length for row in rows)
    idx, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE_INDEX, np.int64)
    # 0: context, 1, 2, ...: its continuations, -1: padding, which attends to padding.
    branch = np.full(shape, -1)
    for b, row in enumerate(rows):
        at = len(row.context) - 1
        idx[b, :at], positions[b, :at], branch[b, :at] = row.context[:-1], range(at), 0
        for i, continuation in enumerate(row.continuations, 1):
            here = slice(at, at + len(continuation))
            idx[b, here], targets[b, here] = [row.context[-1], *continuation[:-1]], continuation
            positions[b, here] = np.arange(len(continuation)) + len(row.context) - 1
            branch[b, here], at = i, at + len(continuation)

    idx_tensor, target_tensor = torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)
    if all(len(row.continuations) == 1 for row in rows):
        return Batch(idx_tensor, target_tensor, None, None)
    kind = torch.from_numpy(branch).to(device)
    attends = (kind[:, None, :] == 0) | (kind[:, None, :] == kind[:, :, None])
    return Batch(idx_tensor, target_tensor, torch.from_numpy(positions).to(device), attends.tril()[:, None])


# --- from losses to scores ------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class PartialScore:
    """The score of one span."""

    span: Span
    loss: float
    greedy: bool


def sum_losses(rows: list[Row], losses: list[float], greedy: list[bool]) -> list[PartialScore]:
    """Sums the model's output for a batch over each span of its rows."""
    found, at = [], 0
    for row in rows:
        for span, continuation in zip(row.spans, row.continuations, strict=True):
            here = slice(at, at + len(continuation))
            found.append(PartialScore(span, math.fsum(losses[here]), all(greedy[here])))
            at += len(continuation)
    return found


def combine_scores(parts: Iterable[PartialScore], requests: list[Request]) -> list[list[Score]]:
    """Returns the score of every continuation of every request from the partial scores of all ranks."""
    by_continuation: dict[tuple[int, int], list[PartialScore]] = defaultdict(list)
    for part in sorted(parts):
        by_continuation[part.span.request, part.span.continuation].append(part)

    def combine(parts: list[PartialScore]) -> Score:
        return Score(math.fsum(part.loss for part in parts), all(part.greedy for part in parts))

    return [
        [combine(by_continuation[i, k]) for k in range(len(request.continuations))]
        for i, request in enumerate(requests)
    ]
