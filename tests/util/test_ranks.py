"""The choice of the device, collectives with one rank, and the exit of a process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util.device import choose_device
from util.errors import UserError
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


def test_auto_chooses_the_best_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0).type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", 0).type == "mps"
    assert choose_device("cpu", 0).type == "cpu"


def test_cuda_gives_each_local_rank_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto", 1) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(UserError, match="more than the 2 GPUs"):
        choose_device("cuda", 2)


def test_a_missing_device_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device=cuda: this machine has none"):
        choose_device("cuda", 0)


def test_one_rank_needs_no_collective():
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    assert ranks.on_main(lambda: "chosen") == "chosen"
    assert ranks.sum_floats([1.0, 2.0]) == [1.0, 2.0]
    assert ranks.sum(torch.tensor(3.0), torch.tensor(1.0)) == [3.0, 1.0]
    assert ranks.any(False, True) == [False, True]
    answers = ranks.ask(lambda: True, lambda: False)
    assert ranks.sum(torch.tensor(3.0)) == [3.0] and answers() == [True, False]
    assert ranks.sum(torch.tensor(4.0)) == [4.0] and answers() == []  # each question is asked once


def test_a_run_exits_without_the_interpreter_teardown():
    """gloo may abort in the teardown (pytorch#179291), in about one of three runs of 4 ranks with DDP."""
    for teardown, expected in ((True, "teardown\n"), (False, "")):
        code = "import atexit; from util.errors import run_command; atexit.register(print, 'teardown'); "
        code += f"run_command(lambda: 4, teardown={teardown})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (4, expected)


def test_an_interrupted_run_does_not_wait_for_threads():
    code = "import threading, time; from util.errors import run_command\n"
    code += "def main():\n    threading.Thread(target=time.sleep, args=(600,)).start(); raise KeyboardInterrupt\n"
    code += "run_command(main, teardown=False)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_crash_prints_its_traceback_and_does_not_wait_for_threads():
    code = "import threading, time; from util.errors import run_command; "
    code += "threading.Thread(target=time.sleep, args=(600,)).start(); run_command(lambda: 1 / 0, teardown=False)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
