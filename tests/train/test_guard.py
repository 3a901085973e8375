"""Stopping early, and one run per directory."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cfg.errors import UserError
from train.distributed import Ranks
from train.guard import SIGNALS, StopRequest, check_shared, claim_output_dir


@pytest.fixture(autouse=True)
def handlers_restored():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number):
    stop = StopRequest(0, time.monotonic())
    assert stop.votes() == [0.0, 0.0]
    os.kill(os.getpid(), number)
    assert stop.votes() == [1.0, 0.0] and stop.reason == number.name


def test_a_second_ctrl_c_interrupts_at_once():
    StopRequest(0, time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_clock_votes_for_itself():
    assert StopRequest(1e-9, time.monotonic() - 1).votes() == [0.0, 1.0]
    assert StopRequest(100, time.monotonic()).votes() == [0.0, 0.0]


def test_a_directory_is_locked_while_its_process_lives(tmp_path):
    code = f"from pathlib import Path; from train.guard import claim_output_dir as c; c(Path({str(tmp_path)!r}))"
    holder = subprocess.Popen([sys.executable, "-c", code + "; print('locked', flush=True); input()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid}"):
        claim_output_dir(tmp_path)
    holder.kill()
    holder.communicate()
    claim_output_dir(tmp_path)


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir=.*file/run cannot be written: Not a directory"):
        claim_output_dir(tmp_path / "file" / "run")


def test_an_output_dir_that_is_not_shared_is_refused(tmp_path):
    class Two(Ranks):
        def gather(self, value):
            return [value, False]  # the other node has a disk of its own

    check_shared(tmp_path, Ranks(0, 0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match="of rank 1 is not that of rank 0"):
        check_shared(tmp_path, Two(0, 0, 1, torch.device("cpu")))
    assert not list(tmp_path.iterdir())
