"""scripts/env.sh: it makes .venv, uses an existing one, and never deletes what it did not make.

The interpreters are stand-ins that note how they are called.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
echo "$(basename $0) $*" >> "{log}"
case "$*" in
    -c*torch*) [ -e "{folder}/has_torch" ] ;;
    -c*) exit {old} ;;
    "-m venv .venv") {make} ;;
    "-m pip --version") [ -e "{folder}/has_pip" ] ;;
    "-m ensurepip") {ensurepip} && touch "{folder}/has_pip" ;;
esac
"""


class Checkout:
    """A folder with env.sh, requirements, and a stand-in for python3."""

    def __init__(self, folder: Path):
        self.folder, self.venv, self.log = folder, folder / ".venv", folder / "calls"
        (folder / "scripts").mkdir()
        (folder / "scripts/env.sh").write_text((ROOT / "scripts/env.sh").read_text())
        (folder / "requirements-gpu.txt").write_text("torch\n")
        (folder / "bin").mkdir()
        self.add_python(folder / "bin/python3")

    def add_python(self, path: Path, old: int = 0, make: str = "cp -r .made/. .venv", ensurepip: str = "true") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON.format(log=self.log, folder=self.folder, old=old, make=make, ensurepip=ensurepip))
        path.chmod(0o755)

    def add_venv(self, name: str = ".venv", pip: bool = True, **python: object) -> None:
        self.add_python(self.folder / name / "bin/python", **python)
        (self.folder / name / "bin/activate").write_text("echo activated\n")
        if pip:
            (self.folder / "has_pip").touch()

    def add_uv(self) -> None:
        uv = self.folder / "bin/uv"
        uv.write_text(f'#!/usr/bin/env bash\necho "uv $*" >> "{self.log}"\n')
        uv.chmod(0o755)

    def source(self) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin"}
        env.pop("PYTHON", None)
        command = ["bash", "-euo", "pipefail", "-c", "source scripts/env.sh requirements-gpu.txt"]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def succeeds(done):
    assert done.returncode == 0 and done.stdout.endswith("activated\n"), done
    return done


def is_refused(done, *words):
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert all(word in done.stderr for word in words), done.stderr


REQUIREMENTS = "-r requirements-gpu.txt -c scripts/constraints.txt"
INSTALL = f"python -m pip install -qq --no-compile --disable-pip-version-check {REQUIREMENTS}"


def test_a_missing_environment_is_made_once(checkout):
    checkout.add_venv(".made")
    succeeds(checkout.source())
    assert "python3 -m venv .venv" in checkout.calls() and INSTALL in checkout.calls()
    checkout.log.unlink()
    succeeds(checkout.source())
    assert not [call for call in checkout.calls() if "venv" in call or "install" in call]


def test_changed_requirements_are_installed(checkout):
    checkout.add_venv()
    succeeds(checkout.source())
    (checkout.folder / "requirements-gpu.txt").write_text("torch>=2.11\n")
    succeeds(checkout.source())
    assert checkout.calls().count(INSTALL) == 2


def test_an_environment_with_torch_keeps_its_release(checkout):
    checkout.add_venv()
    (checkout.folder / "has_torch").touch()
    succeeds(checkout.source())
    assert INSTALL.removesuffix(" -c scripts/constraints.txt") in checkout.calls()


def test_an_environment_without_pip_is_kept_and_gets_pip(checkout):
    checkout.add_venv(pip=False)
    (checkout.venv / "mine").touch()
    succeeds(checkout.source())
    assert (checkout.venv / "mine").exists()
    assert "python -m ensurepip" in checkout.calls() and INSTALL in checkout.calls()


def test_uv_installs_where_there_is_no_ensurepip(checkout):
    checkout.add_venv(pip=False, ensurepip="false")
    checkout.add_uv()
    succeeds(checkout.source())
    assert f"uv pip install --quiet --python .venv/bin/python {REQUIREMENTS}" in checkout.calls()


def test_an_environment_that_cannot_install_is_refused_and_kept(checkout):
    checkout.add_venv(pip=False, ensurepip="false")
    (checkout.venv / "mine").touch()
    is_refused(checkout.source(), ".venv", "pip")
    assert (checkout.venv / "mine").exists()


def test_a_folder_that_is_not_an_environment_is_refused_and_kept(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "mine").touch()
    is_refused(checkout.source(), "bin/python")
    assert (checkout.venv / "mine").exists()


def test_an_environment_with_an_old_python_is_refused_and_kept(checkout):
    checkout.add_venv(old=1)
    is_refused(checkout.source(), "3.10")
    assert (checkout.venv / "bin/python").exists()


def test_an_old_python_makes_no_environment(checkout):
    checkout.add_python(checkout.folder / "bin/python3", old=1)
    is_refused(checkout.source(), "3.10", "PYTHON=")
    assert not checkout.venv.exists()


def test_a_failed_environment_leaves_nothing_behind(checkout):
    checkout.add_python(checkout.folder / "bin/python3", make="mkdir .venv/bin; exit 1")
    is_refused(checkout.source(), "python3-venv")
    assert not checkout.venv.exists()


def test_an_environment_whose_making_was_interrupted_is_made_again(checkout):
    checkout.add_python(checkout.folder / "bin/python3", make="kill -KILL $PPID")
    assert checkout.source().returncode not in (0, 2) and checkout.venv.exists()
    checkout.add_python(checkout.folder / "bin/python3")
    checkout.add_venv(".made")
    succeeds(checkout.source())
    assert not list(checkout.venv.glob("unfinished*"))
