"""From a plain model to one that trains on all ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from cfg.config import Config
from model.gpt import GPT
from model.loss import compile_loss
from train.distributed import Ranks


def parallelize(model: GPT, config: Config, ranks: Ranks) -> torch.nn.Module:
    """Compiles and wraps `model`, in the order compile each block → shard or replicate.

    Blocks are compiled in place, so parameter names stay clean, and one by one, since they are alike
    and the compiler then does the work once. Returns the module to call in training; `model` itself
    stays the one to name parameters by, and to evaluate with.
    """
    if config.compile:
        # DDP's gradient hooks already fire block by block; splitting within a block would only break its fusion.
        torch._dynamo.config.optimize_ddp = False
        for block in model.h:
            block.compile()
        compile_loss()
        # FlexAttention has no dropout, and takes no head narrower than a tensor core's tile.
        flexible = config.flash and not config.dropout and config.n_embd // config.n_head >= 16
        model.flex = ranks.device.type == "cuda" and flexible
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def sync_gradients(model: torch.nn.Module, on: bool) -> None:
    """Whether the next forward and backward end in a gradient all-reduce.

    To be set before the forward pass: DDP decides there (huggingface/accelerate#1726).
    """
    if isinstance(model, DistributedDataParallel):
        cast(DistributedDataParallel, model).require_backward_grad_sync = on


def settle(model: torch.nn.Module, config: Config, ranks: Ranks, autocast: AbstractContextManager[None]) -> None:
    """Makes DDP arrange its gradient buckets before the first step instead of after it.

    It rearranges them once, by the order in which gradients arrived in its first backward pass, and how
    gradients lie in buckets decides the order in which an all-reduce adds them. A resumed run would
    otherwise take its first step with the other arrangement, and on more than two ranks round differently.
    """
    if isinstance(model, DistributedDataParallel):
        idx = torch.zeros(config.batch_size, config.sequence_length, dtype=torch.long, device=ranks.device)
        # With positions if training has them, so that the compiler meets the same case.
        positions = torch.arange(idx.size(1), device=ranks.device).expand_as(idx) if config.doc_mask else None
        with autocast:
            loss, _ = model(idx, idx, positions=positions)
        loss.backward()
        model.zero_grad(set_to_none=True)
