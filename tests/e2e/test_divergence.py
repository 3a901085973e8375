"""NaN, infinity and spikes: all ranks skip the step, the run rolls back, and it ends if that does not help."""

import json
import re
from pathlib import Path

import pytest
import torch

from data.loader import Loader
from data.shards import open_shard
from model.formats.checkpoint import find_checkpoint, load_tensors, tensor_shapes

FAILING = str(Path(__file__).with_name("failing_training.py"))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


WHERE = [("loss", 0), slow("gradient", 3), slow("gradient", 0), slow("loss", 1), slow("gradient", 2), slow("loss", 3)]


@pytest.fixture(scope="module")
def train(trainer):
    """Runs failing_training.py like the real command. FAIL, SKIP_DATA and BATCHES are its variables."""

    def run(output_dir, *flags, ranks=1, code=0, **env):
        return trainer.run(output_dir, *flags, ranks=ranks, code=code, script=FAILING, env=env)

    return run


def tensors(checkpoint):
    """Reads all tensors of the model and the optimizer of a checkpoint."""
    found = {}
    for kind in ("model", "optimizer"):
        found |= {f"{kind}/{name}": torch.empty(shape) for name, shape in tensor_shapes(checkpoint, kind).items()}
        load_tensors(checkpoint, kind, {n.partition("/")[2]: t for n, t in found.items() if n.startswith(kind)})
    return found


@pytest.mark.fault("loss or gradient not finite on one rank", "all ranks skip the step; counted and logged")
@pytest.mark.parametrize("what,stage", WHERE)
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(train, metrics, injected, tmp_path, what, stage):
    run = tmp_path / "run"
    flags = [f"--zero_stage={stage}", "--num_iterations=10", "--save_every_niter=1", "--keep_last=4", "--log_every=100"]
    done = train(run, *flags, ranks=2, FAIL=f"{what}@8-8")
    assert [r["step"] for r in metrics(run) if "skipped" in r] == [8]
    assert re.search(r"step 8/10 .* skipped: loss or gradient not finite", done.stdout)
    assert f"in {10 if what == 'gradient' else 9} steps, 1 skipped" in done.stdout
    before, after, later = (tensors(run / f"checkpoints/step_{step:08d}") for step in (7, 8, 9))
    assert all((before[name] == after[name]).all() for name in before)
    assert any((after[name] != later[name]).any() for name in after)
    injected(1, "1 step")


ROLL_BACK = ["--num_iterations=24", "--save_every_niter=10", "--dropout=0.1"]


