"""A worker dies with its launcher, also if the launcher dies early."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_worker_dies_with_its_launcher_and_not_otherwise(under_torchrun):
    worker = (
        "import time; from util.launcher import die_with_launcher as d; d(); print('up', flush=True); time.sleep(60)"
    )
    launcher = f"import subprocess, sys; w = subprocess.Popen([sys.executable, '-c', {worker!r}]); print(w.pid); "
    env = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    env |= {"TORCHELASTIC_RUN_ID": "x"} if under_torchrun else {}
    process = subprocess.Popen([sys.executable, "-uc", launcher + "w.wait()"], env=env, cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "up\n"
    process.kill()
    if under_torchrun:
        assert process.stdout.read() == ""  # at its end: the worker has exited
    else:
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)  # raises ProcessLookupError if it has exited
        process.stdout.read()
    process.wait()


@pytest.mark.parametrize("hosted,code", [(True, 0), (False, -signal.SIGKILL)])
def test_a_worker_that_starts_after_the_death_of_its_launcher_is_killed(hosted, code):
    with socket.socket() as store:
        store.bind(("localhost", 0))
        if hosted:
            store.listen()
        env = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"}
        env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.getsockname()[1])}
        worker = [sys.executable, "-c", "from util.launcher import die_with_launcher as d; d()"]
        assert subprocess.run(worker, env=os.environ | env, cwd=ROOT).returncode == code
