"""Exporting a checkpoint that four ranks wrote."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sharded(trainer, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("sharded") / "run"
    trainer.run(output_dir, "--zero_stage=3", "--num_iterations=3", ranks=2)
    return output_dir


def export(*words, code=0):
    command = [sys.executable, str(ROOT / "scripts/export.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_one_file_holds_what_the_ranks_wrote(sharded, parameters_of, trainer, tmp_path):
    export("--checkpoint", sharded, "--to", "consolidated", "--output", tmp_path / "whole")
    tensors, expected = load_file(tmp_path / "whole/model/model.safetensors"), parameters_of(sharded)
    assert tensors.keys() == expected.keys() and all((tensors[n] == t).all() for n, t in expected.items())
    assert all((parameters_of(tmp_path / "whole")[n] == t).all() for n, t in expected.items())
    refused = trainer.run(tmp_path / "new", f"--resume={tmp_path / 'whole'}", code=2)
    assert "a model without its optimizer" in refused.stderr


def test_mistakes(sharded, tmp_path):
    assert "is already there" in export("--checkpoint", sharded, "--output", tmp_path, code=2)
    assert "no such checkpoint" in export("--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "x", code=2)
    assert "holds no checkpoint" in export("--checkpoint", tmp_path, "--output", tmp_path / "x", code=2)
    assert not list(tmp_path.iterdir())
