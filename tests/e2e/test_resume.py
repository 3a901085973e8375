"""A stopped and resumed run logs the numbers of an undisturbed run: bit-equal on an equal number of ranks."""

import re
import shutil
import signal
from pathlib import Path

import pytest

INTERRUPTED = str(Path(__file__).with_name("interrupted_evaluation.py"))
# Resume must restore dropout, accumulation (256 tokens = 4 micro-steps of 2 × 32) and the schedule after warm-up.
FLAGS = ["--dropout=0.1", "--num_iterations=30", "--save_every_niter=5"]


def steps_logged(output_dir):
    path = output_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize(
    "ranks,number",
    [
        (2, signal.SIGTERM),
        pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow),
        *(pytest.param(n, signal.SIGINT, marks=pytest.mark.slow) for n in (1, 2)),
        pytest.param(4, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_by_a_signal_resumes_bit_equal(
    trainer, assert_same_run, wait_for, undisturbed, tmp_path, ranks, number
):
    output_dir = tmp_path / "run"
    process = trainer.start(output_dir, *FLAGS, ranks=ranks, python=trainer.warm_python)
    assert wait_for(lambda: steps_logged(output_dir) >= 11, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (4 if ranks == 1 else 1), err  # torchrun returns 1 for every failure
    stopped_at = int((output_dir / "checkpoints/latest").read_text().strip().removeprefix("step_"))
    assert 11 <= stopped_at < 30
    assert f"after step {stopped_at} of 30" in out
    trainer.run(output_dir, *FLAGS, ranks=ranks)
    assert_same_run(output_dir, undisturbed(ranks, *FLAGS))


@pytest.mark.slow
def test_a_run_out_of_time_resumes_bit_equal(trainer, assert_same_run, undisturbed, tmp_path):
    output_dir = tmp_path / "run"
    done = trainer.run(output_dir, *FLAGS, "--max_minutes=0.001")
    assert "stopped by --max_minutes after step" in done.stdout
    trainer.run(output_dir, *FLAGS)
    assert_same_run(output_dir, undisturbed(1, *FLAGS))


def test_an_interrupted_validation_is_repeated_after_the_restart(trainer, trace, tmp_path):
    """The step is saved, the validation is interrupted, and the next start repeats it."""
    flags = ["--val_loss_every=1", "--val_max_steps=90", "--num_iterations=3", "--save_every_niter=0"]
    trainer.run(tmp_path / "whole", *flags)
    trainer.run(tmp_path / "run", *flags, "--max_minutes=1e-9")
    assert trace(tmp_path / "run") == []
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000001\n"
    trainer.run(tmp_path / "run", *flags)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_a_stop_without_validation_data_still_logs_its_step(trainer, metrics, tmp_path):
    """--val_loss_every without data causes no evaluation, so the step is logged at once."""
    trainer.run(tmp_path / "run", "--input_val_bin=", "--val_loss_every=1", "--max_minutes=1e-9")
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_a_run_killed_without_torchrun_resumes_bit_equal(
    trainer, assert_same_run, wait_for, kill_all, undisturbed, tmp_path
):
    """SIGKILL twice in a save and once in training, on one process. With torchrun: test_kill_storm.py."""
    output_dir = tmp_path / "run"
    for where in ("save", "training", "save"):
        process = trainer.start(output_dir, *FLAGS, "--save_every_niter=3")
        if where == "save":
            assert wait_for(lambda: any((output_dir / "checkpoints").glob(".saving_*")), process)
        else:
            goal = steps_logged(output_dir) + 4
            assert wait_for(lambda: steps_logged(output_dir) >= goal, process)  # noqa: B023
        kill_all(process)
    trainer.run(output_dir, *FLAGS, "--save_every_niter=3")
    assert_same_run(output_dir, undisturbed(1, *FLAGS))
    assert not list((output_dir / "checkpoints").glob(".*"))  # no partial checkpoint is left


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Runs of 20 steps without dropout on 1 and 2 ranks, with the checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        trainer.run(folder / str(ranks), "--keep_every=10", ranks=ranks)
    return folder


@pytest.mark.parametrize("first,then", [(1, 2), *(pytest.param(2, n, marks=pytest.mark.slow) for n in (1, 4))])
def test_a_run_resumed_on_other_ranks_trains_on_the_same_samples(trainer, trace, whole, tmp_path, first, then):
    shutil.copytree(whole / str(first), tmp_path / "run")
    for late in (tmp_path / "run" / "checkpoints").glob("step_*"):
        if late.name > "step_00000010":
            shutil.rmtree(late)
    trainer.run(tmp_path / "run", ranks=then)
    for ours, reference in zip(trace(tmp_path / "run"), trace(whole / "1"), strict=True):
        assert ours == pytest.approx(reference, abs=1e-5)


@pytest.fixture(scope="module")
def ten_steps(trainer, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("ten_steps") / "run"
    trainer.run(output_dir, "--num_iterations=10")
    return output_dir


@pytest.fixture
def finished(ten_steps, tmp_path):
    return shutil.copytree(ten_steps, tmp_path / "run")


@pytest.mark.fault(
    "the newest checkpoint has a truncated shard, a flipped byte, a missing shard or half a manifest",
    "it is reported, renamed, and the one before is used; bit-equal",
)
@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "lose", "manifest"))]
)
def test_a_damaged_checkpoint_is_skipped(trainer, trace, finished, injected, damage):
    newest = finished / "checkpoints" / "step_00000010"
    reference = trace(finished)
    model = newest / "model" / "shard-00001-model-00001-of-00001.safetensors"
    if damage == "cut":
        model.write_bytes(model.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(model.read_bytes())
        content[-50] ^= 1
        model.write_bytes(content)
    elif damage == "lose":
        next(newest.glob("optimizer/*")).unlink()
    else:
        (newest / "manifest.json").write_text('{"format": 1, "files": ')
    done = trainer.run(finished, "--num_iterations=10")
    assert f"{newest} is skipped" in done.stdout
    assert "resuming from" in done.stdout and "step_00000005" in done.stdout
    assert trace(finished) == reference
    assert (finished / "checkpoints" / "damaged_step_00000010.1").is_dir()  # kept, not overwritten
    injected(1)


@pytest.mark.fault(
    "all checkpoints are damaged", "exit code 5 and one line; nothing is overwritten, and training does not start over"
)
def test_a_run_with_damaged_checkpoints_only_does_not_start_over(trainer, finished, injected):
    for model in finished.glob("checkpoints/step_*/model/*"):
        model.write_bytes(b"")
    files = [p for p in finished.rglob("*") if p.is_file() and p.name not in ("status.json", ".lock", "rank_0.log")]
    before = {path: path.read_bytes() for path in files}
    done = trainer.run(finished, "--num_iterations=10", code=5)
    assert re.fullmatch(
        r"error: .*: no valid checkpoint is left \(newest: .*\); move it away to start over\n", done.stderr
    )
    assert '"status": "storage error"' in (finished / "status.json").read_text()
    assert {path: path.read_bytes() for path in files} == before
    injected(1)


def test_resume_takes_never_and_a_path(trainer, trace, finished, tmp_path):
    assert "--resume=never" in trainer.run(finished, "--resume=never", code=2).stderr
    older = finished / "checkpoints" / "step_00000005"
    assert "holds newer checkpoints" in trainer.run(finished, f"--resume={older}", code=2).stderr
    assert "no such checkpoint" in trainer.run(tmp_path / "new", "--resume=nowhere", code=2).stderr
    before = (finished / "config.yaml").read_bytes()
    assert "--resume=nevr: no such checkpoint or run directory; did you mean never?" in (
        trainer.run(finished, "--resume=nevr", code=2).stderr
    )
    assert (finished / "config.yaml").read_bytes() == before
    branch = tmp_path / "branch"
    trainer.run(branch, f"--resume={older}", "--num_iterations=10")
    assert trace(branch) == trace(finished)[4:]  # from step 5 on, which both runs have
    shutil.rmtree(older)  # the same command still resumes the branch
    done = trainer.run(branch, f"--resume={older}", "--num_iterations=11")
    assert f"--resume={older}: {branch} contains checkpoints already, and resumes from them" in done.stdout


def test_a_branch_interrupted_before_its_first_step_saves_nothing(trainer, trace, finished, tmp_path):
    flags = [f"--resume={finished / 'checkpoints' / 'step_00000005'}", "--num_iterations=10"]
    trainer.run(tmp_path / "branch", *flags, script=INTERRUPTED, code=4)
    assert not list((tmp_path / "branch" / "checkpoints").iterdir())
    trainer.run(tmp_path / "branch", *flags)
    assert trace(tmp_path / "branch") == trace(finished)[4:]


def test_a_changed_model_or_changed_data_is_an_error_that_names_the_change(trainer, finished, tmp_path):
    err = trainer.run(finished, "--n_layer=3", "--n_embd=64", code=2).stderr
    assert "--n_layer=3 (checkpoint: 2)" in err and "--n_embd=64 (checkpoint: 32)" in err
    assert "--sequence_length=16" in trainer.run(finished, "--sequence_length=16", code=2).stderr
    assert "--seed=7" in trainer.run(finished, "--seed=7", code=2).stderr
    assert "--total_batch_size=128" in trainer.run(finished, "--total_batch_size=128", code=2).stderr
    only_one = f"--input_train_bin={trainer.shards}/*_train_000001.bin"
    assert "count_train_000002.bin" in trainer.run(finished, only_one, code=2).stderr


def test_shards_that_are_new_since_the_checkpoint_are_trained_on_in_a_new_run(trainer, metrics, finished, tmp_path):
    more = shutil.copytree(trainer.shards, tmp_path / "shards")
    for number in (0, 3):
        shutil.copy(more / "count_train_000002.bin", more / f"count_train_{number:06d}.bin")
    flags = [f"--input_train_bin={more}/*_train_*.bin", "--num_iterations=11"]
    err = trainer.run(finished, *flags, code=2).stderr
    assert "--input_train_bin: 2 shards are new (first: count_train_000000.bin) since the checkpoint was written" in err
    checkpoint = f"--init_from={finished}/checkpoints/step_00000010"
    assert f"start a new run from its weights with {checkpoint} and another --output_dir" in err
    trainer.run(tmp_path / "new", *flags, checkpoint, "--num_iterations=1")
    assert metrics(tmp_path / "new")[0]["loss"] < metrics(finished)[0]["loss"] - 0.1


def test_a_run_can_be_made_longer(trainer, metrics, finished):
    done = trainer.run(finished, "--num_iterations=12", "--learning_rate=5e-4")
    assert "learning_rate: 0.001 → 0.0005" in done.stdout
    assert [r["step"] for r in metrics(finished)] == list(range(1, 13))
    seconds = [r["elapsed_s"] for r in metrics(finished)]
    assert seconds == sorted(seconds)  # the clock continues from the checkpoint


def test_a_run_made_shorter_is_done(trainer, finished):
    done = trainer.run(finished, "--num_iterations=5")
    assert "nothing left to do: the checkpoint is at step 10 of --num_iterations=5" in done.stdout


def test_a_run_whose_shards_were_deleted_still_saves_its_checkpoint(trainer, wait_for, shards, tmp_path):
    moved = shutil.copytree(shards, tmp_path / "shards")
    flags = [f"--input_train_bin={moved}/*_train_*.bin", "--num_iterations=100000", "--save_every_niter=0"]
    process = trainer.start(tmp_path / "run", *flags, python=trainer.warm_python)
    assert wait_for(lambda: steps_logged(tmp_path / "run") > 3, process)
    shutil.rmtree(moved)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert (tmp_path / "run/checkpoints/latest").exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_total_batch_size_on_other_ranks(trainer, trace, metrics, tmp_path):
    """Also if it was derived from --batch_size and the number of ranks, which differs now."""
    flags = ["--total_batch_size=0", "--batch_size=4", "--save_every_niter=5"]
    trainer.run(tmp_path / "run", *flags, "--num_iterations=5")
    done = trainer.run(tmp_path / "run", *flags, "--num_iterations=10", ranks=2)
    assert "--batch_size=4: lowered to 2; the resumed run has 2 sequences per step and rank\n" in done.stdout
    assert done.stdout.count("lowered to") == 1
    assert "128 a step = 2 × 32 × 2 ranks × 1 micro-steps" in done.stdout
    trainer.run(tmp_path / "run", *flags, "--num_iterations=15")  # one rank again, and the size of the command
    assert [r["tokens"] for r in metrics(tmp_path / "run")] == [128 * k for k in range(1, 16)]
    err = trainer.run(tmp_path / "run", *flags, ranks=3, code=1).stderr
    assert "the run to resume has --total_batch_size=128, which is 4 sequences; 3 ranks cannot share them" in err
