"""The loss scale of fp16 training."""

from __future__ import annotations

from typing import Any

START, GROWTH_INTERVAL = 2.0**16, 2000


class LossScale:
    """Keeps small fp16 gradients from becoming zero (Micikevicius et al. 2018, with the usual dynamic scale).

    Halves after a step whose gradient overflowed, doubles after 2000 good steps in a row. It looks only at whether
    the norm that all ranks share was finite, so they agree on it without asking each other; torch's GradScaler
    looks at each rank's own gradients, which are different ones once they are sharded.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.value = START if enabled else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """To be called once a step."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % GROWTH_INTERVAL == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; a run in another dtype gave nothing, and the scale then starts anew."""
        if self.enabled and state:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
