"""Down-sampling keeps every extreme, and smoothing is the weighted mean that it claims to be."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.reporting.downsample import rows_to_show, smooth, spread


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3000), most=st.integers(10, 400), columns=st.integers(1, 3))
def test_extremes_first_and_last_are_kept(seed, count, most, columns):
    rng = np.random.default_rng(seed)
    data = [np.where(rng.random(count) < 0.1, math.nan, rng.normal(size=count)) for _ in range(columns)]
    rows = rows_to_show(data, most)
    assert (np.diff(rows) > 0).all() and rows[0] == 0 and rows[-1] == count - 1
    if count <= most:
        assert len(rows) == count
    assert len(rows) <= max(most, 2 * columns) + most // (2 * columns) + 3
    for column in data:
        if not np.isnan(column).all():
            assert np.nanmin(column[rows]) == np.nanmin(column) and np.nanmax(column[rows]) == np.nanmax(column)


def test_every_spike_of_a_long_run_is_kept():
    loss, norm = np.ones(100_000), np.ones(100_000)
    spikes = np.arange(37, 100_000, 1500)
    loss[spikes[::2]] += np.arange(len(spikes[::2])) + 1
    norm[spikes[1::2]] -= np.arange(len(spikes[1::2])) / 100 + 0.01
    assert np.isin(spikes, rows_to_show([loss, norm], 4000)).all()


def test_no_rows_give_no_rows():
    assert len(rows_to_show([], 10)) == 0 and len(rows_to_show([np.empty(0)], 10)) == 0


def test_spread_keeps_the_ends():
    assert spread(np.arange(1000), 5).tolist() == [0, 249, 499, 749, 999]
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("span", [0.0, 1.0, 7.5])
def test_smoothing_is_a_mean_with_exponential_weights(span):
    values = np.random.default_rng(0).normal(size=60)
    values[[4, 5, 20]] = math.nan
    found = smooth(values, span)
    for i in range(60):
        if math.isnan(values[i]):
            assert math.isnan(found[i])
            continue
        past = values[: i + 1][~np.isnan(values[: i + 1])]
        age = np.arange(len(past))[::-1]
        weights = np.exp(-age / span) if span else (age == 0).astype(float)
        assert found[i] == pytest.approx((past * weights).sum() / weights.sum(), rel=1e-12)
