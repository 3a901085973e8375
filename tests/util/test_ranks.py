"""Choosing a device, and deciding on rank 0, and leaving together."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util.device import choose_device
from util.errors import UserError
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


def test_auto_takes_the_best_there_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0).type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", 0).type == "mps"
    assert choose_device("cpu", 0).type == "cpu"


def test_cuda_gives_each_local_rank_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto", 1) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(UserError, match="more than the 2 GPUs"):
        choose_device("cuda", 2)


def test_what_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device=cuda: this machine has none"):
        choose_device("cuda", 0)


def test_one_rank_needs_no_collective():
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    assert ranks.on_main(lambda: "chosen") == "chosen"
    assert ranks.sum_floats([1.0, 2.0]) == [1.0, 2.0]
    assert ranks.sum(torch.tensor(3.0), torch.tensor(1.0)) == [3.0, 1.0]
    assert ranks.any(False, True) == [False, True]


def test_training_leaves_without_the_teardown_in_which_gloo_may_abort():
    """pytorch#179291, by its cause: it takes a run of 4 ranks that keep a DDP module to the end about three tries."""
    for teardown, expected in ((True, "teardown\n"), (False, "")):
        code = "import atexit; from util.errors import run_command; atexit.register(print, 'teardown'); "
        code += f"run_command(lambda: 4, teardown={teardown})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (4, expected)


def test_an_interrupted_run_waits_for_no_thread():
    code = "import threading, time; from util.errors import run_command\n"
    code += "def main():\n    threading.Thread(target=time.sleep, args=(60,)).start(); raise KeyboardInterrupt\n"
    code += "run_command(main, teardown=False)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_crash_is_told_and_waits_for_no_thread():
    code = "import threading, time; from util.errors import run_command; "
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); run_command(lambda: 1 / 0, teardown=False)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
