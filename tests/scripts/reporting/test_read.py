"""What a report reads of a run: every record once, only what is new, and whatever a broken file holds."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.reporting.read import Run, RunReader, distinct_labels, distinct_names, open_runs
from tests.scripts.reporting.make_runs import record, write_facts, write_run
from train.metrics import read_records
from util.errors import UserError

VALUES = st.one_of(
    st.floats(-1e6, 1e6), st.none(), st.integers(-(2**70), 2**70), st.booleans(), st.text(max_size=3), st.just(math.nan)
)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(0, 12)},
        optional={
            "loss": st.none() | st.floats(0, 20),
            "val_loss": VALUES,
            "lr": VALUES,
            "skipped": st.text(max_size=5),
        },
    ),
    max_size=30,
)


def reader(folder):
    found = open_runs([folder])[0]
    found.update()
    return found


def append(folder, *records):
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


@settings(max_examples=30, deadline=None)
@given(
    records=RECORDS, noise=st.lists(st.text(max_size=20).filter(lambda t: "\n" not in t and "\r" not in t), max_size=3)
)
def test_the_columns_are_those_of_the_last_record_of_each_step(tmp_path_factory, records, noise):
    folder = write_run(tmp_path_factory.mktemp("run"), [record(1, 1.0)])
    lines = [*map(json.dumps, records), *noise]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    table = reader(folder).run.table
    expected = {r["step"]: r for r in read_records(folder / "metrics.jsonl")}
    assert table.steps.tolist() == sorted(expected)
    for name in ("loss", "val_loss", "lr"):
        values = [expected[step].get(name) for step in sorted(expected)]
        for value, found in zip(values, table.column(name).tolist(), strict=True):
            if type(value) in (int, float) and math.isfinite(value):
                assert found == float(value)
            else:
                assert math.isnan(found)
    assert set(table.skipped) == {step for step, r in expected.items() if "skipped" in r}


def test_of_several_records_of_a_step_the_last_counts(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0), record(2, 4.0), record(1, 3.0)])
    assert reader(folder).run.table.column("loss").tolist() == [3.0, 4.0]


def test_only_new_lines_are_read_and_a_half_written_one_waits(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0), record(2, 4.0)])
    run = reader(folder)
    assert not run.update()  # nothing new
    before = run._metrics._offset
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run.update() and run._metrics._offset == before and run.run.table.steps.tolist() == [1, 2]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('ss": 3.0}\n')
    assert run.update() and run.run.table.column("loss").tolist() == [5.0, 4.0, 3.0]


def test_a_file_that_a_resume_has_replaced_is_read_again(tmp_path):
    folder = write_run(tmp_path / "run", [record(k, 5.0) for k in range(1, 6)])
    run = reader(folder)
    (folder / "new").write_text("".join(json.dumps(record(k, 5.0)) + "\n" for k in (1, 2)))
    (folder / "new").replace(folder / "metrics.jsonl")
    assert run.update() and run.run.table.steps.tolist() == [1, 2]
    append(folder, record(3, 2.0))
    assert run.update() and run.run.table.column("loss").tolist() == [5.0, 5.0, 2.0]


def test_facts_events_samples_and_checkpoints_are_read(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0), record(2, None, skipped="loss not finite")])
    write_facts(folder, [0, 1], rollbacks=[{"step": 2, "to": 1, "reason": "loss not finite"}])
    (folder / "logs/metrics_superseded.jsonl").write_text(json.dumps(record(2, 7.0)) + "\nnot json\n")
    (folder / "logs/rank_0.log").write_text(
        "2026-11-20 08:15:00 warning: little room\n" * 2 + "2026-11-20 08:15:01 step 1\n"
    )
    (folder / "samples/step_00000002.txt").write_text("x" * 3000 + "\n")
    (folder / "checkpoints/step_00000002/model").mkdir(parents=True)
    (folder / "checkpoints/step_00000002/model/part").write_bytes(b"12345")
    (folder / "checkpoints/.saving_00000003").mkdir()
    run = reader(folder).run
    assert [s["step"] for s in run.starts] == [0, 1] and run.fact("ranks") == 8
    assert run.rollbacks == [{"step": 2, "to": 1, "reason": "loss not finite"}]
    assert [r["loss"] for r in run.superseded] == [7.0]
    assert run.table.skipped == {2: "loss not finite"} and math.isnan(run.table.column("loss")[1])
    assert run.warnings == {"little room": 2} and run.checkpoints == [(2, 5)]
    assert run.samples == {2: "x" * 2000 + "…"}


def test_a_run_without_run_json_has_the_facts_of_its_log(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0)])
    lines = [
        "124,439,808 parameters, bfloat16, 8 × NVIDIA H100 80GB HBM3, ZeRO-2 on 8",
        "spike in step 60: rolled back to step 50; the data since is skipped",
        "124,439,808 parameters of hf:gpt2, bfloat16, 4 × NVIDIA H100 80GB HBM3",
        "resuming from /data/run/checkpoints/step_00000050",
    ]
    (folder / "logs/rank_0.log").write_text("".join(f"2026-11-20 08:15:00 {line}\n" for line in lines))
    run = reader(folder).run
    assert [(s["step"], s["ranks"], s["strategy"]) for s in run.starts] == [(0, 8, "ZeRO-2 on 8"), (50, 4, "")]
    assert run.fact("parameters") == 124_439_808 and run.fact("device") == "NVIDIA H100 80GB HBM3"
    assert run.rollbacks == [{"step": 60, "to": 50, "reason": "spike"}]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"starts": [1, {"step": "x"}, {"step": 1, "ranks": "8"}]}', "null"]
)
def test_broken_files_beside_the_metrics_are_ignored(tmp_path, content):
    folder = write_run(tmp_path / "run", [record(1, 5.0)])
    for name in ("config.yaml", "status.json", "run.json"):
        (folder / name).write_text(content)
    run = reader(folder).run
    assert run.starts == [] and run.table.steps.tolist() == [1]


def test_empty_metrics_have_no_steps(tmp_path):
    run = reader(write_run(tmp_path / "run", [])).run
    assert len(run.table.steps) == 0 and np.isnan(run.table.column("loss")).all()


def test_columns_are_limited(tmp_path):
    folder = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0, **{f"x{i}": i for i in range(100)}}])
    assert len(reader(folder).run.table.columns) == 40


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    run = write_run(tmp_path / "runs/a", [record(1, 5.0)])
    for path, reason in {
        tmp_path / "missing": "no such folder",
        run / "metrics.jsonl": "is a file",
        tmp_path: "no run, for it has no metrics.jsonl; give the --output_dir of a run",
        tmp_path / "runs": f"name the runs in it, such as {run}",
    }.items():
        with pytest.raises(UserError) as error:
            open_runs([path])
        assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


def test_names_are_as_short_as_they_can_be(tmp_path):
    folders = [tmp_path / name for name in ("x/a", "y/a", "y/b")]
    assert distinct_names(folders) == ["x/a", "y/a", "b"]
    for folder in folders:
        write_run(folder, [record(1, 5.0)])
    assert [r.run.name for r in open_runs([*folders, folders[0]])] == ["x/a", "y/a", "b"]  # named twice, read once


def test_imported_names_are_numbered(tmp_path):
    others = [Run(name, tmp_path) for name in ("log", "log", "a")]
    distinct_labels([RunReader(tmp_path, "a").run], others)
    assert [run.name for run in others] == ["log", "log (2)", "a (2)"]
