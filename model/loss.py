"""Output head and cross-entropy in one, in chunks, so that the full logits never exist.

With 64 × 1024 tokens and GPT-2's vocabulary the logits alone are 13 GB in fp32, and the usual code
holds them two or three times. Here one chunk of rows at a time (128 on a CPU, up to 16,384 on a GPU) is projected,
turned into loss and gradient, and dropped. The gradients are computed in the forward pass, while the logits of the
chunk exist. The loss is a sum, so the backward pass only multiplies them by the incoming gradient, one number. The
number of matrix products is the same as in the plain version. (Fusing the head with its loss: Liger Kernel, Hsu et al.
2024; Wijmans et al. 2024.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

# (logits, targets, vocab_size, softcap) -> (summed loss, gradient of the logits)
ChunkLoss = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]

# Maximum number of logits in one chunk. 2^23 fp32 numbers are 32 MB. On CUDA large chunks keep the matrix units busy
# and read and write the weight's gradient less often; 2^30 logits take 4.3 GB in bfloat16 when compiled, 13 GB in
# eager mode.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**30}
# Smaller GPUs get smaller chunks: at 4 to 24 bytes per logit a chunk takes at most 38 % of the memory.
DEVICE_BYTES_PER_LOGIT = 64
MOST_CAP = 40.0  # exp(-2 * 40) is still a normal fp32 number


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
    chunk_loss: ChunkLoss | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the summed cross-entropy of `hidden @ weight.T` against `targets`, and the number of valid targets.

    hidden (N, C); weight (V_padded, C), whose rows from `vocab_size` on are padding and get zero probability; targets
    (N,) int64, IGNORE_INDEX where nothing is predicted. With a softcap c the logits are c·tanh(logits/c) (Gemma 2).
    The loss is in nats, fp32 and differentiable; the number is int64. Computes in the autocast dtype if autocast is
    on, with softmax and the gradient of the weight in fp32. `chunk_loss` computes loss and gradient of a chunk of
    logits, by default `chunk_loss_and_grad`.
    """
    device = hidden.device.type
    chunk_rows = chunk_rows or rows_of_a_chunk(weight)
    count = (targets != IGNORE_INDEX).sum()
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not with_gradient:
        return token_losses(hidden, weight, targets, vocab_size, softcap, chunk_rows)[0].sum(), count
    hidden = in_autocast_dtype(hidden)
    with torch.autocast(device, enabled=False):  # inside, every dtype is explicit
        chunk_loss = chunk_loss or chunk_loss_and_grad
        return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, softcap, chunk_rows, chunk_loss), count


def rows_of_a_chunk(weight: Tensor) -> int:
    """Returns the number of rows in a chunk of logits for this head on its device."""
    return chunk_rows_for(weight.size(0), weight.device.type, memory_of(weight.device))


def chunk_rows_for(vocabulary: int, device_type: str, memory: float = math.inf) -> int:
    """Returns the rows of a chunk: a power of two, which divides the usual batches, so that all chunks have one shape.

    `memory`: bytes of the device. Smaller devices get smaller chunks.
    """
    elements = min(CHUNK_ELEMENTS.get(device_type, 2**26), memory / DEVICE_BYTES_PER_LOGIT)
    return 2 ** max(0, (int(elements) // vocabulary).bit_length() - 1)


@lru_cache(maxsize=8)
def memory_of(device: torch.device) -> float:
    """Returns the memory of a CUDA device in bytes; infinity for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Returns x in the autocast dtype if autocast is on."""
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
    """Returns the cross-entropy of each target in nats, and whether it is the likeliest token: (N,) each.

    The loss of an ignored target is 0. Of equally likely tokens the first is the likeliest. Arguments and dtypes: see
    `linear_cross_entropy`.
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
    """Returns what `token_losses` returns, from fp32 logits (N, V)."""
    log_p = F.log_softmax(logits, dim=-1)
    valid = targets != IGNORE_INDEX
    target = log_p.gather(1, targets.where(valid, 0)[:, None]).squeeze(1)
    likeliest = valid & (target == log_p.amax(-1))
    # argmax finds the first of equal logits. It is slow on a CPU, so only rows whose target has the maximum need it.
    likeliest[likeliest.clone()] = logits[likeliest].argmax(-1) == targets[likeliest]
    return (-target).where(valid, 0.0), likeliest


def chunk_loss_and_grad(logits: Tensor, targets: Tensor, vocab_size: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of a chunk of logits (R, V_padded) and its gradient, in the dtype of the logits.

    Rows of ignored targets get a gradient too. The caller multiplies the other operand of each matrix product by zero
    there, which is cheaper than reading and writing the logits again.
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


def fused_chunk_loss_and_grad(
    logits: Tensor, targets: Tensor, vocab_size: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Computes `chunk_loss_and_grad` in a form that torch.compile fuses without fp32 intermediates.

    Inductor stores what a scatter writes into, here the fp32 gradient of all logits: 14 bytes of memory traffic per
    bfloat16 logit. A comparison with the column number fuses into the pass that writes the gradient: 6 bytes.
    """
    column = torch.arange(logits.size(1), device=logits.device)
    valid = targets != IGNORE_INDEX
    index = targets.where(valid, 0)[:, None]
    z, target = logits.float(), logits.gather(1, index).float()
    if softcap:
        z, target = softcap * torch.tanh(z / softcap), softcap * torch.tanh(target / softcap)
    masked = z.masked_fill(column >= vocab_size, float("-inf"))
    # Subtracting the maximum keeps exp from overflowing. The cap bounds it, so it need not be computed.
    top = softcap if 0 < softcap <= MOST_CAP else masked.amax(-1, keepdim=True)
    log_sum = (masked - top).exp().sum(-1, keepdim=True).log()
    loss = (log_sum - (target - top)).squeeze(1).where(valid, 0.0).sum()
    grad = (masked - top - log_sum).exp() - (column == index).float()
    if softcap:
        grad = grad * (1 - (z / softcap).square())
    return loss, grad.to(logits.dtype)


def compiled_chunk_loss() -> ChunkLoss:
    """Returns `fused_chunk_loss_and_grad`, compiled."""
    return torch.compile(fused_chunk_loss_and_grad, dynamic=False)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to the fp32 `total` in place, for 16-bit operands too."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and accumulates_in_fp32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@lru_cache(maxsize=8)
def accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether 16-bit matrices can be multiplied straight into an fp32 sum: with cuBLAS from torch 2.11 on."""
    total, a = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        softcap: float,
        chunk_rows: int,
        chunk_loss_fn: ChunkLoss,
    ) -> Tensor:
        w = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        # The sum over chunks is not in 16 bits. A frozen head has no gradient.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunks = zip(*(t.split(chunk_rows) for t in (hidden, targets, grad_hidden)), strict=True)
        for x, t, grad_x in chunks:
            chunk_loss, grad_logits = chunk_loss_fn(x @ w.t(), t, vocab_size, softcap)
            loss += chunk_loss
            valid = (t != IGNORE_INDEX)[:, None]
            torch.mm(grad_logits, w, out=grad_x)
            grad_x *= valid
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.t(), x * valid)
            del grad_logits  # frees it before the next chunk's logits are made
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("backward was already called for this loss; compute the loss again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_output).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad_output), grad_weight, None, None, None, None, None
