"""Parts that are prepared separately and joined equal a single run byte for byte."""

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare import parts as joining
from data.prepare import sources
from data.prepare.inputs import ReadOptions
from data.prepare.job import prepare
from data.prepare.parts import find_parts, join_parts, parse_part, part_dir, part_of
from data.prepare.sources import WorkUnit, plan
from util.errors import UserError

few = settings(max_examples=100, deadline=None)
TEXTS = [f"Document number {i}, of no great length{' or not' * (i % 7)}." for i in range(60)]


@pytest.fixture
def units(tmp_path, monkeypatch, write_input):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    path = write_input(tmp_path, ".jsonl", [*TEXTS[:30], "", *TEXTS[30:]])
    return plan([str(path)], ReadOptions())


def make_parts(job, units, n, which=None):
    for k in which or range(1, n + 1):
        prepare(*part_of(job, units, k, n))


@few
@given(sizes=st.lists(st.integers(0, 10**12), max_size=50), n=st.integers(1, 70))
def test_parts_cover_all_units_once_in_order_and_evenly(tmp_path_factory, make_job, sizes, n):
    units = [WorkUnit(str(i), 0, 1, size) for i, size in enumerate(sizes)]
    shares = [part_of(make_job(tmp_path_factory.getbasetemp()), units, k, n)[1] for k in range(1, n + 1)]
    assert sum(shares, []) == units
    if sum(sizes):
        assert all(sum(u.size for u in share) <= sum(sizes) / n + 2 * max(sizes) for share in shares)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 313}, {"val_tenth": True, "val_tokens": 10**6}], ids=str)
def test_joined_parts_equal_a_single_run(tmp_path, make_job, units, content, n, settings):
    job = make_job(tmp_path / "one", **{"shard_size": 101, "val_tokens": 50, **settings})
    prepare(job, units)
    parted = replace(job, output_dir=tmp_path / "parted")
    make_parts(parted, units, n)
    assert len(os.listdir(tmp_path / "parted")) == n and not list((tmp_path / "parted").glob("*.bin"))
    made = join_parts(parted)
    one, joined = content(tmp_path / "one"), content(tmp_path / "parted")
    if settings.get("max_tokens"):  # skipped documents are counted per unit
        del one["manifest.json"], joined["manifest.json"]
    assert one == joined and made["documents"] <= 60
    assert join_parts(parted) is None


def test_a_part_does_not_look_like_shards_and_is_made_once(tmp_path, make_job, units):
    job = make_job(tmp_path / "out")
    make_parts(job, units, 3, [2])
    names = os.listdir(tmp_path / "out/part_2_of_3")
    assert sorted(names) == ["manifest.json", "piece_000000.bin"]
    assert prepare(*part_of(job, units, 2, 3)) is None


def test_names_of_parts_sort_in_order(tmp_path):
    names = [part_dir(tmp_path, k, 16).name for k in (2, 10)]
    assert names == ["part_02_of_16", "part_10_of_16"]


@pytest.mark.parametrize("text, part", [("1/1", (1, 1)), ("3/16", (3, 16)), ("16/16", (16, 16))])
def test_part_numbers_are_parsed(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5", "1.5/3"])
def test_invalid_part_numbers_are_errors(text):
    with pytest.raises(UserError, match=f"--part={text} must be K/N"):
        parse_part(text)


def test_missing_and_foreign_parts_are_named(tmp_path, make_job, units):
    job = make_job(tmp_path / "out")
    with pytest.raises(UserError, match="does not contain parts; prepare them with --part=1/N"):
        join_parts(job)
    make_parts(job, units, 3, [1, 3])
    with pytest.raises(UserError, match="part 2/3 is not finished; run its command with --part=2/3"):
        join_parts(job)
    make_parts(replace(job, recipe={"of": "other"}), units, 3, [2])
    with pytest.raises(UserError, match="part_2_of_3 was made from other input or options"):
        join_parts(job)
    make_parts(job, units, 2, [1])
    with pytest.raises(UserError, match="holds parts of 2 and of 3"):
        join_parts(job)
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_part_is_not_joined(tmp_path, make_job, units, damage):
    job = make_job(tmp_path / "out")
    make_parts(job, units, 2)
    piece = tmp_path / "out/part_2_of_2/piece_000000.bin"
    if damage == "missing":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(UserError, match="piece_000000.bin is"):
        join_parts(job)
    assert not list((tmp_path / "out").glob("*.bin")) and find_parts(job)


def test_parts_without_text_are_an_error(tmp_path, make_job, write_input):
    job = make_job(tmp_path / "out")
    make_parts(job, plan([str(write_input(tmp_path, ".jsonl", ["", ""]))], ReadOptions()), 2)
    with pytest.raises(UserError, match="the parts contain no text"):
        join_parts(job)


@pytest.mark.parametrize("nth", range(6))
def test_an_interrupted_join_is_repeated(tmp_path, monkeypatch, make_job, units, content, nth):
    job = make_job(tmp_path / "one", shard_size=200, val_tokens=50)
    prepare(job, units)
    parted = replace(job, output_dir=tmp_path / "parted")
    make_parts(parted, units, 3)
    calls, real = [], os.replace

    def interrupt(*args):
        calls.append(args)
        if len(calls) > nth:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt)
        join_parts(parted)
    join_parts(parted)
    assert content(tmp_path / "parted") == content(tmp_path / "one")


@pytest.mark.parametrize("nth", range(1, 5))
def test_parts_are_removed_wherever_the_join_was_interrupted(tmp_path, monkeypatch, make_job, units, nth):
    job = make_job(tmp_path, shard_size=200, val_tokens=50)
    make_parts(job, units, 3)
    removed, real = [], joining.shutil.rmtree

    def interrupt(path, *args, **options):
        removed.append(path)
        if len(removed) == nth:
            raise KeyboardInterrupt
        return real(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(joining.shutil, "rmtree", interrupt)
        join_parts(job)
    join_parts(job)
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_parts_of_another_data_set_are_kept(tmp_path, make_job, units):
    job = make_job(tmp_path / "out")
    make_parts(job, units, 2)
    join_parts(job)
    make_parts(make_job(tmp_path / "out", recipe={"of": "other"}), units, 2, [1])
    assert join_parts(job) is None
    assert (tmp_path / "out" / "part_1_of_2" / "manifest.json").exists()
