"""The numbers of a report equal those recomputed from metrics.jsonl."""

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.reporting import tables
from scripts.reporting.compare import (
    compare,
    default_span,
    differing_flags,
    gpu_hours,
    reach_losses,
    seed_groups,
    summarize,
)
from scripts.reporting.page import page_data
from scripts.reporting.read import open_runs
from tests.scripts.reporting.make_runs import FLOPS_PER_TOKEN, record, write_facts, write_run

LOSSES = st.none() | st.floats(0.01, 20)
RECORDS = st.lists(
    st.tuples(LOSSES, st.floats(0.5, 20), st.floats(1e3, 1e7), st.integers(1, 2**40), st.booleans()),
    min_size=1,
    max_size=60,
)


def runs_of(*folders):
    readers = open_runs(list(folders))
    for reader in readers:
        reader.update()
    return [reader.run for reader in readers]


def percentile(values, share):
    """Returns a percentile by linear interpolation between the sorted values."""
    ordered, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


@settings(max_examples=30, deadline=None)
@given(rows=RECORDS)
def test_the_summary_and_the_curves_are_recomputed_from_the_file(tmp_path_factory, rows):
    records = [
        record(k, loss, tok_per_s=speed, memory_bytes=memory, **({"val_loss": val} if evaluated else {}))
        for k, (loss, val, speed, memory, evaluated) in enumerate(rows, 1)
    ]
    folder = write_run(tmp_path_factory.mktemp("run"), records)
    write_facts(folder, [0])
    runs = runs_of(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    s = summarize(runs[0], price=2.5)
    for name in ("loss", "val_loss"):
        values = [r[name] for r in lines if r.get(name) is not None]
        first_last_best = (values[0], values[-1], min(values)) if values else (None, None, None)
        assert (s[f"{name}_first"], s[f"{name}_last"], s[f"{name}_best"]) == first_last_best
        if values:
            assert s[f"{name}_best_step"] == next(r["step"] for r in lines if r.get(name) == min(values))
    speeds = [r["tok_per_s"] for r in lines]
    assert s["tok_per_s_median"] == pytest.approx(statistics.median(speeds), rel=1e-12)
    assert s["tok_per_s_p5"] == pytest.approx(percentile(speeds, 0.05), rel=1e-12)
    assert s["memory_peak"] == max(r["memory_bytes"] for r in lines)
    assert (s["step"], s["tokens"], s["elapsed_s"]) == tuple(lines[-1][n] for n in ("step", "tokens", "elapsed_s"))
    assert s["gpu_hours"] == pytest.approx(8 * lines[-1]["elapsed_s"] / 3600) and s["cost"] == 2.5 * s["gpu_hours"]
    data = page_data(runs, 2.5, None, 50.0)["runs"][0]
    assert data["x"]["step"] == [r["step"] for r in lines]
    assert data["x"]["tokens"] == pytest.approx([r["tokens"] for r in lines], rel=1e-6)
    assert curve(data, "tok_per_s") == pytest.approx(speeds, rel=1e-6)
    for name in ("loss", "val_loss"):
        expected = [r.get(name) for r in lines]
        if any(value is not None for value in expected):
            assert curve(data, name) == [None if v is None else pytest.approx(v, rel=1e-6) for v in expected]


def curve(data, name):
    """Returns the values of a curve at every row of the page's data."""
    packed = data["series"][name]
    if isinstance(packed, list):
        return packed
    found = [None] * len(data["x"]["step"])
    for at, value in zip(packed["at"], packed["values"], strict=True):
        found[at] = value
    return found


def test_gpu_hours_follow_the_number_of_ranks(tmp_path):
    folder = write_run(tmp_path / "run", [record(k, 3.0, elapsed_s=3600.0 * k) for k in range(1, 11)])
    starts = [{"step": 0, "ranks": 8}, {"step": 6, "ranks": 2}, {"step": 4, "ranks": 4}]  # step 5 and later: 4 ranks
    (folder / "run.json").write_text(json.dumps({"starts": starts}))
    assert gpu_hours(runs_of(folder)[0]).tolist() == [8, 16, 24, 32, 36, 40, 44, 48, 52, 56]


def test_gpu_hours_are_unknown_without_the_number_of_ranks(tmp_path):
    run = runs_of(write_run(tmp_path / "run", [record(1, 3.0)]))[0]
    assert summarize(run, price=2.0)["gpu_hours"] is None and summarize(run, price=2.0)["cost"] is None


def test_losses_are_reached_at_the_first_record_at_or_below_them(tmp_path):
    slow = write_run(tmp_path / "slow", [record(k, 9.0, val_loss=5 - k / 10) for k in range(10, 41, 10)])
    fast = write_run(
        tmp_path / "fast", [record(k, 9.0, val_loss=5 - k / 5, elapsed_s=k * 1.0) for k in range(10, 21, 10)]
    )
    runs = runs_of(slow, fast)
    found = reach_losses(runs, [3.0, 1.0, 0.5], 50.0)
    assert found["loss"] == "validation loss"
    at_3, at_1, never = (row["runs"] for row in found["targets"])
    assert [entry["step"] for entry in at_3] == [20, 10] and [entry["step"] for entry in at_1] == [40, 20]
    assert at_3[1]["tokens_ratio"] == 0.5 and at_3[1]["elapsed_s_ratio"] == 10 / 5
    assert [entry["step"] for entry in never] == [None, None] and never[1]["tokens_ratio"] is None


def test_chosen_losses_are_reached_by_every_run(tmp_path):
    folders = [
        write_run(tmp_path / name, [record(k, 9.0, val_loss=start - k * slope) for k in range(1, 30)])
        for name, start, slope in (("a", 10.9, 0.2), ("b", 10.8, 0.15), ("c", 11.0, 0.3))
    ]
    for row in reach_losses(runs_of(*folders), None, 50.0)["targets"]:
        assert all(entry["step"] for entry in row["runs"])


def test_without_validation_the_smoothed_training_loss_is_compared(tmp_path):
    a = write_run(tmp_path / "a", [record(k, 5 - k / 10, val_loss=2.0) for k in range(1, 20)])
    b = write_run(tmp_path / "b", [record(k, 5 - k / 10) for k in range(1, 20)])
    assert reach_losses(runs_of(a, b), [4.0], 5.0)["loss"] == "training loss, smoothed"


def test_only_flags_that_differ_are_listed(tmp_path):
    a = write_run(tmp_path / "a", [record(1, 5.0)], n_layer=2, learning_rate=1e-3)
    b = write_run(tmp_path / "b", [record(1, 5.0)], n_layer=2, learning_rate=2e-3, mlp="swiglu")
    assert differing_flags(runs_of(a, b)) == {"learning_rate": [1e-3, 2e-3], "mlp": [None, "swiglu"]}


def test_seeds_of_one_setting_are_averaged(tmp_path):
    losses = [3.1, 3.3, 3.2]
    folders = [write_run(tmp_path / f"s{i}", [record(9, 5.0, val_loss=x)], seed=i) for i, x in enumerate(losses)]
    other = write_run(tmp_path / "other", [record(9, 5.0, val_loss=9.0)], seed=7, n_layer=3)
    unfinished = write_run(tmp_path / "unfinished", [record(8, 5.0, val_loss=9.0)], seed=8, num_iterations=9)
    runs = runs_of(*folders, other, unfinished)
    [group] = seed_groups(runs, [summarize(run) for run in runs])
    assert group["runs"] == ["s0", "s1", "s2"]
    [metric] = [m for m in group["metrics"] if m["name"] == "val_loss_last"]
    deviation = math.sqrt(((3.1 - 3.2) ** 2 + (3.3 - 3.2) ** 2) / 2)
    assert (metric["n"], metric["mean"], metric["sd"]) == (3, pytest.approx(3.2), pytest.approx(deviation))


def test_one_seed_twice_is_no_sample(tmp_path):
    runs = runs_of(*(write_run(tmp_path / name, [record(9, 5.0)], seed=3) for name in "ab"))
    assert seed_groups(runs, [summarize(run) for run in runs]) == []


def test_runs_with_different_metrics_are_compared_in_what_they_have(tmp_path):
    a = write_run(tmp_path / "a", [record(1, 5.0, val_loss=4.0, val_bpb=1.5)])
    b = write_run(tmp_path / "b", [{"step": 1, "loss": None}])
    runs = runs_of(a, b)
    found = compare(runs, None, None, 50.0)
    [bits] = [m for m in found["final"] if m["name"] == "val_bpb_last"]
    assert bits["values"] == [1.5, None] and bits["differences"] == [0.0, None]
    assert "tokens" in json.dumps(found, allow_nan=False)
    assert [t["title"] for t in tables.comparison_tables(runs, found)][:2] == ["Flags that differ", "Final metrics"]


@pytest.mark.parametrize(
    "function, value, text",
    [
        (tables.count, 5120, "5,120"),
        (tables.count, 9.99e9, "9.99B"),
        (tables.count, 0.25, "0.25"),
        (tables.duration, 59.5, "59.5 s"),
        (tables.duration, 3725, "1h 02m"),
        (tables.duration, 90000, "1d 01h"),
        (tables.size, 3 * 2**29, "1.50 GiB"),
    ],
)
def test_numbers_are_formatted(function, value, text):
    assert function(value) == text


def test_differences_are_absolute_for_losses_and_relative_otherwise():
    assert tables.difference(3.2, 3.3, "loss") == "-0.1000"
    assert tables.difference(0.31, 0.30, "share") == "+1.00 points"
    assert tables.difference(150.0, 100.0, "count") == "+50.0 %"
    assert tables.difference(3.0, 3.00001, "loss") == tables.difference(0.0, 0.0, "count") == "±0"


def test_a_silent_run_is_not_believed_to_be_running(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0)])
    (folder / "status.json").write_text('{"status": "running"}')
    run = runs_of(folder)[0]
    assert tables.status_text(run, now=run.modified + 60) == "running"
    assert tables.status_text(run, now=run.modified + 7200) == "running? (no record for 2h 00m)"


def test_flops_come_from_run_json(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0)])
    write_facts(folder, [0])
    assert page_data(runs_of(folder), None, None, 50.0)["runs"][0]["flops_per_token"] == FLOPS_PER_TOKEN
    assert np.isfinite(gpu_hours(runs_of(folder)[0])).all()


def test_the_loss_is_averaged_over_a_hundredth_of_the_longest_run(tmp_path):
    runs = runs_of(*(write_run(tmp_path / str(n), [record(k, 3.0) for k in range(1, n + 1)]) for n in (50, 700)))
    assert default_span(runs) == 7 and default_span(runs[:1]) == 1 and default_span([]) == 1
    assert page_data(runs, None, None, None)["span"] == 7
