"""A rank that hangs is found within the timeout and named with its step. After a restart the run continues."""

import os
import re
import signal
from pathlib import Path

import pytest

FAILING = str(Path(__file__).with_name("failing_training.py"))
FLAGS = ["--step_timeout_minutes=0.05", "--num_iterations=30", "--log_every=1"]


def worker(output_dir, rank):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            variables = (process / "environ").read_text().split("\0")
        except OSError:
            continue
        if f"--output_dir={output_dir}" in words and f"RANK={rank}" in variables:
            return int(process.name)
    raise LookupError(f"no rank {rank}")


def last_line(output_dir, rank):
    return (output_dir / f"logs/rank_{rank}.log").read_text().splitlines()[-1]


@pytest.mark.fault(
    "SIGSTOP of one rank",
    "all ranks end within --step_timeout_minutes and name rank and step; torchrun's restart continues",
)
@pytest.mark.slow  # the next test of a hanging rank takes less long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_restart_continues(
    trainer, metrics, wait_for, assert_same_run, undisturbed, injected, tmp_path, rank
):
    run = tmp_path / "run"
    flags = [*FLAGS, "--num_iterations=60", "--save_every_niter=20"]  # a save may take longer
    process = trainer.start(run, *flags, ranks=2, restarts=1)
    assert wait_for(lambda: len(metrics(run)) >= 1, process)
    pid = worker(run, rank)
    assert wait_for(lambda: len(metrics(run)) >= 22, process)
    os.kill(pid, signal.SIGSTOP)
    other = 1 - rank
    assert wait_for(lambda: "error: no progress" in (run / f"logs/rank_{other}.log").read_text(), process)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    line = next(line for line in err.splitlines() if "no progress" in line)
    assert re.match(rf"error: no progress for 0.05 minutes in [\w ]+: rank {rank} does not answer, last seen in", line)
    assert int(re.search(r"step (\d+)|validation", line)[1] or 99) >= 22
    assert out.count("resuming from") == 1
    assert_same_run(run, undisturbed(2, *flags))
    injected(1, "the steps since the checkpoint")


@pytest.mark.slow  # torchrun waits half a minute before it kills
@pytest.mark.fault(
    "SIGSTOP of one rank during a save", "all ranks end within --start_timeout_minutes and name the rank"
)
def test_a_rank_stopped_in_a_save_is_named(trainer, injected, tmp_path):
    flags = ["--start_timeout_minutes=0.2", "--num_iterations=10", "--val_loss_every=0"]
    done = trainer.run(tmp_path / "run", *flags, ranks=2, code=1, fault="save flush@1=STOP")
    assert "error: no progress for 0.2 minutes in the save of step 5: rank 1 does not answer" in done.stderr
    injected(1, "the steps since the checkpoint")


@pytest.mark.slow
@pytest.mark.fault("one rank hangs without dying", "all ranks end and name the step and its place in the code")
def test_a_stuck_rank_is_named_with_its_place_in_the_code(trainer, injected, tmp_path):
    run = tmp_path / "run"
    done = trainer.run(run, *FLAGS, ranks=2, code=1, script=FAILING, env={"FAIL": "stuck@8-8"})
    line = next(line for line in done.stderr.splitlines() if "no progress" in line)
    assert "no progress for 0.05 minutes in step 8" in line
    assert re.search(r"rank 1 is at tests/e2e/failing_training.py:\d+ \(forward_or_fail\)", line)
    assert "forward_or_fail" in (run / "logs/rank_1.log").read_text()  # its stack
    assert "error: no progress" in last_line(run, 0) and "error: no progress" in last_line(run, 1)
    injected(1, "the steps since the checkpoint")
