"""Speed of a plain training loop, document masks, evaluation and generation. scripts/bench/gpu_speed.py times training.

Nothing here has a limit but the memory of GPT-2 1558M, which must be near its plan.
"""

import json
import statistics
import time

import pytest
import torch

from cfg.config import load_config
from data.documents import document_positions
from train.memory import deviation, planned_bytes
from train.parallel import parallelize
from util.ranks import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture
def gpu(bench):
    if bench.quick:
        pytest.skip("speed is measured on a GPU only")
    return bench


@pytest.fixture
def measure(gpu):
    """Runs a benchmark of scripts/bench and returns its result."""

    def run(script, *flags):
        return json.loads(gpu.run(f"scripts/bench/{script}", *flags).stdout.splitlines()[-1])

    return run


def test_speed_of_gpt2_beside_a_plain_loop(measure, figures):
    """GPT-2 124M, both sides eager. A ratio above 1 means faster, or more memory."""
    shape = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--sequence_length=1024", "--batch_size=8"]
    result = measure("train.py", "--steps=30", "--rounds=2", *shape, "--dtype=bfloat16")
    for side in ("ours", "reference"):
        memory = result[side]["peak_mib"] / 2**10
        figures({f"{side} tok/s": result[side]["tok_per_s"], f"{side} peak memory, GiB": memory})
    figures({"tok/s ratio": result["ratio"]["tok_per_s"], "memory ratio": result["ratio"]["peak_mib"]})


def test_speed_with_a_document_mask(gpu, figures):
    """Forward and backward of compiled GPT-2 124M on rows of one document and on rows of documents of 500 tokens.

    Not by train_gpt.py, which would need a tokenizer and so perhaps a network. Median of 20 after 5 for warm-up.
    """
    flags = ["--sequence_length=1024", "--batch_size=16", "--dtype=bfloat16", "--compile=1"]
    config, device = load_config(flags, world_size=1), torch.device(gpu.device)
    model = parallelize(config, Ranks(0, 0, 1, device)).gpt
    shape = (config.batch_size, config.sequence_length)
    idx = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    rates = []
    for doc_mask in (0, 1):
        seconds = []
        for _ in range(25):
            start = time.perf_counter()
            positions = document_positions(idx % 500, 0) if doc_mask else None
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss, _ = model(idx, idx, positions=positions)
            loss.backward()
            model.zero_grad()
            loss.item()  # waits for the GPU
            seconds.append(time.perf_counter() - start)
        rates.append(idx.numel() / statistics.median(seconds[5:]))
        figures({f"doc_mask={doc_mask} tok/s": rates[-1]})
    figures({"tok/s ratio": rates[1] / rates[0]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speed_of_hellaswag(measure, figures, dtype):
    """GPT-2 124M on random ids, beside the usual loop: examples a second, and the time for all 10,042."""
    flags = ["--random", "--examples=500", "--rounds=2", "--whole", f"--dtype={dtype}", "--device=cuda"]
    result = measure("hellaswag.py", *flags)
    names = ("ours_per_s", "usual_per_s", "ratio", "whole_set_s", "differing_choices")
    figures({name.replace("_", " "): result[name] for name in names})


@pytest.mark.parametrize("samples", [1, 8])
def test_speed_of_generation(measure, figures, samples):
    """GPT-2 124M, tokens a second of all rows."""
    result = measure("generate.py", "--device=cuda", "--rounds=2", "--new_tokens=256", f"--samples={samples}")
    figures({f"{side} tok/s": speed for side, speed in result["tok_per_s"].items()} | {"ratio": result["ratio"]})


@pytest.mark.parametrize("strategy", ["--zero_stage=0", "--zero_stage=3", "--zero_stage=3 --cpu_offload=1"])
def test_memory_of_gpt2_1558m_is_near_its_plan(gpu, pytestconfig, figures, tmp_path, strategy):
    """Eight steps of two micro-steps of 8 × 1024 tokens."""
    if not pytestconfig.getoption("--large", False):
        pytest.skip("--large chooses this")
    flags = ["--cfg=gpt2-1558m", "--batch_size=8", "--total_batch_size=16384", "--activation_checkpointing=block"]
    flags += ["--compile=0", "--save_every_niter=0", "--num_iterations=8", "--log_every=1", *strategy.split()]
    records = gpu.train(tmp_path / "large", *flags)
    config = load_config([*flags, f"--device={gpu.device}"], world_size=1)
    measured = records[-1]["memory_bytes"]
    figures({"tok/s": statistics.median(r["tok_per_s"] for r in records[3:])})
    if records[0]["mfu"] is not None:
        figures({"MFU": statistics.median(r["mfu"] for r in records[3:])})
    figures({"peak memory, GB": measured / 1e9, "planned, GB": planned_bytes(config, 1).peak / 1e9})
    figures({"plan off by": abs(deviation(config, 1, measured))}, at_most=0.1)
