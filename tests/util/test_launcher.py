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


def store_environment(store: socket.socket) -> dict[str, str]:
    """Returns the environment of a worker of 2 whose launcher hosts `store`."""
    env = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.getsockname()[1])}
    return {**os.environ, **env, "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize("hosted,code", [(True, 0), (False, -signal.SIGKILL)])
def test_a_worker_that_starts_after_the_death_of_its_launcher_is_killed(hosted, code):
    with socket.socket() as store:
        store.bind(("localhost", 0))
        if hosted:
            store.listen()
        worker = [sys.executable, "-c", "from util.launcher import die_with_launcher as d; d()"]
        assert subprocess.run(worker, env=store_environment(store), cwd=ROOT).returncode == code


def test_a_worker_in_the_rendezvous_is_killed_when_the_port_of_its_dead_launcher_closes():
    """The sockets of a killed launcher may stay open for a while after its workers have lost their parent."""
    worker = "from util.launcher import die_with_launcher; die_with_launcher()\n"
    worker += "from util.ranks import init_ranks; print('up', flush=True); init_ranks('cpu')"
    with socket.socket() as store:
        store.bind(("localhost", 0))
        store.listen()
        env = store_environment(store)
        process = subprocess.Popen([sys.executable, "-c", worker], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "up\n"
        time.sleep(1)
        assert process.poll() is None
    try:
        assert process.wait(timeout=30) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
