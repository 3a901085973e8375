"""Validation loss and bits per byte: exact sums over the targets of the chosen windows."""

import math

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.shards import open_shard, write_shard
from eval.validation import fixed_windows, summarize, windows_loss
from model.loss import IGNORE_INDEX

VOCAB, T = 50, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 10 * T + 1)
BYTES = np.arange(VOCAB) ** 2 % 17  # different lengths, some 0 like end-of-text


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    path = tmp_path_factory.mktemp("validation") / "x_val_000000.bin"
    write_shard(path, TOKENS, VOCAB)
    return Loader([open_shard(path, VOCAB)], T, 1, 1, False, "input_val_bin")


def losses_of(idx, targets, positions=None):
    """A stand-in for a model: the loss of a target is the product of the target and the previous token."""
    valid = targets != IGNORE_INDEX
    return (idx * targets)[valid].sum().float(), valid.sum()


def measured(loader, windows, batch_size, rounds):
    work = windows_loss(losses_of, loader, windows, batch_size, rounds, torch.device("cpu"), BYTES)
    passes = 0
    while True:
        try:
            next(work)
            passes += 1
        except StopIteration as end:
            assert passes == rounds
            return end.value


@pytest.mark.parametrize("batch_size, rounds", [(3, 2), (4, 2), (1, 5), (8, 3)])  # up to 19 rows of padding
def test_losses_tokens_and_bytes_are_sums_over_targets(loader, batch_size, rounds):
    windows = [0, 2, 3, 7, 9]
    rows = [TOKENS[w * T : w * T + T + 1] for w in windows]
    expected = [
        sum(int((row[:-1] * row[1:]).sum()) for row in rows),
        len(windows) * T,
        sum(int(BYTES[row[1:]].sum()) for row in rows),
    ]
    assert measured(loader, windows, batch_size, rounds) == expected


def test_positions_restart_at_documents_if_the_end_of_text_token_is_known(loader):
    seen = []

    def model(idx, targets, positions=None):
        seen.append((idx, positions))
        return losses_of(idx, targets)

    for end_of_text in (None, int(TOKENS[3])):
        list(windows_loss(model, loader, [0, 5], 2, 1, torch.device("cpu"), None, end_of_text))
    (_, without), (idx, positions) = seen
    assert without is None
    for row, found in zip(idx.tolist(), positions.tolist(), strict=True):
        starts = [max((i for i in range(at + 1) if row[i] == TOKENS[3]), default=0) for at in range(T)]
        assert found == [at - start for at, start in enumerate(starts)]


def test_a_rank_without_windows_adds_nothing(loader):
    assert measured(loader, [], 2, 3) == [0, 0, 0]


def test_the_windows_are_evenly_spaced():
    assert fixed_windows(10, 4) == [0, 2, 5, 7]
    assert fixed_windows(3, 20) == [0, 1, 2]


def test_the_summary_is_a_mean_in_nats_and_bits_per_byte():
    assert summarize(20.0, 8, 5) == {"val_loss": 2.5, "val_bpb": pytest.approx(20 / math.log(2) / 5)}
    assert summarize(20.0, 8, 0)["val_bpb"] is None
