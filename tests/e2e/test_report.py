"""A report on a real run: its resume and its roll-back are in it, and the run names the command."""

from pathlib import Path

import pytest

from scripts.reporting.compare import summarize
from scripts.reporting.page import page_data
from scripts.reporting.read import open_runs

FAILING = str(Path(__file__).with_name("failing_training.py"))


def test_the_resume_and_the_roll_back_of_a_run_are_marked(trainer, metrics, tmp_path):
    folder = tmp_path / "run"
    flags = ["--schedule=constant", "--save_every_niter=10"]
    trainer.run(folder, *flags, "--num_iterations=10")
    done = trainer.run(folder, *flags, "--num_iterations=20", script=FAILING, env={"FAIL": "loss@11-15"})
    assert f"\nreport: python scripts/report.py {folder} " in done.stdout
    [reader] = open_runs([folder])
    reader.update()
    run, records = reader.run, metrics(folder)
    assert [(s["step"], s["ranks"], s["strategy"], s["device"]) for s in run.starts] == [
        (0, 1, "one process", "cpu"),
        (10, 1, "one process", "cpu"),
    ]
    s = summarize(run, price=3.0)
    assert (s["status"], s["step"], s["parameters"], s["resumes"], s["rollbacks"]) == ("done", 20, 34_528, 1, 1)
    assert s["gpu_hours"] == pytest.approx(records[-1]["elapsed_s"] / 3600) and s["cost"] == 3 * s["gpu_hours"]
    page = page_data([run], 3.0, None, 50.0)["runs"][0]
    assert page["marks"]["resumes"] == [10] and page["x"]["step"] == [r["step"] for r in records]
    assert page["marks"]["rollbacks"] == [[15, 10, "loss or gradient not finite"]]
    assert [record[0] for record in page["marks"]["superseded"]] == [11, 12, 13, 14, 15]
    assert [step for step, _ in run.checkpoints] == [10, 20]
