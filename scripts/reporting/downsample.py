"""Fewer points for display, without losing a minimum, a maximum or a spike; and smoothing."""

from __future__ import annotations

import math

import numpy as np


def rows_to_show(columns: list[np.ndarray], most: int) -> np.ndarray:
    """Returns about `most` rows of columns (N,), in order; all rows if there are not more.

    The rows are divided into equal parts. The smallest and the largest value of each column in each part are kept, and
    the first row of a part without values, and the first and the last of all.
    """
    count = len(columns[0]) if columns else 0
    if count <= most:
        return np.arange(count)
    parts = max(1, most // (2 * len(columns)))
    edges = np.linspace(0, count, parts + 1).astype(int)
    kept = {0, count - 1}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        for column in columns:
            part = column[start:end]
            if np.isnan(part).all():
                kept.add(int(start))
            else:
                kept |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
    return np.array(sorted(kept))


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Returns at most `most` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Returns the exponential moving average of `values` (N,) with a time constant of `span` values.

    The average is divided by the sum of its weights, so that its start is not biased (as in Adam, Kingma and Ba 2014).
    NaN has no weight, and its place is NaN in the result.
    """
    keep = math.exp(-1 / span) if span > 0 else 0.0
    total = weight = 0.0
    found = np.full(len(values), math.nan)
    for i, value in enumerate(values.tolist()):
        if value == value:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            found[i] = total / weight
    return found
