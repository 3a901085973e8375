"""Steps that are not taken, as their gradient is not finite or leaps up, and when it is time to go back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfg.config import Config
from train.parallel import local

COUNTS = "skipped", "in_a_row", "passed_over", "origin", "rollbacks", "taken"
WINDOW = 128  # recent norms, and half of them before the guard speaks: as in OLMo-core's SkipStepOptimizer


class StepGuard:
    """Judges every step by numbers that all ranks share, so that they agree without asking each other.

    A norm more than --skip_spikes standard deviations above the mean of the recent ones is a spike. Only steps that
    were taken count as recent, so that neither NaN nor a spike makes the next one look usual.
    """

    def __init__(self, config: Config):
        self.sigmas, self.patience = config.skip_spikes, config.rollback_after
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # steps not taken, in the whole run
        self.in_a_row = 0
        self.passed_over = 0  # steps by which the data is ahead of the step, after going back
        self.origin = -1  # the checkpoint that training last went back to, and how often
        self.rollbacks = 0
        self.taken = 0  # steps taken since then

    def limit(self) -> float:
        """The norm above which a step is a spike."""
        if not self.sigmas or len(self.norms) < WINDOW // 2:
            return math.inf
        return float(np.mean(self.norms) + self.sigmas * np.std(self.norms))

    def refusal(self, loss: float, norm: float, overflow_expected: bool) -> str:
        """Why the step with this loss and gradient norm is not to be taken; "" if it is. To be called once a step.

        `overflow_expected`: a loss scale is being tried out, and a gradient that is not finite says nothing else.
        """
        why = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            why = "loss or gradient not finite"
        elif norm > (limit := self.limit()):
            why = f"norm {norm:.4g}, a spike above {limit:.4g}"
        if not why:
            self.norms.append(norm)
            self.taken += 1
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += not (overflow_expected and math.isfinite(loss))
        return why

    def gives_up(self) -> bool:
        """Whether so many steps in a row were not taken that training should go back."""
        return 0 < self.patience <= self.in_a_row

    def go_back(self, step: int, origin: int, then: dict[str, Any]) -> None:
        """From `step` to the checkpoint of step `origin`, whose state was `then`: past the data in between.

        A checkpoint written while no step was taken since the last return is the same as that one.
        """
        self.rollbacks = self.rollbacks + 1 if origin == self.origin or not self.taken else 1
        self.origin, self.taken = origin, 0
        self.passed_over += step - origin
        self.in_a_row = 0
        self.norms = deque(then.get("norms", []), WINDOW)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), **{name: getattr(self, name) for name in COUNTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; a checkpoint from before there was a guard gave nothing."""
        self.norms = deque(state.get("norms", []), WINDOW)
        for name in COUNTS:
            setattr(self, name, int(state.get(name, getattr(self, name))))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether this rank's parts of `tensors` hold only numbers."""
    return bool(torch.stack([local(t.detach()).isfinite().all().cpu() for t in tensors]).all())
