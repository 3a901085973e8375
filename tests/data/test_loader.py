"""The loader is a pure function of the step and loses no window, for any ranks, shards and order of calls."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import loader as loader_module
from data import permutation
from data.loader import Loader, Prefetcher, TokenStream, inputs_and_targets, sample_numbers
from data.shards import open_shard, write_shard
from tests.reference import permuted
from util.errors import UserError

VOCAB = 60_000
# Another order would break every run that is resumed.
GOLDEN_SAMPLES = [(0, 28), (0, 39), (0, 13), (0, 26), (0, 12), (0, 4), (0, 2), (1, 6), (1, 39)]
few = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder shared by the examples of a property."""
    return tmp_path_factory.mktemp("loader")


def make_shards(folder, *sizes):
    """Writes shards of the given sizes that count on, so that a token shows its position."""
    paths, at = [], 0
    for i, size in enumerate(sizes):
        paths.append(folder / f"x_train_{i:06d}.bin")
        write_shard(paths[-1], np.arange(at, at + size) % VOCAB, VOCAB)
        at += size
    return [open_shard(path, VOCAB) for path in paths]


def make_loader(folder, *sizes, T=8, batch=4, seed=1, shuffle=True):
    return Loader(make_shards(folder, *sizes), T, batch, seed, shuffle, "input_train_bin")


def sample_ids(data, step):
    """Returns epoch and window of each sequence of step's global batch, in order."""
    epochs, windows = data.locate(sample_numbers(step, data.sequences_per_batch, 0, 1))
    return list(zip(epochs.tolist(), windows.tolist(), strict=True))


def window(start, T=8):
    return list(range(start, start + T + 1))


# Order


def test_the_samples_of_a_run_never_change_silently(folder):
    data = make_loader(folder, 8 * 50 + 1, batch=20, seed=1337)
    assert sample_ids(data, 1)[:5] + sample_ids(data, 3)[8:12] == GOLDEN_SAMPLES


@few
@given(
    windows=st.integers(1, 300),
    batch=st.integers(1, 50),
    step=st.integers(1, 200),
    seed=st.integers(0, 2**63 - 1),
    block=st.sampled_from([1, 7, 2**14]),
)
def test_the_order_equals_an_independent_implementation(folder, windows, batch, step, seed, block):
    """Checkpoints of earlier versions resume with this order."""
    batch = min(batch, windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "BLOCK", block)  # the size of a block must not change the result
        permutation.permuted_block.cache_clear()
        data = make_loader(folder, windows * 8 + 1, batch=batch, seed=seed)
        expected = []
        for k in range((step - 1) * batch, step * batch):
            epoch, place = divmod(k, windows)
            expected.append((epoch, permuted(place, windows, f"{seed}:{epoch}")))
        assert sample_ids(data, step) == expected
        assert data.batch(step).tolist() == [window(8 * place) for _, place in expected]
    permutation.permuted_block.cache_clear()


def test_epochs_and_seeds_have_different_orders(folder):
    orders = []
    for seed in (1, 2):
        data = make_loader(folder, 8 * 40 + 1, batch=40, seed=seed)
        orders += [tuple(place for _, place in sample_ids(data, step)) for step in (1, 2, 3)]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(40)) for order in orders)


