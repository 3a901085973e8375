"""Numerical stability: the fp16 loss scale, skipping bad steps, and deciding when to roll back."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from cfg.config import Config
from train.optim import named_states
from train.parallel import ParallelModel, local
from util.ranks import Ranks

INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
WINDOW = 128  # recent norms; spikes are looked for once half of them are there (as in OLMo-core's SkipStepOptimizer)

# Counter → its key in state.json.
COUNTERS = {
    "skipped": "skipped",
    "consecutive_skips": "in_a_row",
    "data_offset": "passed_over",
    "rollback_step": "origin",
    "rollbacks": "rollbacks",
    "steps_since_rollback": "taken",
}


class LossScaler:
    """The dynamic loss scale of fp16 training (Micikevicius et al. 2018): small gradients do not become zero.

    Halves after a step whose gradient overflowed, doubles after 2000 good steps in a row. It looks only at the loss
    and the norm that all ranks share, so ranks agree without communication. torch's GradScaler looks at each rank's
    own gradients, which differ between ranks once they are sharded. For other dtypes the scale is 1.
    """

    def __init__(self, config: Config):
        self.enabled = config.dtype == "float16"
        self.value = INITIAL_SCALE if self.enabled else 1.0
        self.good_steps = 0

    def update(self, loss: float, grad_norm: float) -> None:
        """Adapts the scale after a step with this loss and gradient norm."""
        if not self.enabled:
            return
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the scale. The state of a run in another dtype is empty; the scale then starts anew."""
        if self.enabled and state:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])


class SpikeGuard:
    """Skips steps whose loss or gradient is not finite, or whose gradient norm is a spike.

    A spike is a norm more than --skip_spikes standard deviations above the mean of recent norms. Skipped steps do not
    count as recent: otherwise one spike would make the next look normal. Loss and norm are the same on all ranks, so
    ranks agree without communication.
    """

    def __init__(self, config: Config):
        self.deviations = config.skip_spikes
        self.rollback_after = config.rollback_after
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # steps skipped in the whole run
        self.consecutive_skips = 0
        self.data_offset = 0  # steps by which the data is ahead of the step, after roll-backs
        self.rollback_step = -1  # the checkpoint of the last roll-back
        self.rollbacks = 0  # roll-backs to that checkpoint
        self.steps_since_rollback = 0  # without skipped ones

    def threshold(self) -> float:
        """Returns the norm above which a step is a spike."""
        if not self.deviations or len(self.norms) < WINDOW // 2:
            return math.inf
        return float(np.mean(self.norms) + self.deviations * np.std(self.norms))

    def reason_to_skip(self, loss: float, norm: float, overflow_expected: bool) -> str:
        """Returns why the step with this loss and gradient norm must be skipped, or "". Call it once per step.

        `overflow_expected`: the loss scaler is trying out a scale, so an infinite gradient does not count towards
        --rollback_after.
        """
        reason = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = "loss or gradient not finite"
        elif norm > (threshold := self.threshold()):
            reason = f"norm {norm:.4g}, a spike above {threshold:.4g}"
        if not reason:
            self.norms.append(norm)
            self.steps_since_rollback += 1
            self.consecutive_skips = 0
        else:
            self.skipped += 1
            self.consecutive_skips += not (overflow_expected and math.isfinite(loss))
        return reason

    def should_roll_back(self) -> bool:
        """Returns whether --rollback_after steps in a row were skipped."""
        return 0 < self.rollback_after <= self.consecutive_skips

    def rolled_back(self, step: int, checkpoint_step: int, saved: dict[str, Any]) -> None:
        """Records a roll-back from `step` to a checkpoint: the data in between is skipped.

        `saved` is the guard's state in that checkpoint. A checkpoint written since the last roll-back counts as the
        same one if every step since then was skipped.
        """
        same = checkpoint_step == self.rollback_step or not self.steps_since_rollback
        self.rollbacks = self.rollbacks + 1 if same else 1
        self.rollback_step, self.steps_since_rollback = checkpoint_step, 0
        self.data_offset += step - checkpoint_step
        self.consecutive_skips = 0
        self.norms = deque(saved.get("norms", []), WINDOW)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), **{key: getattr(self, name) for name, key in COUNTERS.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the guard; counters that an older checkpoint lacks keep their values."""
        self.norms = deque(state.get("norms", []), WINDOW)
        for name, key in COUNTERS.items():
            setattr(self, name, int(state.get(key, getattr(self, name))))


def all_finite(model: ParallelModel, optimizer: Optimizer, ranks: Ranks) -> bool:
    """Returns whether all trained weights and optimizer states are finite on all ranks."""
    trained = [p for p in model.gpt.parameters() if p.requires_grad]
    tensors = [*trained, *named_states(optimizer, model.gpt).values()]
    return not ranks.any(not finite_here(tensors))[0]


def finite_here(tensors: list[Tensor]) -> bool:
    """Returns whether this rank's parts of `tensors` are finite."""
    return bool(torch.stack([local(t.detach()).isfinite().all().cpu() for t in tensors]).all())
