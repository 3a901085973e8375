"""--optimizer=muon gives the same numbers in every strategy, resumes bit-equal, and loads checkpoints of any stage."""

from pathlib import Path

import pytest

from tests.checkpoints import cut_back

FAILING = str(Path(__file__).with_name("failing_training.py"))
FLAGS = ["--optimizer=muon", "--mlp=swiglu", "--positions=rotary", "--norm=rmsnorm", "--n_kv_head=1", "--keep_every=10"]
STAGES = {"stage2": ["--zero_stage=2"], "stage3": ["--zero_stage=3"]}
SLOW = {"hsdp": ["--zero_stage=3", "--replicas=2"], "offload": ["--zero_stage=3", "--cpu_offload=1"]}


@pytest.fixture(scope="module")
def stage_0(trainer, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("muon") / "run"
    trainer.run(output_dir, *FLAGS, ranks=2)
    return output_dir


def assert_close(ours, reference, limit=5e-6):
    for a, b in zip(ours, reference, strict=True):
        assert a == pytest.approx(b, rel=0, abs=limit)


def test_stage_1_equals_stage_0_bit_for_bit_and_resumes_its_checkpoint(
    trainer, trace, parameters_of, stage_0, tmp_path
):
    run = cut_back(stage_0, tmp_path / "run")
    assert "step_00000010" in trainer.run(run, *FLAGS, "--zero_stage=1", ranks=2).stdout
    assert trace(run) == trace(stage_0)  # ==: all digits
    ours, theirs = parameters_of(run), parameters_of(stage_0)
    assert all((ours[name] == value).all() for name, value in theirs.items())


@pytest.mark.slow
def test_one_process_resumes_the_checkpoint_of_a_sharded_run(trainer, trace, stage_0, tmp_path):
    trainer.run(tmp_path / "sharded", *FLAGS, "--zero_stage=3", ranks=2)
    assert_close(trace(tmp_path / "sharded"), trace(stage_0))
    run = cut_back(tmp_path / "sharded", tmp_path / "run")
    trainer.run(run, *FLAGS)
    assert_close(trace(run), trace(stage_0))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*STAGES, *SLOW])
def test_a_sharded_run_resumes_bit_equal(trainer, trace, tmp_path, strategy):
    flags, ranks = [*FLAGS, *(STAGES | SLOW)[strategy]], 4 if strategy == "hsdp" else 2
    trainer.run(tmp_path / "whole", *flags, ranks=ranks)
    run = cut_back(tmp_path / "whole", tmp_path / "run")
    trainer.run(run, *flags, ranks=ranks)
    assert trace(run) == trace(tmp_path / "whole")  # ==: all digits


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("strategy", [*STAGES, *SLOW])
def test_every_strategy_gives_the_numbers_of_stage_0(trainer, trace, stage_0, tmp_path, strategy, ranks):
    batch = ["--batch_size=2"] if ranks == 2 else ["--batch_size=1"]
    trainer.run(tmp_path / "run", *FLAGS, *batch, *(STAGES | SLOW)[strategy], ranks=ranks)
    assert_close(trace(tmp_path / "run"), trace(stage_0))


@pytest.mark.slow
def test_every_stage_resumes_the_checkpoints_of_every_other_on_other_ranks(trainer, trace, stage_0, tmp_path):
    """A chain of starts that has each ordered pair of stages once. Each but the last makes one step."""
    stages = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0]
    for i, stage in enumerate(stages):
        flags = [*FLAGS, f"--zero_stage={stage}", *(["--max_minutes=1e-9"] if i < len(stages) - 1 else [])]
        trainer.run(tmp_path / "run", *flags, ranks=(1, 2, 4)[i % 3])
    assert_close(trace(tmp_path / "run"), trace(stage_0))


def test_a_checkpoint_of_adamw_is_not_resumed(trainer, stage_0, tmp_path):
    run = cut_back(stage_0, tmp_path / "run")
    done = trainer.run(run, *[flag for flag in FLAGS if flag != "--optimizer=muon"], code=2)
    assert "--optimizer=adamw: " in done.stderr and "--init_from=" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_roll_back_skips_bad_data_also_if_it_is_killed_on_the_way(
    trainer, trace, parameters_of, assert_same_run, tmp_path, stage
):
    """Equal to a run without the data. The momentum of the bad steps must not remain."""
    run, ranks = tmp_path / "run", 1 if stage == 0 else 2
    flags = [*FLAGS, f"--zero_stage={stage}", "--num_iterations=24", "--save_every_niter=10", "--dropout=0.1"]
    bad = {"script": FAILING, "env": {"FAIL": "gradient@12-16"}, "ranks": ranks}
    trainer.run(run, *flags, **bad, fault="metrics#13=KILL", code=-9 if ranks == 1 else 1)
    assert "rolled back to step 10" in trainer.run(run, *flags, **bad).stdout
    trainer.run(tmp_path / "without", *flags, script=FAILING, env={"SKIP_DATA": "11+6"}, ranks=ranks)
    assert_same_run(run, (trace(tmp_path / "without"), parameters_of(tmp_path / "without")))


@pytest.mark.slow
def test_float16_gives_the_losses_of_float32_within_its_rounding(trainer, trace, tmp_path):
    losses = {}
    for dtype in ("float16", "float32"):
        trainer.run(tmp_path / dtype, *FLAGS, f"--dtype={dtype}", "--save_every_niter=0")
        losses[dtype] = [record["loss"] for record in trace(tmp_path / dtype)]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-2) and losses["float16"] != losses["float32"]