@few
@given(windows=st.integers(1, 60), batch=st.integers(1, 60), shuffle=st.booleans())
def test_every_window_occurs_once_per_epoch(folder, windows, batch, shuffle):
    batch = min(batch, windows)
    data = make_loader(folder, windows * 8 + 1, batch=batch, shuffle=shuffle)
    epochs = {}
    for step in range(1, 3 * windows // batch + 2):
        for epoch, place in sample_ids(data, step):
            epochs.setdefault(epoch, []).append(place)
    assert list(epochs) == sorted(epochs)
    for epoch in (0, 1, 2):  # complete epochs, which need not end at the end of a step
        assert sorted(epochs[epoch]) == list(range(windows))


def test_without_shuffling_windows_are_in_file_order(folder):
    data = make_loader(folder, 8 * 10 + 5, batch=4, shuffle=False)
    starts = [row[0] for step in (1, 2, 3) for row in data.batch(step).tolist()]
    assert starts == [8 * (i % 10) for i in range(12)]


# Batches


def test_a_batch_contains_the_windows_of_locate(folder):
    data = make_loader(folder, 300, 100, 7, 200)
    for step in (1, 5, 50):
        rows = data.batch(step)
        assert rows.dtype == torch.int32 and rows.shape == (4, 9)
        assert rows.tolist() == [window(8 * place) for _, place in sample_ids(data, step)]


@few
@given(steps=st.lists(st.integers(1, 500), min_size=1, max_size=12))
def test_a_batch_depends_on_the_step_alone(folder, steps):
    shards = make_shards(folder, 300, 100)
    new = lambda: Loader(shards, 8, 4, 1, True, "input_train_bin")  # noqa: E731
    data = new()
    for step in steps:
        assert torch.equal(data.batch(step), new().batch(step))


@few
@given(step=st.integers(1, 100), ranks=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 3, 6]))
def test_the_parts_concatenated_are_the_batch(folder, step, ranks, micro):
    data = make_loader(folder, 999, batch=24)
    parts = ranks * micro
    pieces = [data.batch(step, part, parts) for part in range(parts)]
    assert all(len(piece) == 24 // parts for piece in pieces)
    assert torch.equal(torch.cat(pieces), data.batch(step))


@few
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), T=st.integers(1, 25), data=st.data())
def test_windows_across_shards_are_slices_of_the_stream(folder, sizes, T, data):
    shards = make_shards(folder, *sizes)
    whole = list(range(sum(sizes)))
    if len(whole) <= T:
        with pytest.raises(UserError):
            Loader(shards, T, 1, 1, True, "input_train_bin")
        return
    loader = Loader(shards, T, 1, 1, True, "input_train_bin")
    assert loader.windows == (len(whole) - 1) // T
    for i, row in enumerate(loader.gather(list(range(loader.windows))).tolist()):
        assert row == whole[i * T : i * T + T + 1]
    start = data.draw(st.integers(0, len(whole) - 1))
    out = np.empty(data.draw(st.integers(0, len(whole) - start)), np.int32)
    loader.stream.read_into(out, start)
    assert out.tolist() == whole[start : start + len(out)]
    loader.stream.close()


@few
@given(sizes=st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=8), T=st.integers(1, 25))
def test_shards_of_both_dtypes_form_one_stream(folder, sizes, T):
    at, shards = 0, []
    for i, (size, wide) in enumerate(sizes):
        path = folder / f"mixed_train_{i:06d}.bin"
        write_shard(path, np.arange(at, at + size), 2**17 if wide else VOCAB)
        shards.append(open_shard(path, VOCAB))
        at += size
    if at > T:
        data = Loader(shards, T, 1, 1, True, "input_train_bin")
        assert data.gather(list(range(data.windows))).tolist() == [window(i * T, T) for i in range(data.windows)]
        data.stream.close()


@pytest.mark.parametrize("place", [0, 17, 999_999, 1_500_000, 2_999_900])
def test_an_id_outside_the_vocabulary_is_reported_with_its_position(tmp_path, place):
    """At positions that the check at the start skips: inside a window, and where a window crosses shards."""
    make_shards(tmp_path, 999_990, 3_000_000)
    path = tmp_path / "x_train_000001.bin"
    shards = [open_shard(tmp_path / "x_train_000000.bin", VOCAB), open_shard(path, VOCAB)]
    with open(path, "r+b") as f:
        f.seek(1024 + 2 * place)
        f.write(VOCAB.to_bytes(2, "little"))  # the first id that is too large
    data = Loader(shards, 100, 32, 1, True, "input_train_bin")
    window = (999_990 + place) // 100
    with pytest.raises(UserError, match=f"x_train_000001.bin: token id 60000 at position {place} is not below"):
        data.gather([5, window, 3])


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    data = make_loader(tmp_path, 300, batch=16)
    whole = data.batch(3)

    def less(fd, buffers, offset):
        (row,) = buffers
        row[:] = 0
        return len(os.pread(fd, 5, offset))

    monkeypatch.setattr(os, "preadv", less)
    assert torch.equal(data.batch(3), whole)


