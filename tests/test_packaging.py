"""pyproject.toml and the requirements files name the same packages and versions."""

from pathlib import Path

from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest depends on tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def from_file(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {Requirement(line) for line in lines if line and not line.startswith("-r ")}


def from_pyproject():
    """Returns the requirements by group; "" holds the required ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: {Requirement(line) for line in lines} for name, lines in groups.items()}


def test_the_gpu_requirements_are_the_required_packages_and_the_optional_groups():
    groups = from_pyproject()
    assert groups.keys() == {"", "data", "log", "test"}
    assert from_file("requirements-gpu.txt") == groups[""] | groups["data"] | groups["log"]


def test_the_test_requirements_are_the_group_test():
    assert from_file("tests/requirements.txt") == from_pyproject()["test"]
