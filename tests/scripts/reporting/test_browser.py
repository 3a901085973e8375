"""The page in a real browser: no errors, the right points, and controls that work with mouse and keyboard."""

import json
import os
import shutil
from contextlib import contextmanager

import pytest

from scripts.reporting.page import page_data, to_html
from scripts.reporting.read import open_runs
from tests.scripts.reporting.make_runs import TOKENS_PER_STEP, long_run, record, write_facts, write_run
from tests.scripts.reporting.test_serve import serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
SAMPLE = "<script>document.title = 'broken'</script> ünïcödé 日本語 " + "long" * 400


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = long_run(folder / "first", 300, 1)
    second = long_run(folder / "<b>second", 200, 2, floor=3.0, learning_rate=1e-3)
    third = write_run(
        folder / "third", [record(k, 5.0 if k != 3 else None, hellaswag_acc_norm=0.3) for k in range(1, 6)]
    )
    write_facts(first, [0, 100], rollbacks=[{"step": 150, "to": 140, "reason": "spike"}])
    write_facts(second, [0])
    (first / "logs/metrics_superseded.jsonl").write_text(json.dumps(record(101, 4.0)) + "\n")
    for run in (first, second):
        (run / "samples/step_00000100.txt").write_text(SAMPLE)
    empty = write_run(folder / "empty", [])
    return [first, second, third, empty]


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    readers = open_runs(folders)
    for reader in readers:
        reader.update()
    data = page_data([reader.run for reader in readers], None, None, 50.0)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(data))
    return path.as_uri(), data


@contextmanager
def opened(browser, address, width=1280, scheme="light"):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    try:
        page.goto(address)
        page.wait_for_selector(".u-wrap")
        yield page
        assert problems == []
    finally:
        context.close()


@pytest.fixture
def page(browser, report):
    with opened(browser, report[0]) as found:
        yield found


def test_every_curve_has_the_points_of_its_run(page, report):
    data = report[1]
    assert page.locator(".chart").count() == len(data["charts"]) == page.evaluate("plots.length")
    for i, chart in enumerate(data["charts"]):
        found = page.evaluate(f"plots[{i}].curves.map(c => [c.run, c.column, c.x.length])")
        expected = [
            [k, name, len(values if isinstance(values, list) else values["at"])]
            for k, run in enumerate(data["runs"])
            for name in chart["columns"]
            if (values := run["series"].get(name))
        ]
        assert sorted(found) == sorted(expected)


def test_the_axis_is_switched_by_mouse_and_keyboard(page):
    assert page.evaluate("plots[0].data[0].at(-1)") == 300
    page.locator("label", has_text="tokens").first.click()
    assert page.evaluate("plots[0].data[0].at(-1)") == pytest.approx(300 * TOKENS_PER_STEP)
    page.locator("input[value=tokens]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[state.axis, plots[0].data[0].at(-1)]") == [
        "flops",
        pytest.approx(300 * TOKENS_PER_STEP * 860e6),
    ]
    assert "not recorded on this axis: third" in page.locator(".chart").first.inner_text()


def test_a_run_is_hidden_and_shown_again(page):
    shown = "plots.every(u => u.curves.every((c, k) => u.series[k + 1].show === (c.run !== 1)))"
    card = page.locator(".card").nth(1)
    assert not page.evaluate(shown)
    card.click()
    assert page.evaluate(shown) and card.get_attribute("aria-pressed") == "false"
    page.locator("label", has_text="logarithmic y").click()
    assert page.evaluate(shown)  # also in charts that are drawn again
    card.press("Enter")
    assert not page.evaluate(shown) and card.get_attribute("aria-pressed") == "true"


def test_all_charts_zoom_together(page):
    box = page.locator(".chart .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=3)
    page.mouse.up()
    ranges = page.evaluate("plots.map(u => [u.scales.x.min, u.scales.x.max])")
    for low, high in ranges:
        assert low == pytest.approx(150, abs=3) and high == pytest.approx(225, abs=3)
    page.locator(".plot").nth(1).press("+")
    low, high = page.evaluate("state.zoom")
    assert high - low == pytest.approx((ranges[0][1] - ranges[0][0]) / 2)
    page.get_by_role("button", name="show all").click()
    assert page.evaluate("[plots[0].scales.x.min, plots[0].scales.x.max]") == [1, 300]


def test_the_values_at_the_cursor_are_shown(page):
    box = page.locator(".chart .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    tip = page.locator(".tip").first.inner_text()
    assert "steps" in tip and "first smoothed" in tip and "<b>second raw" in tip


def test_text_of_runs_is_text(page, report):
    assert page.locator(".card .name").nth(1).inner_text() == "<b>second"
    assert page.locator("#samples pre").first.inner_text() == report[1]["samples"][0]["texts"][0] == SAMPLE
    assert "broken" not in page.title() and "rawgpt report" in page.title()
    assert "records none yet" in " ".join(page.locator(".card").nth(3).inner_text().split())
    for mark in ("resumes", "roll-backs", "superseded"):
        assert mark in page.locator("#key").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_does_not_scroll_sideways(browser, report, scheme):
    with opened(browser, report[0], width=390, scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        red = int(page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
        assert (red > 200) == (scheme == "light")


def test_a_served_page_follows_the_run(browser, tmp_path):
    folder = write_run(tmp_path / "run", [record(k, 5.0) for k in range(1, 4)])
    with serving(folder) as (host, port), opened(browser, f"http://{host}:{port}/") as page:
        page.locator("label", has_text="tokens").first.click()
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record(4, 4.0)) + "\n")
        page.evaluate("poll()")
        assert page.evaluate("plots[0].data[0].length") == 4 and page.evaluate("state.axis") == "tokens"
