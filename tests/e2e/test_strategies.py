"""Every stage gives the numbers of one process, and a stopped and resumed run the numbers of an undisturbed one."""

import itertools
import shutil
import signal

import pytest

STAGES = {
    "stage0": (2, ["--zero_stage=0"]),
    "stage1": (2, ["--zero_stage=1"]),
    "stage2": (2, ["--zero_stage=2"]),
    "stage3": (2, ["--zero_stage=3"]),
    "hsdp": (4, ["--zero_stage=3", "--replicas=2"]),
}
# 256 tokens a step are 8 rows of 32: 4 rows on each of 2 ranks, 2 rows on each of 4. 4 micro-steps may need 512 tokens.
ACCUMULATION = {1: {2: 4, 4: 2}, 4: {2: 1, 4: 1}}  # micro-steps → ranks → batch_size
RECOMPUTE = ("none", "block", "selective")


@pytest.fixture(scope="module")
def one_process(trainer, trace, tmp_path_factory):
    """Tokens per step → the trace of one process."""
    found = {}
    for tokens in (256, 512):
        output_dir = tmp_path_factory.mktemp("one_process") / "run"
        trainer.run(output_dir, "--batch_size=8", f"--total_batch_size={tokens}", "--save_every_niter=0")
        found[tokens] = trace(output_dir)
    return found


def assert_close(ours, reference, limit=5e-6):
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert a == pytest.approx(b, rel=0, abs=limit)


def run_case(trainer, trace, one_process, output_dir, stage, accumulation, recompute, compile):
    ranks, flags = STAGES[stage]
    tokens = 512 if accumulation * ranks > 8 else 256
    flags = [*flags, f"--batch_size={ACCUMULATION[accumulation][ranks]}", f"--total_batch_size={tokens}"]
    flags += [f"--activation_checkpointing={recompute}", f"--compile={compile}", "--save_every_niter=0"]
    if compile:  # samples differ in length and must not be compiled
        flags += ["--sample_every=10", "--sample_tokens=4"]
    done = trainer.run(output_dir, *flags, ranks=ranks, env={"TORCH_LOGS": "recompiles"} if compile else None)
    assert_close(trace(output_dir), one_process[tokens])
    recompiled = done.stderr.count("Recompiling function forward")
    assert recompiled == (ranks if compile else 0), done.stderr  # once each: validation needs no gradients
    return trace(output_dir)


@pytest.mark.parametrize(
    "stage, accumulation, recompute, compile",
    [pytest.param("stage3", 1, "selective", 1, marks=pytest.mark.slow), ("hsdp", 4, "selective", 0)],
)
def test_a_strategy_gives_the_numbers_of_one_process(
    trainer, trace, one_process, tmp_path, stage, accumulation, recompute, compile
):
    run_case(trainer, trace, one_process, tmp_path / "run", stage, accumulation, recompute, compile)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination_of_strategies_gives_the_numbers_of_one_process(trainer, trace, one_process, tmp_path):
    for accumulation, recompute, compile in itertools.product(ACCUMULATION, RECOMPUTE, (0, 1)):
        case = f"{accumulation}-{recompute}-{compile}"
        traces = {}
        for stage in STAGES:
            output_dir = tmp_path / f"{stage}-{case}"
            traces[stage] = run_case(trainer, trace, one_process, output_dir, stage, accumulation, recompute, compile)
        assert traces["stage1"] == traces["stage0"]  # ==: all digits


def stop_and_resume(trainer, wait_for, metrics, output_dir, *flags, ranks):
    """Stops a run by SIGTERM in the middle and starts it again."""
    process = trainer.start(output_dir, *flags, ranks=ranks, python=trainer.warm_python)
    assert wait_for(lambda: len(metrics(output_dir)) >= 11, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    stopped_at = int((output_dir / "checkpoints/latest").read_text().strip().removeprefix("step_"))
    assert 11 <= stopped_at < 40, err
    trainer.run(output_dir, *flags, ranks=ranks)


LONG = ["--dropout=0.1", "--num_iterations=40", "--val_loss_every=10", "--activation_checkpointing=block"]


# Resume in stages 0, 1 and 3 is also in tests/e2e/test_golden.py, a signal in stage 0 in tests/e2e/test_resume.py.
SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("stage1", "stage2", "stage3", "hsdp")]


@pytest.mark.parametrize("stage", SLOW)
def test_every_stage_stopped_by_a_signal_resumes_bit_equal(trainer, trace, metrics, wait_for, tmp_path, stage):
    ranks, flags = STAGES[stage]
    flags = [*flags, *LONG, "--async_save=1"]
    trainer.run(tmp_path / "whole", *flags, "--save_every_niter=0", ranks=ranks)
    stop_and_resume(trainer, wait_for, metrics, tmp_path / "run", *flags, ranks=ranks)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")  # ==: all digits


@pytest.mark.slow
def test_a_checkpoint_can_be_resumed_in_another_stage_on_other_ranks(trainer, trace, one_process, tmp_path):
    """A chain of starts: each resumes from a checkpoint of another stage and number of ranks."""
    chain = [(2, 3), (1, 0), (4, 1), (2, 2), (1, 3)]
    for i, (ranks, stage) in enumerate(chain, 1):
        flags = [f"--zero_stage={stage}", "--num_iterations=20", "--batch_size=2"]
        if i < len(chain):  # each start but the last makes one step
            flags += ["--max_minutes=1e-9", "--save_every_niter=0"]
        trainer.run(tmp_path / "run", *flags, ranks=ranks)
    assert_close(trace(tmp_path / "run"), one_process[256], 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_checkpoint_can_be_resumed_in_every_stage(trainer, trace, one_process, tmp_path):
    """Stages 0 to 3 on 1, 2 and 4 ranks: the checkpoint of step 10 of each is resumed in each."""
    settings = list(itertools.product((1, 2, 4), range(4)))
    for ranks, stage in settings:
        output_dir = tmp_path / f"from-{ranks}-{stage}"
        trainer.run(output_dir, f"--zero_stage={stage}", "--keep_every=10", ranks=ranks)
        assert_close(trace(output_dir), one_process[256], 1e-5)
        for late in (15, 20):
            shutil.rmtree(output_dir / f"checkpoints/step_{late:08d}")
    for (ranks, stage), source in itertools.product(settings, sorted(tmp_path.glob("from-*"))):
        output_dir = shutil.copytree(source, tmp_path / "run")
        done = trainer.run(output_dir, f"--zero_stage={stage}", "--save_every_niter=0", ranks=ranks)
        assert "resuming from" in done.stdout and "step_00000010" in done.stdout
        assert_close(trace(output_dir), one_process[256], 1e-5)
        shutil.rmtree(output_dir)
