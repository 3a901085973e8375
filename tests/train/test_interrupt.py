"""Requests to stop: signals and --max_minutes. The answers to signals: tests/e2e/test_ctrl_c.py."""

import os
import signal
import time

import pytest

from train.interrupt import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers_restored():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_to_stop(number, tmp_path):
    stop = StopRequest(0, time.monotonic(), tmp_path)
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested() and not stop.out_of_time() and stop.signal == number.name


def test_under_nohup_sighup_is_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(0, time.monotonic(), tmp_path)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested()


def test_max_minutes_are_minutes(tmp_path):
    late = StopRequest(1, time.monotonic() - 61, tmp_path)
    assert late.requested() and late.out_of_time() and not late.signal
    assert not StopRequest(1, time.monotonic() - 40, tmp_path).requested()
