"""Inputs of a run."""

from types import SimpleNamespace

import pytest
import torch

from cfg.config import load_config
from train.inputs import count_iterations
from util.ranks import Ranks

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("epochs, steps", [(0.1, 10), (1, 100), (1.1, 110), (2.001, 201), (1e-6, 1)])
def test_epochs_become_steps_without_rounding_errors(epochs, steps):
    """1,000 windows, 10 in a step. In floats, 1.1 * 1000 / 10 is above 110."""
    config = load_config([f"--num_epochs={epochs}", "--batch_size=10", "--sequence_length=8"], world_size=1)
    found = count_iterations(config, SimpleNamespace(windows=1000), RANKS)
    assert (found.num_iterations, found.num_epochs) == (steps, 0)


def test_without_epochs_the_steps_stay():
    config = load_config(["--num_iterations=7"], world_size=1)
    assert count_iterations(config, SimpleNamespace(windows=1000), RANKS) is config


def test_epochs_and_steps_on_the_command_line_replace_each_other_in_a_preset(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("num_epochs: 2\n")
    found = load_config([f"--cfg={preset}", "--num_iterations=7"], world_size=1)
    assert (found.num_epochs, found.num_iterations) == (0, 7)
    preset.write_text("num_iterations: 7\n")
    assert load_config([f"--cfg={preset}", "--num_epochs=2"], world_size=1).num_epochs == 2
    found = load_config([f"--cfg={preset}", "--num_epochs=0"], world_size=1)
    assert (found.num_epochs, found.num_iterations) == (0, 7)
