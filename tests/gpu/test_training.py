"""Training on this device: every strategy, resume, faults, export and import."""

import itertools
import shutil

import numpy as np
import pytest
import torch

from scripts.bench.common import Run
from tests.gpu.conftest import FAMILIES, PERIOD
from train.metrics import read_records

pytestmark = pytest.mark.gpu
# Limits of the relative difference. In bfloat16 gathered weights of a sharded model are rounded once more.
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
STRATEGIES = {
    "stage 3": "--zero_stage=3",
    "stage 2, offloaded": "--zero_stage=2 --cpu_offload=1 --activation_checkpointing=selective",
    "Muon, offloaded": "--zero_stage=2 --cpu_offload=1 --optimizer=muon",
    "recompute block": "--activation_checkpointing=block",
    "recompute selective": "--activation_checkpointing=selective",
}


@pytest.fixture
def train_steps(bench, one_rank):
    def train(steps, *flags):
        """Returns the loss and the gradient norm of each of the first steps, taken in this process."""
        config = bench.config(*flags)
        run, rows, length = Run(config, one_rank), config.batch_size, config.sequence_length + 1
        found = []
        for k in range(1, steps + 1):
            start = torch.arange(rows)[:, None] * 31 + k * 17
            batch = ((start + torch.arange(length)) % PERIOD).to(bench.device)
            result = run.step(k, batch)
            found.append((result.loss, result.grad_norm))
        return found

    torch.use_deterministic_algorithms(True)
    yield train
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def plain_steps():
    """Ten steps of a plain run for each dtype and optimizer, shared by the strategies."""
    return {}


@pytest.fixture
def check_strategy(bench, train_steps, plain_steps, figures):
    def check(dtype, flags):
        count = 3 if bench.quick else 10
        plain = f"--dtype={dtype}", *(flag for flag in flags.split() if "optimizer" in flag)
        if plain not in plain_steps:
            plain_steps[plain] = train_steps(count, *plain)
        steps = train_steps(count, f"--dtype={dtype}", *flags.split())
        numbers = zip(itertools.chain(*steps), itertools.chain(*plain_steps[plain]), strict=True)
        figures({"relative difference": max(abs(a / b - 1) for a, b in numbers)}, at_most=LIMITS[dtype])

    return check


# One case is rehearsed by default. tests/train/test_parallel.py compares the strategies on CPUs.
REHEARSED = [pytest.param(name, marks=[] if name == "stage 3" else pytest.mark.slow) for name in STRATEGIES]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("strategy", REHEARSED)
def test_every_strategy_trains_like_a_plain_run(check_strategy, strategy, dtype):
    check_strategy(dtype, STRATEGIES[strategy])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_compiled_and_sharded_model_trains_like_a_plain_run(check_strategy, dtype):
    check_strategy(dtype, "--zero_stage=3 --compile=1 --activation_checkpointing=block")


def test_half_precision_learns(bench, train_steps, figures):
    """Twenty steps in float16 with the loss scaler; on the CPU in bfloat16."""
    dtype = "float16" if bench.device == "cuda" else "bfloat16"
    steps = train_steps(20, "--learning_rate=3e-3", f"--dtype={dtype}")
    figures({"last loss / first": steps[-1][0] / steps[0][0]}, at_most=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, deterministic", [("bfloat16", 1), ("float32", 1), ("bfloat16", 0)])
def test_a_resumed_run_repeats_the_undisturbed_one(bench, figures, tmp_path, dtype, deterministic):
    """Repeats the second half of a run from its middle checkpoint: bit-equal with --deterministic.

    Otherwise flash attention may add up gradients in any order. A second undisturbed run measures this, and the
    resumed run may differ by twice as much. The two dtypes use different attention kernels.
    """
    config = bench.config()
    flags = [*bench.shape(), f"--total_batch_size={2 * config.batch_size * config.sequence_length}"]
    flags += ["--num_iterations=20", "--save_every_niter=10", "--dropout=0.1"]

    def second_half(name):
        records = bench.train(tmp_path / name, *flags, f"--dtype={dtype}", f"--deterministic={deterministic}")
        return np.array([(r["step"], r["loss"], r["grad_norm"]) for r in records if r["step"] > 10])

    undisturbed = second_half("run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    difference, spread = float(np.abs(second_half("run") - undisturbed).max()), 0.0
    if difference and not deterministic:
        spread = float(np.abs(second_half("again") - undisturbed).max())
        figures({"two undisturbed runs": spread})
    figures({"undisturbed and resumed": difference}, at_most=2 * spread)


@pytest.mark.slow
def test_a_nan_skips_the_step_and_poisoned_weights_roll_back(bench, figures, tmp_path):
    flags = [*bench.shape(), "--num_iterations=12", "--save_every_niter=4"]
    failing = "tests/e2e/failing_training.py"
    records = bench.train(tmp_path / "nan", *flags, script=failing, FAIL="loss@6-6")
    assert sum("skipped" in record for record in records) == 1
    records = bench.train(tmp_path / "poisoned", *flags, "--async_save=1", script=failing, FAIL="weights@8-8")
    assert len(records) == 12
    superseded = read_records(tmp_path / "poisoned" / "logs" / "metrics_superseded.jsonl")
    figures({"steps repeated": len(superseded)}, at_most=4)


@pytest.mark.slow
def test_running_out_of_memory_leaves_a_snapshot(bench, tmp_path):
    if bench.device != "cuda":
        pytest.skip("only CUDA has memory snapshots")
    huge = ["--batch_size=65536", "--sequence_length=1024", "--record_memory=1"]
    data = f"--input_train_bin={bench.folder}/count_train_*.bin"
    done = bench.run("train_gpt.py", data, f"--output_dir={tmp_path}", *bench.shape(), *huge, code=2)
    assert "out of memory" in done.stderr
    assert (tmp_path / "logs" / "oom_rank_0.pickle").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_and_imported_model_has_the_loss_of_the_run(bench, figures, tmp_path, family):
    """Compares the fifth loss of a run with the first loss of a run that starts from its exported fourth step."""
    # transformers has no class for a soft cap of the logits.
    flags = [*bench.shape(), *FAMILIES[family].replace("--logit_softcap=2", "").split(), "--overfit_single_batch=1"]
    records = bench.train(tmp_path / "run", *flags, "--num_iterations=5", "--save_every_niter=4")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    bench.run("scripts/export.py", f"--checkpoint={checkpoint}", "--to=hf", f"--output={tmp_path / 'hf'}")
    flags += [f"--init_from=hf:{tmp_path / 'hf'}", "--num_iterations=1", "--zero_stage=3"]
    (record,) = bench.train(tmp_path / "imported", *flags)
    figures({"relative difference": abs(record["loss"] / records[4]["loss"] - 1)}, at_most=1e-5)
