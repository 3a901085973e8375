"""Which steps are not taken."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfg.config import load_config
from train.stability import WINDOW, StepGuard, all_finite

NORMS = st.lists(st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf]), max_size=3 * WINDOW)


def guard(*flags):
    return StepGuard(load_config(list(flags), world_size=1))


def usual(n=WINDOW):
    return [1 + 0.1 * (i % 3) for i in range(n)]


def judge(steps, norms, loss=1.0, overflow_expected=False):
    return [steps.refusal(loss, norm, overflow_expected) for norm in norms]


def test_what_is_not_finite_is_refused_from_the_first_step():
    steps = guard()
    assert judge(steps, [1.0]) == [""] and judge(steps, [1.0], loss=math.nan)[0]
    assert judge(steps, [math.inf, math.nan]) == ["loss or gradient not finite"] * 2
    assert judge(steps, [1e30]) == [""]  # without --skip_spikes
    assert steps.skipped == 3 and steps.in_a_row == 0 and list(steps.norms) == [1.0, 1e30]


def test_a_spike_is_told_from_what_is_usual():
    steps = guard("--skip_spikes=6")
    assert not any(judge(steps, usual(WINDOW // 2 - 1)))
    assert judge(steps, [50.0]) == [""]  # too little is known
    steps = guard("--skip_spikes=6")
    assert not any(judge(steps, usual()))
    mean, deviation = 1.1, math.sqrt(0.02 / 3)
    assert steps.limit() == pytest.approx(mean + 6 * deviation, abs=0.01)
    assert judge(steps, [steps.limit() * 1.01, steps.limit() * 0.99])[0].startswith("norm 1.6")
    assert not any(judge(steps, [0.0] * 3))  # only upwards


@pytest.mark.parametrize("sigmas", [2, 10])
def test_the_limit_is_as_many_deviations_above_the_mean_as_asked_for(sigmas):
    steps = guard(f"--skip_spikes={sigmas}")
    judge(steps, usual())
    assert steps.limit() == pytest.approx(np.mean(usual()) + sigmas * np.std(usual()))


def test_neither_nan_nor_spikes_make_the_next_one_look_usual():
    steps = guard("--skip_spikes=6")
    judge(steps, usual())
    before = steps.limit()
    assert all(judge(steps, [50.0, math.nan, math.inf] * 50)) and steps.limit() == before


@given(NORMS, NORMS, st.integers(0, 3))
def test_the_history_survives_a_resume(first, then, patience):
    flags = "--skip_spikes=3", f"--rollback_after={patience}"
    whole, resumed = guard(*flags), guard(*flags)
    judge(whole, first)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert judge(whole, then) == judge(resumed, then)
    assert whole.state_dict() == resumed.state_dict() and whole.gives_up() == resumed.gives_up()


def test_a_loss_scale_that_is_tried_out_does_not_count_as_in_a_row():
    steps = guard("--rollback_after=3")
    judge(steps, [math.inf] * 20, overflow_expected=True)
    assert not steps.gives_up() and steps.skipped == 20
    judge(steps, [math.nan] * 3, loss=math.nan, overflow_expected=True)
    assert steps.gives_up()
    assert judge(steps, [1.0]) == [""] and not steps.gives_up()


def test_it_never_gives_up_if_not_asked_to():
    steps = guard("--rollback_after=0")
    judge(steps, [math.nan] * 1000)
    assert not steps.gives_up()


def test_going_back_again_and_again():
    steps = guard()
    steps.go_back(16, 10, {"norms": [1.0]})
    assert (steps.passed_over, steps.rollbacks, list(steps.norms)) == (6, 1, [1.0])
    steps.go_back(12, 10, {})  # the data of steps 11 to 16 is behind it, and now that of 17 and 18
    assert (steps.passed_over, steps.rollbacks) == (8, 2)
    judge(steps, [1.0] * 8)
    steps.go_back(25, 20, {})
    assert (steps.passed_over, steps.rollbacks, steps.origin) == (13, 1, 20)


def test_checkpoints_written_while_no_step_is_taken_count_as_one():
    steps = guard("--rollback_after=3")
    judge(steps, [1.0] * 6)
    for n, step in enumerate(range(9, 99, 2), start=1):  # a checkpoint of every second step
        judge(steps, [math.nan] * 3)
        assert steps.gives_up()
        steps.go_back(step, step - 1, {"norms": [1.0]})
        assert steps.rollbacks == n
    judge(steps, [1.0])
    steps.go_back(120, 110, {"norms": [1.0]})
    assert steps.rollbacks == 1


def test_a_checkpoint_from_before_the_guard():
    steps = guard()
    steps.load_state_dict({})
    assert steps.state_dict()["skipped"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite(bad):
    good = [torch.randn(3, 4), torch.zeros(()), torch.full((2,), 3e38)]
    assert all_finite(good)
    assert not all_finite([*good, torch.tensor([1.0, bad])])
