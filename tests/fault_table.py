"""The table of faults in docs/reliability.md. `pytest --fault_table` rewrites the rows of the tests that passed.

A test of a fault has the mark `@pytest.mark.fault(FAULT, PROMISE)`. It calls the fixture `injected` with the number of
injected faults and with the loss. Rows of tests that did not run stay unchanged.
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
    parser.addoption(
        "--fault_table", action="store_true", help="write the results of fault tests to docs/reliability.md"
    )


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function `injected(times, lost)` that fills the row of this test. All its parameters are added up."""
    fault, promise = request.node.get_closest_marker("fault").args
    test = request.node.nodeid.partition("[")[0]

    def note(times: int, lost: str = "nothing") -> None:
        about = {"fault": fault, "promise": promise, "test": test, "times": times, "lost": lost}
        request.node.user_properties.append(("injected", about))

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects the rows, with xdist in the main process."""
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
