"""The real command in every stage: the numbers of one process, and of itself however it is stopped."""

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
# 256 tokens a step are 8 rows of 32: on 2 ranks 4 rows each, on 4 ranks 2 rows, so 4 micro-steps want more of both.
ACCUMULATION = {1: {2: 4, 4: 2}, 4: {2: 1, 4: 1}}  # micro-steps → ranks → batch_size
RECOMPUTE = ("none", "block", "selective")


@pytest.fixture(scope="module")
def one_process(trainer, trace, tmp_path_factory):
    """Traces of the same batches on one process, by tokens a step."""
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
    if compile:  # samples, whose lengths differ, are not to be compiled
        flags += ["--sample_every=10", "--sample_tokens=4"]
    done = trainer.run(output_dir, *flags, ranks=ranks, env={"TORCH_LOGS": "recompiles"} if compile else None)
    assert_close(trace(output_dir), one_process[tokens])
    recompiled = done.stderr.count("Recompiling function forward")
    assert recompiled == (ranks if compile else 0), done.stderr  # once each: validation needs no gradients
    return trace(output_dir)


@pytest.mark.parametrize(
    "stage, accumulation, recompute, compile",
    [("stage3", 1, "selective", 1), ("hsdp", 4, "selective", 0)],  # the others: test_reference.py
)
def test_the_numbers_of_one_process(trainer, trace, one_process, tmp_path, stage, accumulation, recompute, compile):
    run_case(trainer, trace, one_process, tmp_path / "run", stage, accumulation, recompute, compile)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_with_everything_gives_the_numbers_of_one_process(trainer, trace, one_process, tmp_path):
    for accumulation, recompute, compile in itertools.product(ACCUMULATION, RECOMPUTE, (0, 1)):
        case = f"{accumulation}-{recompute}-{compile}"
        traces = {}
        for stage in STAGES:
            output_dir = tmp_path / f"{stage}-{case}"
            traces[stage] = run_case(trainer, trace, one_process, output_dir, stage, accumulation, recompute, compile)
        assert traces["stage1"] == traces["stage0"]  # ==: all digits


def stop_and_go_on(trainer, wait_for, metrics, output_dir, *flags, ranks):
    """SIGTERM in the middle, then the same command again."""
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
def test_stopped_by_a_signal_it_goes_on_bit_for_bit(trainer, trace, metrics, wait_for, tmp_path, stage):
    ranks, flags = STAGES[stage]
    flags = [*flags, *LONG, "--async_save=1"]
    trainer.run(tmp_path / "whole", *flags, "--save_every_niter=0", ranks=ranks)
    stop_and_go_on(trainer, wait_for, metrics, tmp_path / "run", *flags, ranks=ranks)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")  # ==: all digits


def test_a_checkpoint_goes_on_in_another_stage_on_other_ranks(trainer, trace, one_process, tmp_path):
    """One chain through the matrix: each link takes up where the last one, of another make, stopped."""
    chain = [(2, 3), (1, 0), (4, 1), (2, 2), (1, 3)]
    for i, (ranks, stage) in enumerate(chain, 1):
        flags = [f"--zero_stage={stage}", "--num_iterations=20", "--batch_size=2"]
        if i < len(chain):  # each but the last takes one step
            flags += ["--max_minutes=1e-9", "--save_every_niter=0"]
        trainer.run(tmp_path / "run", *flags, ranks=ranks)
    assert_close(trace(tmp_path / "run"), one_process[256], 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix_of_checkpoints(trainer, trace, one_process, tmp_path):
    """{0, 1, 2, 3} × {1, 2, 4} ranks: the checkpoint of each, at step 10, goes on in each."""
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
