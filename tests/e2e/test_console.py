"""The console of a run that goes away, running out of memory, and the log of each rank."""

import signal
from pathlib import Path

import pytest

from model.formats.checkpoint import find_checkpoint

FAILING = str(Path(__file__).with_name("failing_training.py"))
LONG = ["--num_iterations=100000", "--save_every_niter=0", "--val_loss_every=0", "--log_every=1"]


def ignore_sighup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def default_sighup():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup


@pytest.mark.fault("the console goes away", "the run ends with a checkpoint; under nohup it continues")
@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_run_without_a_console_ends_with_a_checkpoint_or_continues_under_nohup(
    trainer, metrics, wait_for, injected, tmp_path, nohup
):
    run = tmp_path / "run"
    process = trainer.start(run, *LONG, preexec_fn=ignore_sighup if nohup else default_sighup)
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


@pytest.mark.slow
@pytest.mark.fault(
    "out of memory during a save in the background", "the checkpoint is completed; one line, exit code 2"
)
def test_running_out_of_memory_during_a_save_keeps_the_checkpoint(trainer, injected, tmp_path):
    run = tmp_path / "run"
    flags = ["--async_save=1", "--save_every_niter=7"]
    done = trainer.run(run, *flags, code=2, script=FAILING, env={"FAIL": "oom@8-8"})
    assert "error: out of memory on the GPU (CUDA out of memory); lower --batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert find_checkpoint(run).name == "step_00000007"
    assert "error: out of memory" in (run / "logs/rank_0.log").read_text().splitlines()[-1]
    injected(1, "the steps since the checkpoint")


@pytest.mark.slow
def test_the_log_has_the_lines_of_each_start_and_rank(trainer, tmp_path):
    run = tmp_path / "run"
    for steps in (5, 10):
        trainer.run(run, f"--num_iterations={steps}", "--log_every=5", ranks=2)
    for rank in (0, 1):
        lines = (run / f"logs/rank_{rank}.log").read_text().splitlines()
        assert sum(f"rank {rank} of 2 on " in line for line in lines) == 2
        assert sum("step 5/5 | loss" in line for line in lines) == 1
        assert sum("step 10/10 | loss" in line for line in lines) == 1
    assert "loss curve" in (run / "logs/rank_0.log").read_text().splitlines()[-1]
