"""The loss scale of fp16: halves on an overflow, doubles after a long calm, and survives a checkpoint."""

from train.scaling import GROWTH_INTERVAL, START, LossScale


def test_it_is_one_and_stays_one_outside_fp16():
    scale = LossScale(enabled=False)
    for finite in (True, False):
        scale.update(finite)
    assert scale.value == 1 and scale.state_dict() == {}
    scale.load_state_dict({"value": 8.0, "good_steps": 3})  # of a run that went on in another dtype
    assert scale.value == 1


def test_an_overflow_halves_it_and_calm_doubles_it():
    scale = LossScale(enabled=True)
    scale.update(False)
    assert scale.value == START / 2
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(True)
    assert scale.value == START / 2
    scale.update(True)
    assert scale.value == START
    for finite in [True] * (GROWTH_INTERVAL - 1) + [False] + [True] * (GROWTH_INTERVAL - 1):
        scale.update(finite)
    assert scale.value == START / 2  # an overflow restarts the count
    for _ in range(100):
        scale.update(False)
    assert scale.value == 1  # and not zero


def test_a_resumed_scale_counts_on():
    scale = LossScale(enabled=True)
    scale.update(False)
    scale.update(True)
    resumed = LossScale(enabled=True)
    resumed.load_state_dict(scale.state_dict())
    assert (resumed.value, resumed.good_steps) == (START / 2, 1)
    resumed.load_state_dict({})  # a checkpoint of a run in float32
    assert resumed.value == START / 2
