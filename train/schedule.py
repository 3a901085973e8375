"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from cfg.flags import OptimizerConfig


def learning_rate(step: int, num_iterations: int, c: OptimizerConfig) -> float:
    """Learning rate of update number `step`, counted from 1 to `num_iterations`.

    Linear warm-up over `warmup_iters` updates, then `schedule` from the peak down to the floor
    `learning_rate_decay_frac * learning_rate`, which the last update reaches:
    cosine (Loshchilov and Hutter 2017), linear, constant (no floor), or wsd (Hu et al. 2024:
    constant, then linear over the last `cooldown_frac` of the run).
    """
    peak, floor = c.learning_rate, c.learning_rate * c.learning_rate_decay_frac
    if step <= c.warmup_iters:
        return peak * step / c.warmup_iters
    if c.schedule == "constant":
        return peak
    start = float(c.warmup_iters)
    if c.schedule == "wsd":
        start = max(start, num_iterations * (1 - c.cooldown_frac))
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / (num_iterations - start)) if num_iterations > start else 1.0
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if c.schedule == "cosine" else 1 - progress
    return floor + remaining * (peak - floor)