@pytest.fixture(scope="module")
def without_the_bad_data(train, trace, parameters_of, tmp_path_factory):
    """A run with the batches of steps 17 to 30 in steps 11 to 24, as after a roll-back from step 16 to step 10."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train(run, *ROLL_BACK, SKIP_DATA="11+6")
    return trace(run), parameters_of(run / "checkpoints/step_00000024")


@pytest.mark.fault(
    "loss or gradient not finite in 5 steps in a row",
    "rolls back to the last good checkpoint and skips that data, also if it is killed then",
)
@pytest.mark.parametrize("resumed", [False, slow(True)])
def test_bad_data_is_skipped(train, shards, assert_same_run, without_the_bad_data, injected, tmp_path, resumed):
    run = tmp_path / "run"
    if resumed:  # it is killed between the bad steps, before a checkpoint, and again after the roll-back
        train(run, *ROLL_BACK, FAIL="loss@12-16", RAWGPT_FAULT="metrics#14=KILL", code=-9)
        train(run, *ROLL_BACK, FAIL="loss@12-16", RAWGPT_FAULT="metrics#13=KILL", code=-9)
    done = train(run, *ROLL_BACK, FAIL="loss@12-16", BATCHES=str(tmp_path / "batches.jsonl"))
    assert "loss or gradient not finite in step 16: rolled back to step 10" in done.stdout
    received = [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    # The batches of steps 11 to 16 do not come again: steps 11 to 24 train on batches 17 to 30.
    assert [r["index"] for r in received] == [*range(11 if resumed else 1, 17), *range(17, 31)]
    paths = sorted(shards.glob("*_train_*.bin"))
    data = Loader([open_shard(path, 251) for path in paths], 32, 8, 1337, True, "input_train_bin")
    assert all(r["batch"] == data.batch(r["index"]).tolist() for r in received)
    assert_same_run(run, without_the_bad_data)
    again = (run / "logs/metrics_superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in again if "skipped" in line][-5:] == [12, 13, 14, 15, 16]
    injected(5, "6 steps and their data")


@pytest.mark.fault("the gradient overflows in float16", "the loss scale is halved; scale and count survive a kill")
def test_the_loss_scale_falls_and_survives_a_resume(train, injected, tmp_path):
    run, flags = tmp_path / "run", ["--dtype=float16", "--num_iterations=10", "--val_loss_every=0"]
    train(run, *flags, FAIL="gradient@3-3", RAWGPT_FAULT="metrics#7=KILL", code=-9)
    train(run, *flags)
    for step, good_steps in ((5, 2), (10, 7)):
        state = json.loads((run / f"checkpoints/step_{step:08d}/state.json").read_text())
        assert state["scaler"] == {"value": 2.0**15, "good_steps": good_steps}
    injected(1, "1 step")


@pytest.mark.fault("not finite with all data", "exit code 3 after --max_rollbacks; the last good checkpoint is kept")
def test_a_run_that_stays_bad_after_roll_backs_ends(train, injected, tmp_path):
    run = tmp_path / "run"
    err = train(run, "--max_rollbacks=2", "--rollback_after=3", FAIL="gradient@7-99", code=3).stderr
    line = "diverged: loss or gradient not finite in step 8, and rolling back to step 5 (2 times, --max_rollbacks)"
    assert f"error: {line}" in err and "Traceback" not in err
    assert json.loads((run / "status.json").read_text())["status"] == "diverged"
    assert find_checkpoint(run).name == "step_00000005"
    train(run)  # without the fault it continues
    assert find_checkpoint(run).name == "step_00000020"
    # Checkpoints 8 to 12, saved while all steps are skipped, have the weights of step 6 and do not help.
    flags = ["--max_rollbacks=2", "--rollback_after=3", "--save_every_niter=2", "--resume=never"]
    err = train(tmp_path / "often", *flags, FAIL="gradient@7-99", code=3).stderr
    assert "in step 13, and rolling back to step 12 (2 times, --max_rollbacks) did not help" in err
    err = train(tmp_path / "new", FAIL="gradient@1-99", code=3).stderr
    assert "not finite in step 5, and no checkpoint yet to roll back to; lower --learning_rate" in err
    injected(9 + 7 + 5, "the steps since the checkpoint")


@pytest.mark.fault(
    "a gradient norm above the limit of --skip_spikes", "the step is skipped; the recent norms survive a resume"
)
@pytest.mark.parametrize("resumed", [slow(False), True])
def test_a_spike_is_skipped(train, metrics, injected, tmp_path, resumed):
    run = tmp_path / "run"
    flags = ["--skip_spikes=6", "--schedule=constant", "--save_every_niter=68", "--val_loss_every=0"]
    if resumed:
        train(run, *flags, "--num_iterations=68")
    done = train(run, *flags, "--num_iterations=72", FAIL="spike@70-70")
    assert [r["step"] for r in metrics(run) if "skipped" in r] == [70]
    assert re.search(r"step 70/72 .* skipped: norm \d+.*, a spike above ", done.stdout)
    assert metrics(run)[-1]["grad_norm"] < 10
    injected(1, "1 step")


@pytest.mark.fault(
    "a weight or a moment on one rank becomes NaN",
    "never saved; rolls back to the last good checkpoint and skips that data",
)
@pytest.mark.parametrize(
    "what, ranks, stage",
    [slow("weights", 2, 3), ("moments", 1, 0), slow("weights", 2, 0), slow("weights", 2, 1), slow("weights", 2, 2)],
)
def test_poisoned_weights_are_never_saved(train, metrics, injected, tmp_path, what, ranks, stage):
    run = tmp_path / "run"
    done = train(run, f"--zero_stage={stage}", "--keep_last=9", ranks=ranks, FAIL=f"{what}@10-10")
    assert "weights not finite in step 10: rolled back to step 5" in done.stdout
    for checkpoint in sorted((run / "checkpoints").glob("step_*")):
        assert all(value.isfinite().all() for value in tensors(checkpoint).values()), checkpoint
    assert [r["step"] for r in metrics(run)] == list(range(1, 21))
    injected(1, "5 steps and their data")


def test_poisoned_weights_are_not_saved_when_a_stop_interrupts_an_evaluation(trainer, train, tmp_path):
    run, script = tmp_path / "run", str(Path(FAILING).with_name("interrupted_evaluation.py"))
    flags = ["--val_loss_every=7", "--num_iterations=10"]
    trainer.run(run, *flags, code=4, script=script, env={"FAIL": "weights@7-7"})
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000005"]
    assert "resuming from" in train(run, *flags).stdout
