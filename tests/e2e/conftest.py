"""Shared fixtures of the end-to-end tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def command(warm_python):
    """Runs one of the project's commands: `command("eval/generate.py", ..., code=2)`."""
    return warm_python.run


@pytest.fixture(scope="session")
def undisturbed(trainer, trace, parameters_of, tmp_path_factory):
    """A function that returns trace and final parameters of a run without interruption; each run is made once."""
    found = {}

    def of(ranks: int, *flags: str):
        if (ranks, flags) not in found:
            output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            trainer.run(output_dir, *flags, ranks=ranks)
            found[ranks, flags] = (trace(output_dir), parameters_of(output_dir))
        return found[ranks, flags]

    return of


@pytest.fixture(scope="session")
def assert_same_run(trace, parameters_of):
    def check(output_dir, reference):
        lines, parameters = reference
        assert trace(output_dir) == lines  # ==: all digits
        ours = parameters_of(output_dir)
        assert all((ours[name] == value).all() for name, value in parameters.items())

    return check
