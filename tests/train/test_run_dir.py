"""The lock on the output directory, and what a run leaves in status.json."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train import run_dir
from train.run_dir import check_shared, lock_output_dir, status_on_error, write_status
from util import files
from util.errors import UserError
from util.files import take_lock
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_lock_held(monkeypatch):
    monkeypatch.setattr(run_dir, "_held_lock", None)


def status(output_dir):
    return json.loads((output_dir / "status.json").read_text())


def test_a_directory_is_locked_while_its_process_lives(tmp_path):
    code = f"from pathlib import Path; from train.run_dir import lock_output_dir as c; c(Path({str(tmp_path)!r}))"
    holder = subprocess.Popen([sys.executable, "-c", code + "; print('locked', flush=True); input()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "locked\n"
    (tmp_path / "status.json").unlink()
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid}"), status_on_error(tmp_path):
        lock_output_dir(tmp_path)
    assert not (tmp_path / "status.json").exists()  # the other run writes it
    holder.kill()
    holder.communicate()
    lock_output_dir(tmp_path)
    assert status(tmp_path)["status"] == "running"


def test_an_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir=.*file/run cannot be written: Not a directory"):
        lock_output_dir(tmp_path / "file" / "run")


def test_only_the_process_with_the_lock_writes_the_status(tmp_path):
    write_status(tmp_path, "done", 3)
    assert not (tmp_path / "status.json").exists()
    lock_output_dir(tmp_path)
    write_status(tmp_path, "stopped", 3, "SIGTERM")
    assert status(tmp_path) == {"status": "stopped", "step": 3, "reason": "SIGTERM"}
    with pytest.raises(UserError), status_on_error(tmp_path):
        raise UserError("--resume=x: contains no checkpoint")
    assert status(tmp_path) == {"status": "user error", "step": None, "reason": "--resume=x: contains no checkpoint"}
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoints", "samples", "logs", "status.json"}


def test_an_output_dir_that_is_not_shared_is_refused(tmp_path):
    class Two(Ranks):
        def gather(self, value):
            return [value, False]  # the other node has a separate disk

    check_shared(tmp_path, Ranks(0, 0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match="rank 1 and rank 0 see different folders"):
        check_shared(tmp_path, Two(0, 0, 1, torch.device("cpu")))
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(
    ".lock is left from an earlier run, or names a running process that does not hold it",
    "it is ignored; only the kernel's lock counts",
)
def test_a_stale_lock_is_ignored(tmp_path, injected, capsys):
    contents = ["4194999", str(os.getpid()), "1", "no number", ""]
    for content in contents:
        (tmp_path / ".lock").write_text(content)
        lock, holder = take_lock(tmp_path / ".lock")
        assert holder is None and (tmp_path / ".lock").read_text() == str(os.getpid())
        lock.close()
    assert not capsys.readouterr().err
    injected(len(contents))


@pytest.mark.fault(
    "the file system has no locks", "the run continues, with a warning that a second run is not detected"
)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys, injected, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    lock_output_dir(tmp_path)
    assert status(tmp_path)["status"] == "running"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/.lock cannot be locked ({os.strerror(number)});")
    injected(1)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_held_by_another_process_is_recognised_by_either_error(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    (tmp_path / ".lock").write_text("77")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    assert take_lock(tmp_path / ".lock")[1] == "77"
