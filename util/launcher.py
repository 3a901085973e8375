"""The connection of a worker to torchrun, set up before slow imports."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Asks the kernel to SIGKILL this worker when torchrun dies. Does nothing without torchrun or outside Linux.

    A SIGKILL of torchrun does not reach its workers, because each has its own session. They would continue to train
    and hold the GPUs and the output directory, or wait half an hour for each other before the first collective.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if _launcher_is_gone():  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def watch_launcher() -> Iterator[None]:
    """Sends SIGKILL to this worker if torchrun's store is down at the start of the block, or goes down within it.

    A killed torchrun loses its children before its sockets close. A worker that calls `die_with_launcher` between the
    two has no launcher and does not notice. It would wait for the store in the rendezvous until the timeout.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if _launcher_is_gone():
                os.kill(os.getpid(), signal.SIGKILL)
            done.wait(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _launcher_is_gone() -> bool:
    """Returns whether torchrun's store is down. On a single machine torchrun itself hosts the store.

    The parent process does not tell: an orphan gets a new parent, which looks like any other.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE"):
        return False
    try:
        socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"])), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # init_process_group will report it with more detail
    return False


def launched_world_size() -> int:
    """Returns the number of processes that torchrun started, 1 without it.

    Other launchers set WORLD_SIZE too, but not RANK and LOCAL_RANK.
    """
    launched = "RANK" in os.environ and "LOCAL_RANK" in os.environ
    return int(os.environ.get("WORLD_SIZE", 1)) if launched else 1


def launched_rank() -> int:
    """Returns this process's rank as set by torchrun, 0 without it. It does not import torch."""
    return int(os.environ["RANK"]) if launched_world_size() > 1 else 0
