"""The fp16 loss scale, skipped steps and roll-backs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg.config import load_config
from train.stability import GROWTH_INTERVAL, INITIAL_SCALE, WINDOW, LossScaler, SpikeGuard, finite_here

NORMS = st.lists(st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf]), max_size=3 * WINDOW)


def guard(*flags):
    return SpikeGuard(load_config(list(flags), world_size=1))


def usual(n=WINDOW):
    return [1 + 0.1 * (i % 3) for i in range(n)]


def judge(steps, norms, loss=1.0, overflow_expected=False):
    return [steps.reason_to_skip(loss, norm, overflow_expected) for norm in norms]


def test_a_loss_or_norm_that_is_not_finite_is_skipped_from_the_first_step():
    steps = guard()
    assert judge(steps, [1.0]) == [""] and judge(steps, [1.0], loss=math.nan)[0]
    assert judge(steps, [math.inf, math.nan]) == ["loss or gradient not finite"] * 2
    assert judge(steps, [1e30]) == [""]  # without --skip_spikes
    assert steps.skipped == 3 and steps.consecutive_skips == 0 and list(steps.norms) == [1.0, 1e30]


def test_a_spike_is_a_norm_far_above_the_recent_ones():
    steps = guard("--skip_spikes=6")
    assert not any(judge(steps, usual(WINDOW // 2 - 1)))
    assert judge(steps, [50.0]) == [""]  # too few recent norms
    steps = guard("--skip_spikes=6")
    assert not any(judge(steps, usual()))
    mean, deviation = 1.1, math.sqrt(0.02 / 3)
    assert steps.threshold() == pytest.approx(mean + 6 * deviation, abs=0.01)
    assert judge(steps, [steps.threshold() * 1.01, steps.threshold() * 0.99])[0].startswith("norm 1.6")
    assert not any(judge(steps, [0.0] * 3))  # only upwards


@pytest.mark.parametrize("deviations", [2, 10])
def test_the_threshold_is_skip_spikes_deviations_above_the_mean(deviations):
    steps = guard(f"--skip_spikes={deviations}")
    judge(steps, usual())
    assert steps.threshold() == pytest.approx(np.mean(usual()) + deviations * np.std(usual()))


def test_skipped_norms_do_not_raise_the_threshold():
    steps = guard("--skip_spikes=6")
    judge(steps, usual())
    before = steps.threshold()
    assert all(judge(steps, [50.0, math.nan, math.inf] * 50)) and steps.threshold() == before


@settings(deadline=None)  # other tests run at the same time
@given(NORMS, NORMS, st.integers(0, 3))
def test_the_history_survives_a_resume(first, then, rollback_after):
    flags = "--skip_spikes=3", f"--rollback_after={rollback_after}"
    whole, resumed = guard(*flags), guard(*flags)
    judge(whole, first)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert judge(whole, then) == judge(resumed, then)
    assert whole.state_dict() == resumed.state_dict() and whole.should_roll_back() == resumed.should_roll_back()


def test_an_overflow_of_the_loss_scale_does_not_count_as_a_consecutive_skip():
    steps = guard("--rollback_after=3")
    judge(steps, [math.inf] * 20, overflow_expected=True)
    assert not steps.should_roll_back() and steps.skipped == 20
    judge(steps, [math.nan] * 3, loss=math.nan, overflow_expected=True)
    assert steps.should_roll_back()
    assert judge(steps, [1.0]) == [""] and not steps.should_roll_back()


def test_rollback_after_0_never_rolls_back():
    steps = guard("--rollback_after=0")
    judge(steps, [math.nan] * 1000)
    assert not steps.should_roll_back()


def test_repeated_roll_backs_skip_more_data_each_time():
    steps = guard()
    steps.rolled_back(16, 10, {"norms": [1.0]})
    assert (steps.data_offset, steps.rollbacks, list(steps.norms)) == (6, 1, [1.0])
    steps.rolled_back(12, 10, {})  # the data of steps 11 to 16 is behind it, and now that of 17 and 18
    assert (steps.data_offset, steps.rollbacks) == (8, 2)
    judge(steps, [1.0] * 8)
    steps.rolled_back(25, 20, {})
    assert (steps.data_offset, steps.rollbacks, steps.rollback_step) == (13, 1, 20)


def test_checkpoints_written_while_every_step_is_skipped_count_as_one():
    steps = guard("--rollback_after=3")
    judge(steps, [1.0] * 6)
    for n, step in enumerate(range(9, 99, 2), start=1):  # a checkpoint of every second step
        judge(steps, [math.nan] * 3)
        assert steps.should_roll_back()
        steps.rolled_back(step, step - 1, {"norms": [1.0]})
        assert steps.rollbacks == n
    judge(steps, [1.0])
    steps.rolled_back(120, 110, {"norms": [1.0]})
    assert steps.rollbacks == 1


def test_a_checkpoint_without_guard_state_can_be_loaded():
    steps = guard()
    steps.load_state_dict({})
    assert steps.state_dict()["skipped"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(bad):
    good = [torch.randn(3, 4), torch.zeros(()), torch.full((2,), 3e38)]
    assert finite_here(good)
    assert not finite_here([*good, torch.tensor([1.0, bad])])


# --- the loss scale of fp16 ---


def scaler(dtype="float16"):
    return LossScaler(load_config([f"--dtype={dtype}"], world_size=1))


def update(scale, finite, times=1):
    for _ in range(times):
        scale.update(1.0, 1.0 if finite else math.inf)


def test_the_scale_stays_one_outside_fp16():
    scale = scaler("bfloat16")
    update(scale, True)
    update(scale, False)
    assert scale.value == 1 and scale.state_dict() == {}
    scale.load_state_dict({"value": 8.0, "good_steps": 3})  # the checkpoint of a run in fp16
    assert scale.value == 1


def test_an_overflow_halves_the_scale_and_many_good_steps_double_it():
    scale = scaler()
    update(scale, False)
    assert scale.value == INITIAL_SCALE / 2
    update(scale, True, GROWTH_INTERVAL - 1)
    assert scale.value == INITIAL_SCALE / 2
    update(scale, True)
    assert scale.value == INITIAL_SCALE
    update(scale, True, GROWTH_INTERVAL - 1)
    update(scale, False)
    update(scale, True, GROWTH_INTERVAL - 1)
    assert scale.value == INITIAL_SCALE / 2  # an overflow restarts the count
    update(scale, False, 100)
    assert scale.value == 1  # never below


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_loss_that_is_not_finite_counts_as_an_overflow_too(loss, norm):
    scale = scaler()
    scale.update(loss, norm)
    assert scale.value == INITIAL_SCALE / 2


def test_a_resumed_scale_continues_its_count():
    scale, resumed = scaler(), scaler()
    update(scale, False)
    update(scale, True)
    resumed.load_state_dict(scale.state_dict())
    assert (resumed.value, resumed.good_steps) == (INITIAL_SCALE / 2, 1)
    resumed.load_state_dict({})  # a checkpoint of a run in float32
    assert resumed.value == INITIAL_SCALE / 2
