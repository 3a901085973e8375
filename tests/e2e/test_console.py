"""What a run leaves behind when it fails, and what it does when nobody reads its console any longer."""

import signal
from pathlib import Path

import pytest

from model.formats.checkpoint import find_checkpoint

FAILING = str(Path(__file__).with_name("failing_training.py"))
LONG = ["--num_iterations=100000", "--save_every_niter=0", "--val_loss_every=0", "--log_every=1"]


def as_nohup_does():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def as_without():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started these tests


@pytest.mark.fault("nobody reads the console any longer", "ends well, with a checkpoint; under nohup it goes on")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_console_that_goes_away(trainer, metrics, wait_for, injected, tmp_path, nohup):
    run = tmp_path / "run"
    process = trainer.start(run, *LONG, preexec_fn=as_nohup_does if nohup else as_without)
    assert wait_for(lambda: len(metrics(run)) >= 5, process)
    process.stdout.close()
    if nohup:
        gone = len(metrics(run))
        assert wait_for(lambda: len(metrics(run)) > gone + 20, process)
        process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait(timeout=60) == 4
    assert find_checkpoint(run) is not None
    log = (run / "logs/rank_0.log").read_text()
    assert f"stopped by {'SIGTERM' if nohup else 'SIGHUP'} after step" in log
    injected(1)


@pytest.mark.fault("out of memory while a save is under way", "the checkpoint is finished; one line, exit code 2")
def test_out_of_memory_does_not_cost_the_checkpoint_under_way(trainer, injected, tmp_path):
    run = tmp_path / "run"
    flags = ["--async_save=1", "--save_every_niter=7"]
    done = trainer.run(run, *flags, code=2, script=FAILING, env={"FAIL": "oom@8-8"})
    assert "error: out of memory on the GPU (CUDA out of memory); lower --batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert find_checkpoint(run).name == "step_00000007"
    assert "error: out of memory" in (run / "logs/rank_0.log").read_text().splitlines()[-1]
    injected(1, "the steps since the checkpoint")


def test_each_start_and_rank_has_its_lines_in_the_log(trainer, tmp_path):
    run = tmp_path / "run"
    for steps in (5, 10):
        trainer.run(run, f"--num_iterations={steps}", "--log_every=5", ranks=2)
    for rank in (0, 1):
        lines = (run / f"logs/rank_{rank}.log").read_text().splitlines()
        assert sum(f"rank {rank} of 2 on " in line for line in lines) == 2
        assert sum("step 5/5 | loss" in line for line in lines) == 1
        assert sum("step 10/10 | loss" in line for line in lines) == 1
    assert "loss curve" in (run / "logs/rank_0.log").read_text().splitlines()[-1]
