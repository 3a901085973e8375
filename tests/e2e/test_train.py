"""The real command trains, writes its files, and gives equal numbers on any number of ranks."""

import glob
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import yaml

from data.shards import HEADER_BYTES
from tests.conftest import TINY

RECORD_KEYS = {"step", "tokens", "loss", "lr", "grad_norm", "tok_per_s", "mfu", "elapsed_s"}


@pytest.fixture(scope="module")
def one_rank(trainer, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one_rank") / "run"
    done = trainer.run(output_dir, "--sample_every=10", "--sample_tokens=8", "--tensorboard=1")
    return output_dir, done.stdout


def test_the_output_dir_has_all_files(one_rank):
    output_dir, _ = one_rank
    config = yaml.safe_load((output_dir / "config.yaml").read_text())
    assert config["n_positions"] == 32 and config["n_kv_head"] == 2  # resolved values
    assert (output_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (output_dir / "samples").iterdir()) == ["step_00000010.txt", "step_00000020.txt"]
    assert list((output_dir / "logs").glob("events.out.tfevents.*"))
    kept = sorted(p.name for p in (output_dir / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000010", "step_00000015", "step_00000020"]
    assert (output_dir / "checkpoints" / "latest").read_text().strip() == "step_00000020"


def test_every_step_has_one_record(one_rank, metrics):
    records = metrics(one_rank[0])
    assert [r["step"] for r in records] == list(range(1, 21))
    assert all(r.keys() >= RECORD_KEYS for r in records)
    assert [r["tokens"] for r in records] == [256 * k for k in range(1, 21)]
    assert [r["step"] for r in records if "val_loss" in r] == [5, 10, 15, 20]
    assert all(r["mfu"] is None for r in records)  # a CPU is not in the table of peak rates


def test_the_loss_falls(one_rank, metrics):
    records = metrics(one_rank[0])
    assert records[0]["loss"] == pytest.approx(math.log(251), abs=0.1)
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert records[-1]["val_loss"] < records[0]["loss"] - 0.2


def test_a_second_run_finds_nothing_to_do(one_rank, trainer):
    output_dir, _ = one_rank
    before = (output_dir / "metrics.jsonl").read_bytes()
    done = trainer.run(output_dir, "--sample_every=10", "--sample_tokens=8", "--tensorboard=1")
    assert "nothing left to do" in done.stdout
    assert (output_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow  # tests/train/on_ranks.py compares four ranks step by step
def test_a_folder_of_numpy_arrays_gives_the_numbers_of_the_shards(one_rank, trainer, trace, shards, tmp_path):
    """The files of build-nanogpt, which --input_train_bin and --input_val_bin name by their folder."""
    for path in shards.glob("*.bin"):
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / f"{path.stem}.npy", np.fromfile(path, np.uint16)[HEADER_BYTES // 2 :])
    flags = ["--input_train_bin=data", "--input_val_bin=data", "--num_iterations=20"]
    trainer.run(tmp_path / "run", *flags, cwd=tmp_path)
    assert trace(tmp_path / "run") == trace(one_rank[0])


@pytest.mark.slow
def test_four_ranks_give_the_numbers_of_one(one_rank, trainer, trace, parameters_of, tmp_path):
    """Losses, norms, validation and final parameters of 20 steps, within 1e-5. Two ranks: test_reference.py."""
    output_dir = tmp_path / "run"
    trainer.run(output_dir, "--batch_size=2", ranks=4)
    for ours, reference in zip(trace(output_dir), trace(one_rank[0]), strict=True):
        assert ours == pytest.approx(reference, abs=1e-5)
    ours, reference = parameters_of(output_dir), parameters_of(one_rank[0])
    assert ours.keys() == reference.keys()
    assert max((ours[k] - reference[k]).abs().max().item() for k in ours) < 1e-5


@pytest.mark.slow
def test_an_automatic_micro_batch_gives_equal_numbers_and_may_change_on_resume(one_rank, trainer, trace, tmp_path):
    expected, output_dir = trace(one_rank[0]), tmp_path / "run"
    done = trainer.run(output_dir, "--batch_size=0", ranks=2)
    assert "--batch_size=0: micro-batch of 4\n" in done.stdout
    assert "4 × 32 × 2 ranks × 1 micro-steps" in done.stdout
    assert yaml.safe_load((output_dir / "config.yaml").read_text())["batch_size"] == 4
    shutil.rmtree(output_dir / "checkpoints" / "step_00000020")
    done = trainer.run(output_dir, "--batch_size=8")
    assert "step_00000015 with batch_size: 4 → 8" in done.stdout
    for ours, theirs in zip(trace(output_dir), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_run_compiled_as_a_whole_gives_the_numbers_of_an_eager_one(one_rank, trainer, trace, tmp_path):
    """Validation and samples compile only the forward pass without gradients."""
    flags = ["--sample_every=10", "--sample_tokens=8", "--compile=model"]
    done = trainer.run(tmp_path / "run", *flags, ranks=2, env={"TORCH_LOGS": "recompiles"})
    for ours, theirs in zip(trace(tmp_path / "run"), trace(one_rank[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    recompiled = [line for line in done.stderr.splitlines() if "Recompiling function" in line]
    assert len(recompiled) <= 2 and all("hidden" in line for line in recompiled)  # once a rank


def test_one_batch_is_memorized(trainer, metrics, tmp_path):
    flags = ["--overfit_single_batch=1", "--total_batch_size=64", "--num_iterations=60", "--learning_rate=1e-2"]
    trainer.run(tmp_path / "run", *flags, "--save_every_niter=0")
    assert metrics(tmp_path / "run")[-1]["loss"] < 0.1


@pytest.mark.slow
def test_a_run_is_fine_tuned_and_repeated_with_other_flags(trainer, metrics, command, tmp_path):
    run, tuned, again = (tmp_path / name for name in ("run", "tuned", "again"))
    trainer.run(run, "--tokenizer=none", "--num_iterations=40")
    data = f"--input_train_bin={trainer.shards}/*_train_*.bin"
    small = ["--total_batch_size=256", "--batch_size=2", "--num_iterations=4"]
    command("train_gpt.py", f"--init_from={run}", data, f"--output_dir={tuned}", "--sequence_length=32", *small)
    assert metrics(tuned)[0]["loss"] < metrics(run)[0]["loss"] - 0.5
    command("train_gpt.py", f"--cfg={run}/config.yaml", "--seed=2", f"--output_dir={again}")
    first, second = metrics(run), metrics(again)
    assert len(first) == len(second) == 40 and first[0]["loss"] != second[0]["loss"]


@pytest.mark.parametrize("steps, last_loss", [(5, 9.8), pytest.param(50, 0.5, marks=pytest.mark.slow)])
def test_the_quickstart_memorizes_one_batch_of_shakespeare(command, tmp_path, steps, last_loss):
    """The preset, real tokens and sample of scripts/quickstart.sh, without its installation and with fewer steps."""
    command("data/tiny_shakespeare.py", "--output_dir", tmp_path / "data")
    flags = "--cfg=overfit", f"--num_iterations={steps}", f"--input_train_bin={tmp_path}/data/*_train.bin"
    command("train_gpt.py", *flags, "--device=cpu", f"--output_dir={tmp_path}/run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(50257), abs=0.1)
    assert losses[-1] < last_loss
    sampling = "--temperature", 0, "--max_new_tokens", 20, "--device", "cpu"
    text = command("eval/generate.py", "--checkpoint", tmp_path / "run", *sampling).stdout
    if steps == 50:
        assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n")


# Compiled runs: tests/e2e/test_strategies.py; compiled models of each family: tests/model/test_gpt.py.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "modern"])
def test_other_architectures_train_in_bfloat16_and_compiled(trainer, metrics, tmp_path, family):
    switches = {
        "llama": "--positions=rotary --norm=rmsnorm --mlp=swiglu --bias=0 --tie_embeddings=0 --n_kv_head=1",
        "modern": "--positions=rotary --norm=rmsnorm --mlp=relu2 --bias=0 --qk_norm=1 --logit_softcap=15 --zero_init=1",
    }[family]
    flags = [*switches.split(), "--dtype=bfloat16", "--schedule=wsd", "--num_iterations=8", "--n_layer=1"]
    more = {"llama": ["--compile=1"], "modern": ["--deterministic=1"]}[family]
    trainer.run(tmp_path / "run", *flags, *more, ranks=2)
    records = metrics(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]


def test_wandb_logs_offline_and_keeps_its_run_id(trainer, tmp_path):
    flags = ["--wandb_project_id=test", "--num_iterations=5"]
    done = trainer.run(tmp_path / "run", *flags)
    assert "offline" in done.stdout
    again = trainer.run(tmp_path / "run", "--wandb_project_id=test", "--num_iterations=6")
    runs = [p.name.rsplit("-", 1)[1] for p in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1
    command = f"wandb sync --id {runs[0]} {tmp_path}/run/wandb/offline-run-*-{runs[0]}"  # merges both
    assert f"{command}\n" in done.stdout and f"{command}\n" in again.stdout
    assert len(glob.glob(command.split()[-1])) == 2


def test_num_epochs_give_the_number_of_steps(command, shards, metrics, tmp_path):
    """531 sequences an epoch, 8 a step: half an epoch takes 34 steps."""
    run = f"--output_dir={tmp_path / 'run'}"
    flags = [flag for flag in TINY if not flag.startswith("--num_iterations")]
    flags += [f"--input_train_bin={shards}/*_train_*.bin", "--val_loss_every=0", "--save_every_niter=0"]
    done = command("train_gpt.py", *flags, run, "--num_epochs=0.5")
    assert "--num_epochs=0.5: --num_iterations=34 (531 sequences an epoch, 8 a step)\n" in done.stdout
    assert len(metrics(tmp_path / "run")) == 34
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["num_iterations"] == 34 and config["num_epochs"] == 0
    done = command("train_gpt.py", *flags, run, "--num_epochs=0.5")
    assert "nothing left to do: the checkpoint is at step 34 of --num_iterations=34" in done.stdout
    command("train_gpt.py", f"--cfg={tmp_path / 'run/config.yaml'}", "--num_epochs=0.6")
    assert len(metrics(tmp_path / "run")) == 40


def test_a_killed_run_has_a_plot_also_in_a_folder_with_a_chinese_name(trainer, wait_for, kill_all, tmp_path):
    run = tmp_path / "实验 $x^$"
    process = trainer.start(run, "--num_iterations=100000", python=trainer.warm_python)
    assert wait_for((run / "loss.png").exists, process)
    os.kill(int((run / ".lock").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert err == "" and (run / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_that_cannot_be_drawn_is_a_warning(trainer, tmp_path):
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    done = trainer.run(tmp_path / "run", "--num_iterations=6")
    assert done.stderr.count("warning: the plots could not be drawn: IsADirectoryError") == 2  # a save, and the end
    assert "\ncheckpoint: " in done.stdout
