"""Every stage on 1, 2 and 4 ranks: equal weights, numbers and checkpoints. The checks are in on_ranks.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [
    "initial_weights",
    "imported_weights",
    "numbers",
    "collectives",
    "replicas",
    "norm",
    "evaluation_leaves_shards",
]
# Two ranks repeat only the checks that depend on the number of ranks. tests/e2e/test_strategies.py resumes on one.
LAUNCHES = [(2, ["save", "collectives"]), (4, [*CHECKS, "save", "load", "lora"])]


@pytest.fixture(scope="module")
def reports(tmp_path_factory, warm_python):
    """(ranks, check) → the error, or "". One launch runs many checks."""
    folder, found = tmp_path_factory.mktemp("on_ranks"), {}
    env = {**os.environ, **warm_python.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    shape = {"hidden_size": 28, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=251, max_position_embeddings=64, **shape))
    llama.to(torch.bfloat16).save_pretrained(folder / "llama", max_shard_size="20KB")
    for ranks, checks in LAUNCHES:
        torchrun = [warm_python.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [str(Path(__file__).with_name("on_ranks.py")), str(folder / "report"), str(folder / "checkpoints")]
        done = subprocess.run(
            [*torchrun, f"--nproc_per_node={ranks}", *words, *checks], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        report = json.loads((folder / "report").read_text())
        found |= {(ranks, check): problem for check, problem in report.items()}
    assert len(list((folder / "checkpoints").iterdir())) == 4 + 6
    return found


@pytest.mark.parametrize("ranks, check", [(ranks, check) for ranks, checks in LAUNCHES for check in checks])
def test_on_ranks(reports, ranks, check):
    assert not reports[ranks, check], reports[ranks, check]


@pytest.mark.slow
def test_lora_memory_on_two_ranks(tmp_path, warm_python):
    env = {**os.environ, **warm_python.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [warm_python.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("on_ranks.py")
    done = subprocess.run([*launch, script, tmp_path / "report", tmp_path, "lora_memory"], env=env, capture_output=True)
    assert done.returncode == 0 and json.loads((tmp_path / "report").read_text()) == {"lora_memory": ""}, done.stderr
