"""A worker's tie to torchrun, to be made before anything is imported that takes long."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Has the kernel SIGKILL this worker when torchrun dies; a no-op without torchrun, and elsewhere than on Linux.

    A SIGKILL of torchrun reaches nobody else: its workers, each in a session of its own, would train on, holding
    the GPUs and the output directory, or wait half an hour for each other if they have not met.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if _launcher_is_gone():  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _launcher_is_gone() -> bool:
    """Whether nobody hosts torchrun's store any more, which it does itself on a single machine.

    Who our parent is does not tell: an orphan has a new one, and nothing says that it is not the first.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("LOCAL_WORLD_SIZE") != env.get("WORLD_SIZE"):
        return False
    try:
        socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"])), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # whatever that is, init_process_group will say it better
    return False


def launched_world_size() -> int:
    """The number of processes that torchrun has started, 1 without it. Others set WORLD_SIZE too, but not the ranks."""
    launched = "RANK" in os.environ and "LOCAL_RANK" in os.environ
    return int(os.environ.get("WORLD_SIZE", 1)) if launched else 1


def launched_rank() -> int:
    """Returns this process's rank as set by torchrun, 0 without it. It does not import torch."""
    return int(os.environ["RANK"]) if launched_world_size() > 1 else 0
