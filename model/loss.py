"""Linear head and cross-entropy in one, in chunks, so that the full logits never exist.

For a micro-batch of 16 × 1024 tokens and GPT-2's vocabulary the logits alone are 3.3 GB in fp32,
and the usual code holds them two or three times. Here a few hundred rows at a time are projected,
turned into loss and gradient, and dropped. The gradients are computed in the forward pass, where
the chunk's logits are at hand: the loss is a sum, so backward only has to scale them by the one
number that arrives from above. The number of matrix products is that of the plain version. (The
idea of fusing the head with its loss: Liger Kernel, Hsu et al. 2024; Wijmans et al. 2024.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

# Logits of one chunk, in elements. 2^23 fp32 numbers are 32 MB; on CUDA larger chunks keep the
# matrix units busy.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against `targets`, summed.

    hidden (N, C); weight (V_padded, C), of which rows from `vocab_size` on are padding and get no
    probability; targets (N,) int64, IGNORE_INDEX where there is nothing to predict. With a softcap c
    logits are c·tanh(logits/c) (Gemma 2). Computes in the autocast dtype where autocast is on, with
    softmax and the weight's gradient in fp32. Returns the summed loss in nats (fp32, differentiable)
    and the number of targets counted (int64).
    """
    device = hidden.device.type
    chunk_rows = chunk_rows or rows_of_a_chunk(weight)
    count = (targets != IGNORE_INDEX).sum()
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not with_gradient:
        return token_losses(hidden, weight, targets, vocab_size, softcap, chunk_rows)[0].sum(), count
    hidden = in_autocast_dtype(hidden)
    with torch.autocast(device, enabled=False):  # inside, every dtype is explicit
        return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, softcap, chunk_rows), count


def rows_of_a_chunk(weight: Tensor) -> int:
    """A power of two, which divides the usual batches, so that all chunks have one shape to compile."""
    return 2 ** max(0, (CHUNK_ELEMENTS.get(weight.device.type, 2**26) // weight.size(0)).bit_length() - 1)


def in_autocast_dtype(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target in nats, 0 where there is none, and whether it is the likeliest token: (N,) both.

    Arguments and dtypes as of `linear_cross_entropy`; of equally likely tokens the first is the likeliest.
    """
    hidden = in_autocast_dtype(hidden)
    rows = chunk_rows or rows_of_a_chunk(weight)
    losses = torch.zeros(len(targets), device=hidden.device)
    likeliest = torch.zeros_like(targets, dtype=torch.bool)
    with torch.autocast(hidden.device.type, enabled=False):
        w = weight.to(hidden.dtype)
        parts = zip(*(t.split(rows) for t in (hidden, targets, losses, likeliest)), strict=True)
        for x, t, loss, hit in parts:
            z = (x @ w.t()).float()
            if softcap:
                z = softcap * torch.tanh(z / softcap)
            z[:, vocab_size:] = float("-inf")
            for out, value in zip((loss, hit), losses_of_logits(z, t), strict=True):
                out.copy_(value)
    return losses, likeliest


def losses_of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `token_losses`, from fp32 logits (N, V)."""
    log_p = F.log_softmax(logits, dim=-1)
    valid = targets != IGNORE_INDEX
    target = log_p.gather(1, targets.where(valid, 0)[:, None]).squeeze(1)
    likeliest = valid & (target == log_p.amax(-1))
    # Which of equals comes first is looked up only where it matters: argmax is slow on a CPU.
    likeliest[likeliest.clone()] = logits[likeliest].argmax(-1) == targets[likeliest]
    return (-target).where(valid, 0.0), likeliest


def chunk_loss_and_grad(logits: Tensor, targets: Tensor, vocab_size: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Loss sum of one chunk of logits (R, V_padded) and its gradient in them, in their dtype.

    Rows of ignored targets get a gradient too; the caller multiplies the other operand of each
    matrix product by zero there, which is cheaper than another pass over the logits.
    """
    z = logits.float()
    if softcap:
        squashed = torch.tanh(z / softcap)
        z = squashed * softcap
    z[:, vocab_size:] = float("-inf")
    log_p = F.log_softmax(z, dim=-1)
    valid = targets != IGNORE_INDEX
    index = targets.where(valid, 0)[:, None]
    loss = -(log_p.gather(1, index).squeeze(1).where(valid, 0.0)).sum()
    grad = log_p.exp_()  # softmax, then minus one at the target
    grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
    if softcap:
        grad *= 1 - squashed.square()
    return loss, grad.to(logits.dtype)


_compiled_chunk: Any = None


def compile_loss() -> None:
    """Lets torch.compile fuse the element-wise part of each chunk, from now on."""
    global _compiled_chunk
    _compiled_chunk = _compiled_chunk or torch.compile(chunk_loss_and_grad, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float, chunk_rows: int
    ) -> Tensor:
        chunk_fn = _compiled_chunk or chunk_loss_and_grad
        w = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # a sum over chunks, so not in 16 bits
        chunks = zip(*(t.split(chunk_rows) for t in (hidden, targets, grad_hidden)), strict=True)
        for x, t, grad_x in chunks:
            chunk_loss, grad_logits = chunk_fn(x @ w.t(), t, vocab_size, softcap)
            loss += chunk_loss
            valid = (t != IGNORE_INDEX)[:, None]
            torch.mm(grad_logits, w, out=grad_x)
            grad_x *= valid
            if w.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), x * valid)
            else:
                grad_weight += grad_logits.t() @ (x * valid)
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed out; call the loss again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        grad_weight = grad_weight.mul_(grad_output).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad_output), grad_weight, None, None, None, None
