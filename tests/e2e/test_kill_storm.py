"""Runs killed in every phase end bit-equal to an undisturbed run. scripts/soak.sh is the long form."""

import signal
import subprocess
import sys
import time

import pytest

from tests.soak.kills import PHASES, ROOT, SAVE_EVERY, TARGETS
from tests.soak.main import make_shards, parse, soak_stage
from tests.soak.processes import processes_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
# Few kills: starting the launcher and its workers takes about 7 s of one core, starting only the workers 5 s.
SHORT = {
    0: [("launcher", "start-up"), ("worker", "save"), ("all", "prune"), ("all", "start-up")],
    3: [("worker", "evaluation"), ("launcher", "save")],
}


def soak(stage, folder, *flags, plan=None):
    """Returns the kills and the most steps that one of them cost. Fails if a promise did not hold."""
    args, train_flags = parse(["--kills=15", *flags])
    make_shards(folder / "shards")
    kills, problems = soak_stage(stage, args, train_flags, folder, plan)
    assert not problems
    return kills, max(kill.repeated for kill in kills)


@pytest.mark.slow
@pytest.mark.fault(
    "SIGKILL of one worker, all workers, or the launcher",
    "bit-equal; no orphan processes; only the steps since the last save are repeated",
)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_killed_in_several_phases_ends_bit_equal(injected, tmp_path, stage):
    kills, most = soak(stage, tmp_path, "--n_embd=32", "--val_max_steps=10", plan=SHORT[stage])
    assert [(kill.target, kill.planned) for kill in kills] == SHORT[stage]
    hit = [kill.phase == kill.planned for kill in kills]
    assert sum(hit) >= len(hit) - 1, kills  # the shortest phase may be missed on a busy machine
    injected(len(kills), f"at most {most} steps repeated, saved every {SAVE_EVERY}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_with_muon_killed_in_several_phases_ends_bit_equal(tmp_path, stage):
    soak(stage, tmp_path, "--n_embd=32", "--val_max_steps=10", "--optimizer=muon", plan=SHORT[0])


@pytest.mark.slow
@pytest.mark.fault(
    "15 SIGKILLs per run, stages 0 to 3",
    "bit-equal; no orphan processes; only the steps since the last save are repeated",
)
@pytest.mark.parametrize("stage", range(4))
def test_killed_fifteen_times(injected, tmp_path, stage):
    kills, most = soak(stage, tmp_path)
    assert {kill.target for kill in kills} == set(TARGETS)
    assert {kill.phase for kill in kills} >= set(PHASES) - {
        "training"
    }  # a random time in training may fall into another phase
    injected(len(kills), f"at most {most} steps repeated, saved every {SAVE_EVERY}")


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "tests.soak.main", "--kills=1", f"--output_dir={tmp_path / 'soak'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = tmp_path / "soak" / "stage0" / "undisturbed"
    deadline = time.monotonic() + 60
    while 1 not in processes_of(runs).values():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[0] == "interrupted\n" and process.returncode == 130
    assert not processes_of(runs)
