"""Where the documents of a row lie, read off its end-of-text tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(inputs: Tensor, end_of_text: int) -> Tensor:
    """Token ids (B, T) to each token's position within its document, (B, T) int64, on their device.

    An end-of-text token stands before its document and is its position 0. A row that starts in the middle
    of a document counts from the row's first token. Index in the row minus position is where a token's
    document starts, and tokens of a row are of one document if they agree in it: nothing else need be known.
    """
    index = torch.arange(inputs.size(1), device=inputs.device)
    starts = torch.where(inputs == end_of_text, index, 0).cummax(dim=1).values
    return index - starts
