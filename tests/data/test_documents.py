"""Positions within documents equal counting token by token."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data.documents import document_positions

END = 3
rows = arrays.arrays(np.int64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 4))


@settings(max_examples=200, deadline=None)
@given(rows=rows)
def test_positions_equal_counting(rows):
    counted = np.zeros_like(rows)
    for row, out in zip(rows, counted, strict=True):
        for t in range(1, len(row)):
            out[t] = 0 if row[t] == END else out[t - 1] + 1
    assert document_positions(torch.from_numpy(rows), END).tolist() == counted.tolist()


def test_a_row_that_starts_within_a_document_counts_from_the_row_start():
    row = torch.tensor([[7, 8, END, 9, END, END, 6]])
    assert document_positions(row, END).tolist() == [[0, 1, 0, 1, 0, 0, 1]]
