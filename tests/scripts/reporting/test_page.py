"""The page: one file without a network, of bounded size, in which the text of a run is never markup."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.reporting import page
from scripts.reporting.page import page_data, shown_rows, to_html
from scripts.reporting.read import Run, Table, open_runs
from tests.scripts.reporting.make_runs import long_run, record, write_facts, write_run

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \ud800 日本語 & 'quotes'"


def make(*folders):
    readers = open_runs(list(folders))
    for reader in readers:
        reader.update()
    return page_data([reader.run for reader in readers], None, None, 50.0)


def data_in(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_text_of_a_run_cannot_end_the_script_that_holds_it(tmp_path):
    folder = write_run(tmp_path / "</title><b>run", [record(1, 5.0, skipped=HOSTILE)], tokenizer=HOSTILE[:-30])
    (folder / "samples/step_00000001.txt").write_text(HOSTILE.replace("\ud800", "") + "x" * 10_000)
    (folder / "logs/rank_0.log").write_text(f"2026-11-20 08:15:00 warning: {HOSTILE[:30]}\n")
    data = make(folder)
    data["runs"][0]["name"] = HOSTILE
    html = to_html(data)
    assert html.encode() and html.count("</script>") == 3 and "<script>alert" not in html
    read = data_in(html)
    assert read["runs"][0]["name"] == HOSTILE.replace("\ud800", "\ufffd")
    assert read["samples"][0]["texts"][0].startswith("</script><script>alert(1)</script>")
    assert len(read["samples"][0]["texts"][0]) == 2001


def test_the_page_needs_no_network(tmp_path):
    html = to_html(make(write_run(tmp_path / "run", [record(1, 5.0)])))
    ours = html.replace((page.FOLDER / "uPlot.iife.min.js").read_text(), "")
    assert not re.search(r"(src|href)=(?!\"data:)|url\(|@import|https?:", ours)
    assert "default-src 'none'" in html


def test_the_files_of_uplot_are_unchanged():
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        assert hashlib.sha256((page.FOLDER / name).read_bytes()).hexdigest() in page.__doc__


def test_a_long_run_is_shown_with_its_extremes_evaluations_and_events(tmp_path):
    folder = long_run(tmp_path / "run", 8_000)
    write_facts(folder, [0, 5555], rollbacks=[{"step": 7100, "to": 7001, "reason": "spike"}])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[3332]["skipped"] = "spike"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    run = make(folder)["runs"][0]
    assert 2000 < len(run["x"]["step"]) < 5500
    assert {1, 8_000, 3333, 5555, 7001} <= set(run["x"]["step"])
    for name in ("loss", "grad_norm", "tok_per_s"):
        values = [r[name] for r in lines]
        assert min(run["series"][name]) == pytest.approx(min(values), rel=1e-6)
        assert max(run["series"][name]) == pytest.approx(max(values), rel=1e-6)
    evaluated = [r["step"] for r in lines if "val_loss" in r]
    assert [run["x"]["step"][at] for at in run["series"]["val_loss"]["at"]] == evaluated
    marks = run["marks"]
    assert (marks["resumes"], marks["rollbacks"], marks["skipped"]) == (
        [5555],
        [[7100, 7001, "spike"]],
        [[3333, "spike"]],
    )


def test_the_size_of_the_page_is_bounded():
    rng, steps = np.random.default_rng(0), np.arange(1, 20_001)
    names = ("loss", "grad_norm", "tok_per_s", "mfu", "lr", "memory_bytes", "val_loss", "tokens", "elapsed_s")
    tables = [Table(steps, {n: np.sort(rng.normal(1e6, 1e5, 20_000)) for n in names}) for _ in range(5)]
    runs = [Run(f"run {i}", Path(f"/{i}"), table=table) for i, table in enumerate(tables)]
    assert len(to_html(page_data(runs, None, None, 50.0)).encode()) < 5e6


def test_skipped_steps_without_end_are_bounded():
    steps = np.arange(1, 100_001)
    run = Run("run", Path("/run"), table=Table(steps, {"loss": np.ones(100_000)}, {int(s): "spike" for s in steps}))
    assert len(shown_rows(run, 4000)) < 5000


def test_unknown_columns_get_a_chart(tmp_path):
    data = make(write_run(tmp_path / "run", [record(1, 5.0, counted_tokens=77)]))
    assert data["charts"][-1]["title"] == "counted_tokens" and data["runs"][0]["series"]["counted_tokens"] == [77]


def test_losses_that_are_not_finite_are_gaps(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0), record(2, None), record(3, float("nan")), record(4, 4.0)])
    series = make(folder)["runs"][0]["series"]
    assert (
        series["loss"] == {"at": [0, 3], "values": [5, 4]}
        and "NaN" not in to_html(make(folder)).split('data">')[1][:2000]
    )


def test_samples_are_side_by_side_at_equal_steps(tmp_path):
    folders = []
    for name, steps in (("a", range(10, 1000, 10)), ("b", range(30, 1000, 30))):
        folders.append(write_run(tmp_path / name, [record(1, 5.0)]))
        for step in steps:
            (folders[-1] / f"samples/step_{step:08d}.txt").write_text(f"{name} {step}")
    found = make(*folders)["samples"]
    assert found[0] == {"step": 30, "texts": ["a 30", "b 30"]} and found[-1]["step"] == 990 and len(found) == 33


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["step", "to", "ranks", "device", "strategy", "parameters", "flops_per_token", "commit", "time", "reason"]
ENTRIES = st.lists(st.dictionaries(st.sampled_from(KEYS), st.integers(0, 9) | JUNK, max_size=6), max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    facts=st.fixed_dictionaries({"starts": ENTRIES | JUNK, "rollbacks": ENTRIES | JUNK}),
    status=st.dictionaries(st.sampled_from(["status", "reason", "step"]), JUNK),
    config=st.dictionaries(st.sampled_from(["num_iterations", "dtype", "seed", "mixture", "tokenizer", 7]), JUNK),
    records=st.lists(
        st.dictionaries(st.sampled_from(["step", "tokens", "loss", "elapsed_s", "x"]), st.integers(0, 9) | JUNK)
    ),
)
def test_whatever_the_files_of_a_run_hold_there_is_a_page(tmp_path_factory, facts, status, config, records):
    folder = write_run(tmp_path_factory.mktemp("run"), [record(1, 5.0)])
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "config.yaml").write_text(json.dumps(config))
    for name in ("metrics.jsonl", "logs/metrics_superseded.jsonl"):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    other = write_run(folder / "other", [record(1, 5.0)])
    assert len(data_in(to_html(make(folder, other)))["runs"]) == 2


def test_a_run_without_records_is_shown(tmp_path):
    data = make(write_run(tmp_path / "empty", []), write_run(tmp_path / "full", [record(1, 5.0)]))
    assert [run["step"] for run in data["runs"]] == [None, 1] and data["runs"][0]["headline"] == []
    assert data_in(to_html(data))["runs"][0]["x"]["tokens"] is None


def luminance(colour):
    """Returns the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_that_wcag_asks_for():
    css = (page.FOLDER / "page.css").read_text()
    for theme in css.split(":root {")[1:3]:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme.split("}")[0]))
        assert len([name for name in colours if name.startswith("run-")]) == 7
        for name, colour in colours.items():
            least = 4.5 if name in ("text", "soft", "warning", "accent") else 3 if name.startswith("run-") else 1
            for background in (colours["card"], colours["page"]):
                bright, dark = sorted((luminance(colour), luminance(background)), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= least, (name, background)
