"""A run on two sources: it resumes bit-equal, prints the mixture, and refuses another mixture."""

import pytest

FLAGS = ["--num_iterations=16", "--save_every_niter=8"]


@pytest.fixture(scope="module")
def mixture(shards):
    """Twice as many samples from the second shard as from the first."""
    return f"--input_train_bin=one=1:{shards}/*_train_000001.bin,two=2:{shards}/*_train_000002.bin"


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(trainer, parameters_of, trace, mixture, shards, tmp_path):
    whole = trainer.run(tmp_path / "whole", mixture, *FLAGS)
    assert "\none: 33.33% of the samples, 6,000 tokens, 0.228 epochs\ntwo: 66.67% of the samples, " in whole.stdout
    assert "warning" not in whole.stdout

    run = tmp_path / "run"
    trainer.run(run, mixture, *FLAGS, "--max_minutes=1e-9")  # one step, and its checkpoint
    assert len(trace(run)) <= 1
    swapped = f"--input_train_bin=two=4:{shards}/*_train_000002.bin,one=2:{shards}/*_train_000001.bin"
    trainer.run(run, swapped, *FLAGS, ranks=2)  # the order and the scale of the weights do not matter
    assert [r["step"] for r in trace(run)] == list(range(1, 17))
    assert [r["loss"] for r in trace(run)] == pytest.approx([r["loss"] for r in trace(tmp_path / "whole")], abs=1e-4)

    trainer.run(tmp_path / "again", mixture, *FLAGS, "--max_minutes=1e-9")
    trainer.run(tmp_path / "again", mixture, *FLAGS)
    assert trace(tmp_path / "again") == trace(tmp_path / "whole")  # ==: all digits
    ours, theirs = parameters_of(tmp_path / "again"), parameters_of(tmp_path / "whole")
    assert all((ours[name] == value).all() for name, value in theirs.items())

    for flag, message in (
        (
            mixture.replace("two=2", "two=3"),
            "source one has a share of 0.25, but the checkpoint was trained with 0.3333",
        ),
        (mixture.replace("two=", "three="), "source three is new"),
        (f"--input_train_bin={shards}/*_train_*.bin", "a single glob without name=weight: is new"),
    ):
        assert message in trainer.run(run, flag, *FLAGS, "--num_iterations=20", code=2).stderr


def test_training_on_the_validation_shard_gives_a_warning(trainer, mixture, shards, tmp_path):
    flag = f"{mixture},three=1:{shards}/*_val_*.bin"
    done = trainer.run(tmp_path / "run", flag, "--num_iterations=1")
    assert "warning: " in done.stdout and "count_val_000000.bin is used for both training and validation" in done.stdout
