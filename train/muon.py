"""Muon for the hidden matrices and AdamW for all other parameters, in one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest matrix
with orthonormal rows or columns, so that all singular values of the update are about 1.

torch.optim.Muon (torch 2.9 to 2.13) is not used: it takes 2-D tensors only, always computes in bfloat16, has no AdamW
groups for the other parameters, and cannot take sharded parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# Coefficients a, b, c of the five steps x -> a·x + b·(xxᵀ)x + c·(xxᵀ)²x, from modded-nanogpt. Computed by the method of
# Amsel et al. 2025 (arXiv 2505.16932), they take all singular values from [0.001, 1] as close to 1 as possible. The
# safety factor of 1.02 keeps the iteration stable in bfloat16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02


def orthogonalize(matrix: Tensor) -> Tensor:
    """Returns UVᵀ of the singular value decomposition UΣVᵀ of `matrix` (rows, columns), approximately.

    Singular values of at least a thousandth of the Frobenius norm end within about 15 % of 1. The iteration runs in
    bfloat16 on CUDA and in fp32 on the CPU. The result has the dtype of `matrix`.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x  # the product with its transpose is then the smaller one
    x = x / (SAFETY * x.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """Updates groups that have `parts` with Muon, and all others with AdamW (fused).

    `parts` are the numbers of rows of the matrices in a parameter, such as query, key and value in c_attn. Each matrix
    is orthogonalised separately. If a parameter is sharded, its momentum is gathered on all ranks, one parameter at a
    time, and each rank keeps the rows of its shard. Orthogonalising each shard separately would give another update.
    """

    def __init__(self, groups: Any, **defaults: Any):
        super().__init__(groups, {"parts": None, "momentum": 0.95, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = empty_state(p, group)
            if group["parts"]:
                for p in parameters:
                    self._muon(p, group)
            elif parameters:
                self._adamw(parameters, group)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        moments = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            *moments,
            max_exp_avg_sqs=[],
            state_steps=[s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, p: Tensor, group: dict[str, Any]) -> None:
        """Updates one parameter, matrix by matrix."""
        state, beta, lr = self.state[p], group["momentum"], group["lr"]
        momentum, gradient, weight = (_local(t) for t in (state["momentum"], p.grad, p))
        momentum.lerp_(gradient, 1 - beta)
        nesterov = _whole(gradient.lerp(momentum, beta), p)
        variances = state["variance"].to(nesterov.device)  # offloaded states are on the host
        updates = []
        for part, variance in zip(nesterov.split(group["parts"]), variances.split(group["parts"]), strict=True):
            updates.append(normalize_rows(orthogonalize(part), variance, group["betas"][1]))
        state["variance"] = variances.to(state["variance"].device)
        update = _own_rows(torch.cat(updates), p)
        del nesterov, part, updates
        # Cautious weight decay (Chen et al. 2025, arXiv 2510.12402) decays only the
        # weights that the update moves towards zero.
        decay = weight * (update * weight > 0) * group["weight_decay"]
        weight.sub_(update + decay, alpha=lr)


def normalize_rows(update: Tensor, variance: Tensor, beta2: float) -> Tensor:
    """Returns `update` with its rows normalised, times √max(1, rows/columns). It changes `variance` (rows, 1).

    NorMuon (Li et al. 2025, arXiv 2510.05491) divides each row by the root of the running mean of its square, kept in
    `variance`, so that no neuron gets much larger updates than others. It then restores the Frobenius norm of `update`.
    The factor makes the step's effect on the output independent of the shape.
    """
    variance.lerp_(update.square().mean(1, keepdim=True), 1 - beta2)
    scaled = update * (variance + 1e-10).rsqrt()
    scale = max(1.0, update.size(0) / update.size(1)) ** 0.5
    return scaled.mul_(scale * update.norm() / (scaled.norm() + 1e-10))


def empty_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state of a parameter before its first update."""
    if group.get("parts"):
        return {
            "momentum": torch.zeros_like(p),
            "variance": torch.zeros(p.size(0), 1, device=_local(p).device),  # whole on every rank: it is small
        }
    step = torch.zeros((), dtype=torch.float32, device=_local(p).device)
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(own: Tensor, p: Tensor) -> Tensor:
    """Gathers the whole tensor from each rank's part `own`, which is sharded like `p`. All ranks must call it."""
    if not isinstance(p, DTensor):
        return own
    device = torch.device(p.device_mesh.device_type)  # offloaded tensors are on the host
    return DTensor.from_local(
        own.to(device), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    ).full_tensor()


def _own_rows(whole: Tensor, p: Tensor) -> Tensor:
    """Returns this rank's part of a whole tensor, sharded like `p`, on the device of `p`."""
    if not isinstance(p, DTensor):
        return whole
    own = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
    return own.to(p.to_local().device)
