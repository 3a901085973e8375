"""The warm interpreter of the tests behaves like `python`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it needs pidfds and abstract sockets")
SCRIPT = """
import os, signal, sys, time
print(__name__, sys.argv[1:], os.environ.get("GIVEN"), os.getcwd(), "torch" in sys.modules, flush=True)
assert not {"util", "cfg", "model", "data", "eval", "train", "train_gpt", "tests"} & set(sys.modules)
what = sys.argv[1]
if what == "raise":
    raise KeyError("lost")
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.exit(3 if what == "exit" else 0)
"""


@pytest.fixture
def start(warm_python, tmp_path):
    def run(*arguments):
        (tmp_path / "script.py").write_text(SCRIPT)
        command = [warm_python.executable, "-u", str(tmp_path / "script.py"), *arguments]
        env = {**os.environ, **warm_python.env, "GIVEN": "yes"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=env, cwd=tmp_path, **pipes)

    return run


@pytest.mark.parametrize(
    "what, code, error", [("", 0, ""), ("exit", 3, ""), ("raise", 1, "KeyError: 'lost'"), ("kill", -9, "")]
)
def test_a_script_gets_what_was_given_and_its_exit_code_is_returned(start, tmp_path, what, code, error):
    process = start(what, "a b")
    out, err = process.communicate(timeout=60)
    assert out == f"__main__ ['{what}', 'a b'] yes {tmp_path} True\n"
    assert process.returncode == code and error in err


def test_signals_are_forwarded(start):
    process = start("wait")
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 7


def test_a_killed_client_takes_the_script_with_it(start):
    process = start("wait")
    process.stdout.readline()
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.kill()
    process.communicate(timeout=60)  # the script holds the pipes
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
