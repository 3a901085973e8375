"""The learning rate at the points that define each schedule."""

import math

import pytest

from cfg.config import load_config
from train.optim import learning_rate


def rates(*flags, steps=100):
    config = load_config([f"--num_iterations={steps}", "--learning_rate=1.0", *flags], world_size=1)
    return [learning_rate(step, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    r = rates(f"--schedule={schedule}", "--warmup_iters=10")
    assert r[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert max(r) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_is_at_the_floor(schedule):
    assert rates(f"--schedule={schedule}", "--learning_rate_decay_frac=0.1")[-1] == pytest.approx(0.1)
    assert rates(f"--schedule={schedule}", "--learning_rate_decay_frac=0")[-1] == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_floor_is_a_fraction_of_the_peak(schedule):
    r = rates(f"--schedule={schedule}", "--learning_rate=0.5", "--learning_rate_decay_frac=0.1")
    assert r[0] == pytest.approx(0.5, rel=0.02) and r[-1] == pytest.approx(0.05)


def test_cosine_is_half_way_down_in_the_middle():
    r = rates("--warmup_iters=20", "--learning_rate_decay_frac=0.2")
    assert r[59] == pytest.approx(0.6)  # half of the 80 steps after warm-up
    assert r[39] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_until_its_cooldown():
    r = rates("--schedule=wsd", "--warmup_iters=10", "--cooldown_frac=0.3", "--learning_rate_decay_frac=0")
    assert set(r[9:70]) == {1.0}
    assert r[84] == pytest.approx(0.5)


def test_constant_stays():
    assert set(rates("--schedule=constant")) == {1.0}


def test_a_run_shorter_than_its_warm_up_is_all_warm_up():
    assert rates("--warmup_iters=1000", steps=5) == pytest.approx([k / 1000 for k in range(1, 6)])
