"""--doc_mask=1 in the real command: it trains, changes the numbers, and resumes bit-equal."""

import shutil

import numpy as np
import pytest

from data.shards import write_shard

END_OF_TEXT = 256  # of the tokenizer bytes
FLAGS = ["--tokenizer=bytes", "--vocab_size=257", "--doc_mask=1", "--keep_every=10"]


@pytest.fixture(scope="module")
def on_documents(trainer, tmp_path_factory):
    """The training command on short documents that count from a random number on."""
    folder, random = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    documents = []
    for first, length in zip(random.integers(0, 251, 800), random.integers(0, 40, 800), strict=True):
        documents += [[END_OF_TEXT], (first + np.arange(length)) % 251]
    tokens = np.concatenate(documents)
    write_shard(folder / "count_val_000000.bin", tokens[:3000], 257)
    write_shard(folder / "count_train_000001.bin", tokens[3000:], 257)
    return type(trainer)(folder, trainer.warm_python)


@pytest.fixture(scope="module")
def one_rank(on_documents, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("doc_mask") / "run"
    on_documents.run(output_dir, *FLAGS)
    return output_dir


def test_the_loss_falls_and_differs_from_a_run_without_the_mask(one_rank, on_documents, trace, tmp_path):
    with_mask = trace(one_rank)
    assert with_mask[-1]["loss"] < with_mask[0]["loss"] - 0.2
    on_documents.run(tmp_path / "run", *FLAGS, "--doc_mask=0")
    without = trace(tmp_path / "run")
    assert abs(with_mask[0]["loss"] - without[0]["loss"]) > 1e-4
    assert abs(with_mask[4]["val_loss"] - without[4]["val_loss"]) > 1e-4


def test_two_ranks_give_the_numbers_of_one(one_rank, on_documents, trace, tmp_path):
    on_documents.run(tmp_path / "run", *FLAGS, "--batch_size=4", ranks=2)
    for ours, reference in zip(trace(tmp_path / "run"), trace(one_rank), strict=True):
        assert ours == pytest.approx(reference, abs=1e-5)


def test_a_resumed_run_is_bit_equal_and_a_changed_flag_is_reported(one_rank, on_documents, trace, tmp_path):
    output_dir = shutil.copytree(one_rank, tmp_path / "run")
    for late in ("step_00000015", "step_00000020"):
        shutil.rmtree(output_dir / "checkpoints" / late)
    changed = shutil.copytree(output_dir, tmp_path / "changed")
    assert "step_00000010" in on_documents.run(output_dir, *FLAGS).stdout
    assert trace(output_dir) == trace(one_rank)  # ==: all digits
    done = on_documents.run(changed, *FLAGS, "--doc_mask=0", "--num_iterations=11")
    assert "doc_mask: True → False" in done.stdout
