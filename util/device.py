"""Which device to compute on."""

from __future__ import annotations

import torch

from util.errors import UserError


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`wanted` is auto, cpu, cuda or mps; auto takes what is there. Raises UserError for what is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, there in available.items() if there) if wanted == "auto" else wanted
    if not available[kind]:
        raise UserError(f"--device={kind}: this machine has none; use --device=auto")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node asks for more than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(kind)
