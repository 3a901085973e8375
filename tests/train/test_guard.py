"""Stopping early, one run per directory, and what a run leaves in status.json."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train import guard
from train.guard import SIGNALS, StopRequest, check_shared, claim_output_dir, mistakes_noted, write_status
from util import files
from util.errors import UserError
from util.files import take_lock
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def handlers_restored():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_claimed(monkeypatch):
    monkeypatch.setattr(guard, "_held_lock", None)


def status(output_dir):
    return json.loads((output_dir / "status.json").read_text())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number):
    stop = StopRequest(0, time.monotonic())
    assert stop.votes() == [0.0, 0.0]
    os.kill(os.getpid(), number)
    assert stop.votes() == [1.0, 0.0] and stop.reason == number.name


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(0, time.monotonic())
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.votes() == [0.0, 0.0]


def test_a_second_ctrl_c_interrupts_at_once():
    StopRequest(0, time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_clock_votes_for_itself():
    assert StopRequest(1, time.monotonic() - 61).votes() == [0.0, 1.0]
    assert StopRequest(1, time.monotonic() - 40).votes() == [0.0, 0.0]  # minutes


def test_a_directory_is_locked_while_its_process_lives(tmp_path):
    code = f"from pathlib import Path; from train.guard import claim_output_dir as c; c(Path({str(tmp_path)!r}))"
    holder = subprocess.Popen([sys.executable, "-c", code + "; print('locked', flush=True); input()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "locked\n"
    (tmp_path / "status.json").unlink()
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid}"), mistakes_noted(tmp_path):
        claim_output_dir(tmp_path)
    assert not (tmp_path / "status.json").exists()  # it is the other run's to write
    holder.kill()
    holder.communicate()
    claim_output_dir(tmp_path)
    assert status(tmp_path)["status"] == "running"


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir=.*file/run cannot be written: Not a directory"):
        claim_output_dir(tmp_path / "file" / "run")


def test_the_status_is_that_of_whoever_claimed_the_directory(tmp_path):
    write_status(tmp_path, "done", 3)
    assert not (tmp_path / "status.json").exists()
    claim_output_dir(tmp_path)
    write_status(tmp_path, "stopped", 3, "SIGTERM")
    assert status(tmp_path) == {"status": "stopped", "step": 3, "reason": "SIGTERM"}
    with pytest.raises(UserError), mistakes_noted(tmp_path):
        raise UserError("--resume=x: holds no checkpoint")
    assert status(tmp_path) == {"status": "user error", "step": None, "reason": "--resume=x: holds no checkpoint"}
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoints", "samples", "logs", "status.json"}


def test_an_output_dir_that_is_not_shared_is_refused(tmp_path):
    class Two(Ranks):
        def gather(self, value):
            return [value, False]  # the other node has a disk of its own

    check_shared(tmp_path, Ranks(0, 0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match="of rank 1 is not that of rank 0"):
        check_shared(tmp_path, Two(0, 0, 1, torch.device("cpu")))
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(
    ".lock is left from a run that is gone, or names a process that lives but does not hold it",
    "it does not hinder; who holds it is asked of the system",
)
def test_a_stale_lock_does_not_hinder(tmp_path, injected, capsys):
    contents = ["4194999", str(os.getpid()), "1", "no number", ""]
    for content in contents:
        (tmp_path / ".lock").write_text(content)
        lock, holder = take_lock(tmp_path / ".lock")
        assert holder is None and (tmp_path / ".lock").read_text() == str(os.getpid())
        lock.close()
    assert not capsys.readouterr().err
    injected(len(contents))


@pytest.mark.fault("the file system has no locks", "the run goes on, with a warning that nothing keeps others out")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_mentioned(tmp_path, monkeypatch, capsys, injected, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    claim_output_dir(tmp_path)
    assert status(tmp_path)["status"] == "running"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/.lock cannot be locked ({os.strerror(number)});")
    injected(1)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_holds_is_one_whichever_way_it_is_put(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    (tmp_path / ".lock").write_text("77")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    assert take_lock(tmp_path / ".lock")[1] == "77"
