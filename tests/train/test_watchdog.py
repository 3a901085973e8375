"""Finding the rank that blocks the others from the last heartbeats."""

from train.watchdog import OVERDUE, _diagnose

WAITS = [OVERDUE, "step 7", "train_gpt.py:300 (train_step)"]


def test_a_silent_rank_is_named_with_its_last_place():
    told = {0: WAITS, 1: [3, "step 7", "data/loader.py:200 (samples)"], 2: WAITS}
    assert _diagnose([1], told).startswith(
        "rank 1 does not answer, last seen in step 7 at data/loader.py:200 (samples)"
    )


def test_if_all_ranks_answer_the_one_at_another_place_is_named():
    told = {0: WAITS, 1: WAITS, 2: [OVERDUE, "step 7", "data/loader.py:200 (samples)"]}
    assert _diagnose([], told) == (
        "rank 2 is at data/loader.py:200 (samples) in step 7, 2 wait at train_gpt.py:300 (train_step) in step 7"
    )


def test_if_all_ranks_are_at_one_place_none_is_named():
    assert _diagnose([], {0: WAITS, 1: WAITS}) == "all ranks wait at train_gpt.py:300 (train_step) in step 7"
