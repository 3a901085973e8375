"""Whoever is killed, and whenever: the run is the undisturbed one bit for bit. The long form is scripts/soak.py."""

import signal
import subprocess
import sys
import time

import pytest

from scripts.soak import MOMENTS, ROOT, SAVE_EVERY, TARGETS, make_shards, parse, processes_of, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
# Time is short here: a start of the launcher and its workers takes some 7 s of one core, of the workers alone 5.
SHORT = {
    0: [("launcher", "start-up"), ("worker", "save"), ("all", "prune")],
    3: [("all", "start-up"), ("worker", "evaluation"), ("launcher", "save"), ("worker", "prune")],
}


def storm(stage, folder, *flags, moments=None):
    """The kills, and the most steps that one has cost; fails with what did not hold."""
    args, train_flags = parse(["--kills=15", *flags])
    make_shards(folder / "shards")
    kills, problems = soak(stage, args, train_flags, folder, moments)
    assert not problems
    return kills, max(kill.repeated for kill in kills)


@pytest.mark.fault("SIGKILL of a worker, all, or the launcher", "bit-equal; no orphans; at most the steps since a save")
@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_at_start_up_and_in_save_prune_and_evaluation(injected, tmp_path, stage):
    kills, most = storm(stage, tmp_path, "--n_embd=32", "--val_max_steps=10", moments=SHORT[stage])
    assert [(kill.target, kill.asked) for kill in kills] == SHORT[stage]
    hit = [kill.moment == kill.asked for kill in kills]
    assert sum(hit) >= len(hit) - 1, kills  # a machine may be too busy for the shortest
    injected(len(kills), f"at most {most} steps repeated, saved every {SAVE_EVERY}")


@pytest.mark.slow
@pytest.mark.fault("SIGKILL, 15 a run, stages 0 to 3", "bit-equal; no orphans; at most the steps since a save")
@pytest.mark.parametrize("stage", range(4))
def test_killed_fifteen_times(injected, tmp_path, stage):
    kills, most = storm(stage, tmp_path)
    assert {kill.target for kill in kills} == set(TARGETS)
    assert {kill.moment for kill in kills} >= set(MOMENTS) - {"training"}  # any time in training may be within another
    injected(len(kills), f"at most {most} steps repeated, saved every {SAVE_EVERY}")


def test_ctrl_c_leaves_no_process(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kills=1", f"--output_dir={tmp_path / 'soak'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = tmp_path / "soak" / "stage0" / "undisturbed"
    deadline = time.monotonic() + 60
    while 1 not in processes_of(runs).values():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "interrupted\n" and process.returncode == 130
    assert not processes_of(runs)
