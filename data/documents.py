"""Positions of tokens within the documents of a row."""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(inputs: Tensor, end_of_text: int) -> Tensor:
    """Returns the position of each token of `inputs` (B, T) within its document, (B, T) int64.

    An end-of-text token starts a document and has position 0. A row that starts within a document counts from the row's
    first token. A token's index minus its position is the start of its document, which identifies the document.
    """
    index = torch.arange(inputs.size(1), device=inputs.device)
    starts = torch.where(inputs == end_of_text, index, 0).cummax(dim=1).values
    return index - starts
