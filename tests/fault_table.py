"""The table of docs/reliability.md, from the tests that inject the faults: `--fault_table` writes what has just run.

A test of a fault bears `@pytest.mark.fault(FAULT, PROMISE)`, and says by the fixture `injected` how often it did what
was done, and what was lost. Its row appears if it passed, and rows of tests that did not run stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
HEAD = "| fault | promise | test | injected | lost |\n|---|---|---|---|---|\n"
TABLE = re.compile(re.escape(HEAD) + r"((?:\|.*\n)*)")
ROWS: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault_table", action="store_true", help="write what the fault tests found to reliability.md")


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`injected(times, lost)`: for the row of this test; what its parameters say is added up."""
    fault, promise = request.node.get_closest_marker("fault").args
    test = request.node.nodeid.partition("[")[0]

    def note(times: int, lost: str = "nothing") -> None:
        about = {"fault": fault, "promise": promise, "test": test, "times": times, "lost": lost}
        request.node.user_properties.append(("injected", about))

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Also in the process that collects what the workers of xdist report."""
    if report.when == "call" and report.passed:
        for name, about in report.user_properties:
            if name == "injected":
                row = ROWS.setdefault(about["test"], {**about, "times": 0, "lost": []})
                row["times"] += about["times"]
                row["lost"] += [about["lost"]] if about["lost"] not in row["lost"] else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("fault_table") and not hasattr(session.config, "workerinput"):
        page = PAGE.read_text()
        rows = {named_in(line): line for line in TABLE.search(page)[1].splitlines()}
        for test, row in ROWS.items():
            cells = row["fault"], row["promise"], f"`{test}`", str(row["times"]), "; ".join(row["lost"])
            rows[test] = f"| {' | '.join(cells)} |"
        lines = (f"{rows[test]}\n" for test in sorted(rows))
        PAGE.write_text(TABLE.sub(lambda _: HEAD + "".join(lines), page))


def named_in(row: str) -> str:
    return row.split("|")[3].strip(" `")
