"""The permutation of an epoch is a bijection, looks random, and never changes."""

import hashlib

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.permutation import permute

GOLDEN_START = [864, 995, 464, 278, 292, 327, 99, 643]
GOLDEN_HASH = "722744635a0c89082632f1b2a95afb9f28d0286315fae21662652d6c802a6a80"
few = settings(max_examples=60, deadline=None)


@few
@given(n=st.integers(1, 3000), key=st.text(max_size=20))
@example(n=1, key="")
@example(n=2, key="1:0")
@example(n=2048, key="1:0")
@example(n=2049, key="1:0")
def test_a_permutation_is_a_bijection(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@few
@given(n=st.integers(1, 2**40), data=st.data())
def test_a_permutation_of_any_size_is_computed_point_by_point(n, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), np.uint64)
    there = permute(index, n, "key")
    assert (there < n).all()
    assert len(set(there.tolist())) == len(set(index.tolist()))
    assert [int(permute(i, n, "key")) for i in index] == there.tolist()
    assert index.tolist() == index.copy().tolist() and permute(index.reshape(-1, 1), n, "key").shape == (len(index), 1)


def test_a_permutation_looks_random():
    n, offsets = 1000, []
    for key in range(20):
        order = permute(np.arange(n), n, str(key)).astype(int)
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.15
        offsets.append(order[0])
    assert len(set(offsets)) > 15


def test_the_order_never_changes_silently():
    """Another order would break every run that is resumed."""
    order = permute(np.arange(1000), 1000, "1337:0")
    assert order[:8].tolist() == GOLDEN_START
    assert hashlib.sha256(order.astype("<u8").tobytes()).hexdigest() == GOLDEN_HASH
