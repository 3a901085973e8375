"""Who is to blame for a hang, from what the ranks last said."""

from train.watchdog import OVERDUE, _blame

WAITS = [OVERDUE, "step 7", "train_gpt.py:300 (train_step)"]


def test_a_silent_rank_is_named_with_where_it_was_last():
    told = {0: WAITS, 1: [3, "step 7", "data/loader.py:200 (samples)"], 2: WAITS}
    assert _blame([1], told).startswith("rank 1 does not answer, last seen in step 7 at data/loader.py:200 (samples)")


def test_if_all_live_it_is_the_one_that_is_elsewhere():
    told = {0: WAITS, 1: WAITS, 2: [OVERDUE, "step 7", "data/loader.py:200 (samples)"]}
    assert _blame([], told) == (
        "rank 2 is at data/loader.py:200 (samples) in step 7, 2 wait at train_gpt.py:300 (train_step) in step 7"
    )


def test_if_all_are_in_one_place_it_is_the_network():
    assert _blame([], {0: WAITS, 1: WAITS}) == "all ranks wait at train_gpt.py:300 (train_step) in step 7"
