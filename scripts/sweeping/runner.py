"""The processes of a sweep: each run is one command `train_gpt.py`, and N run at a time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from scripts.sweeping.settings import Run
from util.errors import UserError
from util.launcher import PR_SET_PDEATHSIG

TRAIN = Path(__file__).resolve().parents[2] / "train_gpt.py"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# torchrun would die of SIGUSR1; the others it handles by default (scripts/launch/env.sh).
TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGQUIT,SIGHUP,SIGUSR1"
CONSOLE = "console.log"  # in the folder of a run


# --- what runs at a time, and where ---


def gpu_ids(text: str) -> list[str]:
    """Returns the GPUs that --gpus names, as values for CUDA_VISIBLE_DEVICES.

    `text` is a number of GPUs, or a list of indices. If CUDA_VISIBLE_DEVICES is set, they are taken from it.
    """
    words = text.split(",") if "," in text else [str(i) for i in range(int(text))] if text.isdecimal() else []
    words = [word.strip() for word in words if word.strip()]
    if not words or len(set(words)) < len(words) or not all(word.isdecimal() for word in words):
        raise UserError(f"--gpus={text}: give a number of GPUs, or indices such as 0,2 (for GPU 0 alone: 0,)")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return words
    available = [word for word in visible.split(",") if word]
    if int(max(words, key=int)) >= len(available):
        raise UserError(f"--gpus={text}: CUDA_VISIBLE_DEVICES={visible} has {len(available)} GPUs; name fewer")
    return [available[int(word)] for word in words]


def make_slots(gpus: str | None, gpus_per_run: int, jobs: int | None) -> list[dict[str, str]]:
    """Returns the environment variables of each run that runs at the same time as the others.

    The cores are divided among all processes, unless OMP_NUM_THREADS is set or there is only one process.
    """
    if gpus is not None and jobs is not None:
        raise UserError(f"--jobs={jobs}: is for runs without --gpus, which gives each run its own GPUs; leave one out")
    for name, value in (("gpus_per_run", gpus_per_run), ("jobs", jobs)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    slots: list[dict[str, str]] = [{} for _ in range(jobs or 1)]
    if gpus is not None:
        ids = gpu_ids(gpus)
        if len(ids) % gpus_per_run:
            raise UserError(f"--gpus={gpus}: {len(ids)} GPUs; must be a multiple of --gpus_per_run={gpus_per_run}")
        groups = [ids[i : i + gpus_per_run] for i in range(0, len(ids), gpus_per_run)]
        slots = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
    processes = len(slots) * gpus_per_run
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        slots = [slot | {"OMP_NUM_THREADS": str(max(1, cores // processes))} for slot in slots]
    return slots


def command(run: Run, slot: dict[str, str], gpus_per_run: int) -> list[str]:
    """Returns the command line of a run. If it was given GPUs, it must not fall back to the CPU."""
    launcher = []
    if gpus_per_run > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus_per_run}"]
        launcher += [f"--signals-to-handle={TORCHRUN_SIGNALS}"]
    device = ["--device=cuda"] if "CUDA_VISIBLE_DEVICES" in slot and run.config.device == "auto" else []
    return [sys.executable, *launcher, str(TRAIN), *run.flags, *device]


# --- running them ---


def run_all(
    runs: Sequence[Run], slots: list[dict[str, str]], gpus_per_run: int, ended: Callable[[Run, int, bool], None]
) -> bool:
    """Runs all, one per slot at a time, and calls `ended(run, exit code, stopping)` after each.

    A signal is passed on to the runs, which save and stop, and no more are started. Returns whether that happened.
    """
    waiting, free = deque(runs), deque(slots)
    running: dict[subprocess.Popen[bytes], tuple[Run, dict[str, str]]] = {}
    forwarded = 0
    with received_signals() as received:
        try:
            while running or (waiting and not received):
                while waiting and free and not received:
                    run, slot = waiting.popleft(), free.popleft()
                    running[start(run, slot, gpus_per_run)] = (run, slot)
                for number in received[forwarded:]:
                    forwarded += 1
                    for process in running:
                        process.send_signal(number)
                for process in [p for p in running if p.poll() is not None]:
                    run, slot = running.pop(process)
                    free.append(slot)
                    ended(run, process.returncode, bool(received))
                time.sleep(0.05)
        finally:
            for process in running:  # after an error of this process
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()
    return bool(received)


def start(run: Run, slot: dict[str, str], gpus_per_run: int) -> subprocess.Popen[bytes]:
    """Starts a run. Its output is appended to console.log in its folder.

    It runs in a new session, so that Ctrl-C in a terminal reaches it only once, through this process.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        (run.folder / "status.json").unlink()  # of an earlier start: a run that fails early would leave it
    env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", **os.environ, **slot}
    with open(run.folder / CONSOLE, "ab") as console:
        return subprocess.Popen(
            command(run, slot, gpus_per_run),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
        )


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork


def _stop_with_parent() -> None:
    """Asks the kernel to send SIGTERM to this process, which then saves and stops, when the sweep is killed."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Yields a list to which each signal that asks to stop is appended when it arrives."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not received:
            again = "; press Ctrl-C again to end them now" if number == signal.SIGINT else ""
            line = f"\n{signal.Signals(number).name}: the runs save a checkpoint and stop{again}\n"
            with suppress(OSError):  # the terminal may be closed
                os.write(2, line.encode())
        received.append(number)

    # nohup ignores SIGHUP.
    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_line(run: Run) -> str:
    """Returns the last line that a run has printed, without `error: `."""
    with suppress(OSError), open(run.folder / CONSOLE, "rb") as console:
        console.seek(max(0, console.seek(0, os.SEEK_END) - 4096))
        lines = console.read().decode(errors="replace").splitlines()
        return next((line.strip().removeprefix("error: ") for line in reversed(lines) if line.strip()), "")
    return ""
