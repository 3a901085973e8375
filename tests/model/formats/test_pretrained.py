"""Embeddings of a pretrained model for another vocabulary."""

import numpy as np
import torch

from model.formats.pretrained import mean_of_rows


def test_a_new_embedding_is_the_mean_of_its_old_rows_or_of_all_used_rows():
    """Row 3 of the old table is padding: no token uses it."""
    table = torch.tensor([[1.0, 0.0], [3.0, 4.0], [8.0, 2.0], [100.0, 100.0]])
    bags = [[1], [0, 2], [], [1, 1, 2]]
    rows = np.concatenate([np.array(b, dtype=np.int64) for b in bags]), np.array([0, 1, 3, 3, 6])
    expected = torch.tensor([[3.0, 4.0], [4.5, 1.0], [4.0, 2.0], [14 / 3, 10 / 3]])
    assert torch.allclose(mean_of_rows(table, rows), expected)
