"""The real command, killed at any time in any process: when it is repeated, it ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, str(ROOT / "data" / "text.py")]
# The command with small and slow units and a journal after nearly every unit, so that a small input has many places
# for a kill.
FINE = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from util.errors import run_command
from data import text
from data.prepare import job, sources
sources.UNIT_BYTES, job.JOURNAL_SECONDS = 2**15, 0.02
append = job._append
job._append = lambda *unit: (time.sleep(0.01), append(*unit))
run_command(text.main)
"""
FINE_COMMAND = [sys.executable, "-c", FINE]
OPTIONS = ["--shard_size=300000", "--val_tokens=50000", "--name=x", "--workers=2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """13 MB: four units."""
    random.seed(5)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(1, 9))) for _ in range(2000)]
    path = tmp_path_factory.mktemp("source") / "docs.jsonl"
    with open(path, "w") as f:
        for _ in range(4300):
            f.write(json.dumps({"text": " ".join(random.choices(words, k=random.randint(1, 1000)))}) + "\n")
    assert 3 * 2**22 < path.stat().st_size < 4 * 2**22
    return path


def start(source, out, command=COMMAND):
    return subprocess.Popen(
        [*command, str(source), "--output_dir", str(out), *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
    )


def listen_to_interrupts():
    """Restores SIGINT: it is ignored in background processes of a shell and in their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


@pytest.fixture(scope="module")
def made(source, tmp_path_factory, content):
    """The output of an undisturbed command."""
    out = tmp_path_factory.mktemp("made")
    stdout, stderr = finish(start(source, out))
    assert stdout.startswith(f"{out}: 4,300 documents, ") and not stderr
    return content(out)


def workers_of(process):
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def in_session(pid):
    """Returns the processes of the session that `pid` started, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def all_gone(pid, seconds=60):
    deadline = time.monotonic() + seconds
    while in_session(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not in_session(pid)


def wait_until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def journal_of(out):
    path = out / ".partial" / "journal.json"
    return json.loads(path.read_text())["progress"]["units"] if path.exists() else 0


@pytest.mark.slow
def test_killed_again_and_again(source, made, tmp_path, content):
    """Four kills at random moments. Every second one waits until the journal has advanced."""
    random.seed(7)
    kills = 0
    for k in range(4):
        process = start(source, tmp_path, FINE_COMMAND)
        if k % 2:
            done = journal_of(tmp_path)
            wait_until(lambda done=done: journal_of(tmp_path) > done, process)
        time.sleep(random.uniform(0, 0.4) if k % 2 else random.uniform(0.2, 1.5))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert all(made[path.name] == path.read_bytes() for path in tmp_path.glob("*.bin"))
        assert all_gone(process.pid)
    assert kills == 4 and journal_of(tmp_path) > 1
    out, err = finish(start(source, tmp_path, FINE_COMMAND))
    assert "resuming after " in out and not err
    assert content(tmp_path) == made


def interrupt(process, out):
    """Sends Ctrl-C and checks that the command stops at once, in one line."""
    time.sleep(0.15)
    os.killpg(process.pid, signal.SIGINT)
    _, err = finish(process, code=130)
    assert err == "interrupted\n"
    assert not list(out.glob("*.bin")) and all_gone(process.pid)


@pytest.mark.slow
def test_a_killed_worker_and_ctrl_c_are_one_line_and_can_be_resumed(source, made, tmp_path, content):
    process = start(source, tmp_path, FINE_COMMAND)
    wait_until(lambda: journal_of(tmp_path) > 2, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    out, err = finish(process, code=2)
    assert err.startswith("error: a worker process was killed") and err.count("\n") == 1
    assert all_gone(process.pid)

    process, done = start(source, tmp_path, FINE_COMMAND), journal_of(tmp_path)
    wait_until(lambda: journal_of(tmp_path) > done, process)
    interrupt(process, tmp_path)

    finish(start(source, tmp_path, FINE_COMMAND))
    assert content(tmp_path) == made


def test_ctrl_c_stops_while_workers_start(source, tmp_path):
    process = start(source, tmp_path, FINE_COMMAND)
    wait_until(lambda: len(workers_of(process)) > 1, process)
    interrupt(process, tmp_path)


def test_a_damaged_line_found_by_a_worker_is_one_line(source, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(source.read_bytes() + b'{"text": \n')
    process = start(bad, tmp_path / "out")
    out, err = finish(process, code=2)
    assert err == f"error: {bad}: line 4301 is not JSON; repair it, or skip damaged text with --skip_bad\n"
    assert all_gone(process.pid) and os.listdir(tmp_path / "out") == [".partial"]
