"""Mixtures have exact shares and independent sources, and a batch depends on the step alone."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import mixed_loader
from data.fingerprint import check_same_data
from data.loader import Loader
from data.mixed_loader import SLOTS, MixedLoader, parse_sources, slot_counts, spread
from data.shards import open_shard, write_shard
from util.errors import UserError

VOCAB, T = 60_000, 8
GOLDEN = [
    168,
    20008,
    160,
    40000,
    96,
    20040,
    216,
    20032,
    104,
    40000,
]  # another order would break every run that is resumed
few = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of 40, 7 and 1 windows. A token shows its source."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, start, size in (("a", 0, 40 * T + 1), ("b", 20_000, 7 * T + 3), ("c", 40_000, T + 1)):
        tokens = np.arange(start, start + size)
        write_shard(folder / f"{name}_train_000000.bin", tokens[: T // 2], VOCAB)
        write_shard(folder / f"{name}_train_000001.bin", tokens[T // 2 :], VOCAB)
    return folder


def shards_of(folder, name):
    return [open_shard(path, VOCAB) for path in sorted(folder.glob(f"{name}_*.bin"))]


def make(folder, text="a=0.5:,b=0.3:,c=0.2:", batch=10, seed=1, shuffle=True, length=T):
    sources = parse_sources(text, "input_train_bin")
    shards = [shards_of(folder, source.name) for source in sources]
    return MixedLoader(sources, shards, length, batch, seed, shuffle, "input_train_bin")


def origin(rows):
    return (rows[:, 0] // 20_000).tolist()


# Shares

weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9).map(float), min_size=1, max_size=6)


@few
@given(weights=weights)
@example(weights=[1e308, 1e308, 5e307])
@example(weights=[1.0, 1.0, 1.0])
def test_slots_are_the_rounded_weights(weights):
    counts = slot_counts(weights)
    assert sum(counts) == SLOTS
    total = sum(w / max(weights) for w in weights)
    assert all(abs(c - SLOTS * (w / max(weights)) / total) < 1 for c, w in zip(counts, weights, strict=True))


@few
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=7))
@example(counts=[9500, 300, 199, 1])
def test_every_prefix_of_the_pattern_is_within_one_sample_of_the_shares(counts):
    slots, total = spread(counts), sum(counts)
    for m, count in enumerate(counts):
        had, t = np.cumsum(slots == m), np.arange(1, total + 1)
        assert had[-1] == count
        assert (np.abs(had * total - t * count) < total).all()


@few
@given(
    weights=st.lists(st.integers(1, 50), min_size=3, max_size=3),
    batch=st.integers(1, 300),
    first=st.integers(1, 10**6),
    steps=st.integers(1, 30),
)
def test_every_range_of_steps_has_the_shares(folder, weights, batch, first, steps):
    """A range is the difference of two prefixes, so it is off by less than two samples."""
    data = make(folder, ",".join(f"{name}={w}:" for name, w in zip("abc", weights, strict=True)), batch)
    source, _ = data.locate(np.arange((first - 1) * batch, (first - 1 + steps) * batch))
    for m, w in enumerate(weights):
        # Slots round a weight by less than one in SLOTS.
        bound = 2 + steps * batch / SLOTS
        assert abs((source == m).sum() - steps * batch * w / sum(weights)) < bound


def test_a_batch_divisible_by_the_weights_has_the_exact_shares(folder):
    data = make(folder)
    for step in (1, 2, 999, 1000, 1001):
        assert sorted(origin(data.batch(step))) == [0] * 5 + [1] * 3 + [2] * 2


# Samples


def test_a_source_yields_its_samples_in_order(folder, monkeypatch):
    """Compares with counting through the run, in which the pattern repeats often."""
    monkeypatch.setattr(mixed_loader, "SLOTS", 20)
    data = make(folder, batch=7)
    taken = [0, 0, 0]
    for step in range(1, 60):
        for row in data.batch(step):
            m = int(row[0]) // 20_000
            loader = data.loaders[m]
            assert torch.equal(row, torch.from_numpy(loader.samples(np.array([taken[m]])))[0])
            taken[m] += 1
    assert taken[1] > 7 * 7 and taken[2] > 10  # many epochs of the small sources


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_source_has_its_epochs(folder, shuffle):
    data = make(folder, batch=30, shuffle=shuffle)
    starts = {0: [], 1: [], 2: []}
    for step in range(1, 30):
        for token in data.batch(step)[:, 0].tolist():
            starts[token // 20_000].append(token % 20_000 // T)
    for m, windows in enumerate((40, 7, 1)):
        epochs = [starts[m][i : i + windows] for i in range(0, len(starts[m]) - windows, windows)]
        assert len(epochs) > 8 and all(sorted(epoch) == list(range(windows)) for epoch in epochs)
        if windows > 1:
            assert (len({tuple(epoch) for epoch in epochs}) > 8) == shuffle


def test_the_order_of_a_source_depends_on_seed_and_name_alone(folder):
    def order(data, m):
        rows = torch.cat([data.batch(step) for step in range(1, 24)])[:, 0]
        return rows[rows // 20_000 == m].tolist()[:60]

    assert order(make(folder), 1) == order(make(folder, "b=0.9:,a=0.1:", batch=4), 1)
    assert order(make(folder), 1) != order(make(folder, seed=2), 1)
    renamed = MixedLoader(parse_sources("z=1:", "f"), [shards_of(folder, "b")], T, 10, 1, True, "f")
    assert order(make(folder), 1) != order(renamed, 1)


@few
@given(steps=st.lists(st.integers(1, 3000), min_size=1, max_size=6), parts=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_batch_depends_on_the_step_alone_and_its_parts_concatenate(folder, steps, parts):
    data, other = make(folder, batch=12), make(folder, batch=12)
    batches = {step: other.batch(step) for step in reversed(steps)}
    for step in steps:
        whole = batches[step]
        assert whole.shape == (12, T + 1) and whole.dtype == torch.int32
        assert torch.equal(torch.cat([data.batch(step, part, parts) for part in range(parts)]), whole)


def test_the_samples_of_a_mixture_never_change_silently(folder):
    assert make(folder, seed=1337).batch(77)[:, 0].tolist() == GOLDEN


# The flag


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a=0.7:x/*.bin,b=0.3:y/*.bin", [("a", 0.7, "x/*.bin"), ("b", 0.3, "y/*.bin")]),
        ("b=3:y, a=7e-1:x", [("a", 0.7, "x"), ("b", 3.0, "y")]),
        ("only=1:x/{1,2}.bin", [("only", 1.0, "x/{1,2}.bin")]),
        ("a=1:x,y/z,b=2:c=d,e:f", [("a", 1.0, "x,y/z"), ("b", 2.0, "c=d,e:f")]),
        ("data/*.bin", []),
        ("data/a=1:b/*.bin", []),  # a folder named a=1:b
        ("x,y=z/*.bin", []),
        ("=1:x", []),
    ],
)
def test_the_flag_is_one_glob_or_several_with_weights(text, expected):
    assert parse_sources(text, "input_train_bin") == expected


def test_a_tilde_is_expanded_in_each_glob(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [s.pattern for s in parse_sources("a=1:~/x,b=1:~/y", "f")] == ["/home/me/x", "/home/me/y"]


def test_an_existing_file_is_not_parsed_as_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1:x.bin").write_bytes(b"")
    assert parse_sources("a=1:x.bin", "f") == []


@pytest.mark.parametrize("number", ["0", "-0.3", "nan", "inf", "x", "", "1e999", "0x1"])
def test_a_weight_must_be_a_positive_number(number):
    with pytest.raises(UserError, match="^--input_train_bin: the weight of b is "):
        parse_sources(f"a=0.7:x,b={number}:y", "input_train_bin")


def test_a_repeated_name_is_an_error():
    with pytest.raises(UserError, match="two sources are named a"):
        parse_sources("a=0.7:x,a=0.3:y", "input_train_bin")


def test_a_source_needs_a_window_and_a_sample(folder):
    with pytest.raises(UserError, match=r"^--input_train_bin: source c has 9 tokens, too few for one window of 10;"):
        make(folder, length=9)
    with pytest.raises(UserError, match="the weight of b is less than one sample in 10,000"):
        make(folder, "a=1:,b=1e-6:")


def test_describe_prints_share_tokens_and_epochs(folder):
    lines = make(folder, "a=3:,b=1:").describe(28).splitlines()
    assert lines == [
        "a: 75.00% of the samples, 321 tokens, 5.25 epochs",
        "b: 25.00% of the samples, 59 tokens, 10 epochs",
    ]


# Resuming


def identity(folder, *args, **kwargs):
    return json.loads(json.dumps(make(folder, *args, **kwargs).fingerprint))  # as in a checkpoint


def test_the_same_mixture_is_accepted_however_it_is_written(folder):
    for text in ("c=0.2:,a=0.5:,b=0.3:", "a=5:,b=3:,c=2:"):
        check_same_data(identity(folder), make(folder, text).fingerprint)
        assert torch.equal(make(folder).batch(9), make(folder, text).batch(9))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a=0.5:,b=0.2:,c=0.3:", "source b has a share of 0.2, but the checkpoint was trained with 0.3;"),
        ("a=0.7:,b=0.3:", "source c belongs to the checkpoint and is missing now;"),
    ],
)
def test_another_mixture_is_refused_by_name(folder, text, message):
    with pytest.raises(UserError, match=message):
        check_same_data(identity(folder), make(folder, text).fingerprint)
    with pytest.raises(UserError, match="source (b has a share|c is new)"):
        check_same_data(identity(folder, text), make(folder).fingerprint)


def test_a_mixture_does_not_resume_as_a_glob(folder):
    one = Loader(shards_of(folder, "a"), T, 10, 1, True, "input_train_bin").fingerprint
    with pytest.raises(UserError, match="^--input_train_bin: a single glob .* belongs to the checkpoint"):
        check_same_data(one, identity(folder, "a=1:"))
    with pytest.raises(UserError, match="^--input_train_bin: a single glob .* is new"):
        check_same_data(identity(folder, "a=1:"), one)


def test_a_changed_shard_is_refused_with_its_source(folder):
    saved, now = identity(folder), identity(folder)
    now["sources"][1]["shards"][0]["ends"] = "0"
    with pytest.raises(UserError, match="source b: b_train_000000.bin is not the file"):
        check_same_data(saved, now)
    with pytest.raises(UserError, match="^--seed=2,"):
        check_same_data(saved, identity(folder, seed=2))


def test_the_fingerprint_of_one_glob_keeps_its_keys(folder):
    identity = Loader(shards_of(folder, "b"), T, 2, 1, True, "input_train_bin").fingerprint
    assert list(identity) == ["seed", "sequence_length", "total_batch_size", "shuffle", "shards"]
    assert [list(row) for row in identity["shards"]] == [["name", "tokens", "ends"]] * 2