@pytest.mark.parametrize("tokens, fits", [(33, True), (32, False), (1, False), (0, False)])
def test_data_smaller_than_one_batch_is_an_error(folder, tokens, fits):
    if fits:
        assert make_loader(folder, tokens).windows == 4
        return
    with pytest.raises(UserError, match=rf"^--input_train_bin has {tokens} tokens, too few for one batch of 33;"):
        make_loader(folder, tokens)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_the_number_of_open_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_OPEN_FILES", 5)
    data = make_loader(tmp_path, *[10] * 40, batch=10)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(1, 40):
        assert data.batch(step).tolist() == [window(8 * place) for _, place in sample_ids(data, step)]
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    data.stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_shards_than_open_files_are_read_correctly(tmp_path):
    count = loader_module.MAX_OPEN_FILES + 20
    data = make_loader(tmp_path, *[9] * count, batch=count, shuffle=False)
    assert data.batch(1).tolist() == [window(8 * i) for i in range(count)]
    assert data.batch(1).tolist() == [window(8 * i) for i in range(count)]


def test_a_shard_truncated_during_a_run_is_named(tmp_path):
    data = make_loader(tmp_path, 100, 100, shuffle=False, batch=24)
    os.truncate(tmp_path / "x_train_000001.bin", 1024 + 100)
    with pytest.raises(UserError, match="x_train_000001.bin"):
        data.batch(1)


def test_a_shard_removed_during_a_run_is_named(tmp_path):
    data = make_loader(tmp_path, 100, 100, shuffle=False, batch=24)
    (tmp_path / "x_train_000001.bin").unlink()
    with pytest.raises(UserError, match="x_train_000001.bin"):
        data.batch(1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_resident_memory_does_not_grow_with_steps(tmp_path):
    data = make_loader(tmp_path, *[4_000_000] * 4, T=1024, batch=8)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    prefetcher = Prefetcher(lambda step: inputs_and_targets(data, step, 0, 1), pin=False)
    for step in range(1, 101):
        prefetcher.get(step)
    before = resident()
    for step in range(101, 2101):  # reads all 32 MB once
        prefetcher.get(step)
    grown = resident() - before
    prefetcher.close()
    assert grown < 4e6, f"{grown / 1e6:.1f} MB"


def test_the_fingerprint_covers_empty_and_short_shards(tmp_path):
    rows = TokenStream(make_shards(tmp_path, 0, 3, 30)).shard_fingerprints()
    assert [row["tokens"] for row in rows] == [0, 3, 30]
    assert len({row["ends"] for row in rows}) == 3


# Prefetching


@few
@given(steps=st.lists(st.integers(1, 40), min_size=1, max_size=15))
@example(steps=list(range(1, 16)))
@example(steps=[3, 3, 4, 9, 1, 2])
def test_prefetched_batches_belong_to_the_requested_steps(steps):
    prefetcher = Prefetcher(lambda step: torch.tensor([step, -step]), pin=False)
    assert [prefetcher.get(step).tolist() for step in steps] == [[step, -step] for step in steps]
    prefetcher.close()


def test_the_next_batch_is_made_once_in_another_thread():
    made, ready = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 2:
            ready.set()
        return torch.tensor(step)

    prefetcher = Prefetcher(make, pin=False)
    prefetcher.get(1)
    assert ready.wait(10)  # nobody has called get(2) yet
    prefetcher.get(2)
    prefetcher.close()
    assert made[:2] == [(1, False), (2, False)]


def test_an_error_while_prefetching_is_raised_at_its_step():
    def make(step):
        if step == 3:
            raise UserError("x_train_000001.bin: gone")
        return torch.tensor(step)

    prefetcher = Prefetcher(make, pin=False)
    assert [prefetcher.get(step).item() for step in (1, 2)] == [1, 2]
    with pytest.raises(UserError, match="gone"):
        prefetcher.get(3)
    prefetcher.close()
