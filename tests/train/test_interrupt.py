"""Requests to stop: signals and --max_minutes."""

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


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_to_stop(number):
    stop = StopRequest(0, time.monotonic())
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested() and not stop.out_of_time() and stop.signal == number.name


def test_under_nohup_sighup_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(0, time.monotonic())
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested()


def test_a_second_ctrl_c_interrupts_at_once():
    StopRequest(0, time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_max_minutes_are_minutes():
    late = StopRequest(1, time.monotonic() - 61)
    assert late.requested() and late.out_of_time() and not late.signal
    assert not StopRequest(1, time.monotonic() - 40).requested()
