"""The real command gives the numbers of an independent trainer (tests/reference.py) for every training flag."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cfg.config import Config
from data.shards import write_shard
from tests import reference

GPT2 = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_hidden": 128, "bias": True, "n_kv_head": 4}
GPT2 |= {"tie_embeddings": True, "rope_base": 10000.0, "norm_eps": 1e-5}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "mlp_hidden": 96, "bias": False, "n_kv_head": 2}
LLAMA |= {"tie_embeddings": False, "rope_base": 500.0, "norm_eps": 1e-3}
SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 251, "sequence_length": 32, "batch_size": 2}
# Not the default values, except for dropout. The last test checks that each flag in DEFAULTS changes the numbers.
TRAINING = {
    "num_iterations": 10,
    "total_batch_size": 512,
    "learning_rate": 0.02,
    "schedule": "wsd",
    "warmup_iters": 3,
    "learning_rate_decay_frac": 0.25,
    "cooldown_frac": 0.5,
    "weight_decay": 0.6,
    "beta1": 0.8,
    "beta2": 0.7,
    "adam_eps": 1e-3,
    "grad_clip": 0.3,
    "seed": 7,
    "dropout": 0.0,
    "val_loss_every": 4,
    "val_max_steps": 2,
}
CHECKED = ("learning_rate", "schedule", "warmup_iters", "learning_rate_decay_frac", "cooldown_frac", "weight_decay")
CHECKED += ("beta1", "beta2", "adam_eps", "grad_clip", "seed", "val_max_steps")
DEFAULTS = {name: Config.model_fields[name].default for name in CHECKED}
DEFAULTS["total_batch_size"] = SIZE["batch_size"] * SIZE["sequence_length"]  # on one rank
LIMIT = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two training shards and one validation shard: each token adds 1 to 3 to the last, and sometimes 40 more."""
    folder = tmp_path_factory.mktemp("reference")
    random = np.random.default_rng(0)
    tokens = (np.cumsum(random.integers(1, 4, 9000)) + 40 * random.integers(0, 2, 9000)) % SIZE["vocab_size"]
    for name, part in (("val_000000", tokens[:1500]), ("train_000001", tokens[1500:4000]), ("train_2", tokens[4000:])):
        write_shard(folder / f"x_{name}.bin", part, SIZE["vocab_size"])
    return folder


@pytest.fixture(scope="module")
def masked_data(data, tmp_path_factory):
    """Shards of whole windows in which less than half of the tokens are counted, in some windows none."""
    folder, random = tmp_path_factory.mktemp("masked"), np.random.default_rng(1)
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in sorted(data.glob("*.bin"))])
    counted = np.repeat(random.random(len(tokens) // 20) < 0.4, 20).astype("u1")
    counted[1600:1700] = 0
    sizes, start = {"val_000000": 32 * 46 + 1, "train_000001": 32 * 80, "train_2": 32 * 70 + 1}, 0
    for name, size in sizes.items():
        write_shard(folder / f"x_{name}.bin", tokens[start : start + size], SIZE["vocab_size"])
        (folder / f"x_{name}.mask").write_bytes(counted[start : start + size].tobytes())
        start += size
    return folder


@pytest.fixture(scope="module")
def expected(data):
    """A function that returns records and weights of the reference trainer for some flags."""
    found = {}

    def of(ranks=1, folder=data, **flags):
        key = ranks, folder, *sorted(flags.items())
        if key not in found:
            patterns = f"{folder}/*_train_*.bin", f"{folder}/*_val_*.bin"
            found[key] = reference.train(SimpleNamespace(**flags), *patterns, ranks)
        return found[key]

    return of


@pytest.fixture(scope="module")
def run(trainer, data, metrics, parameters_of):
    """A function that returns records and weights of the real command for some flags."""

    def start(output_dir, ranks=1, folder=data, **flags):
        words = [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in flags.items()]
        patterns = [f"--input_train_bin={folder}/*_train_*.bin", f"--input_val_bin={folder}/*_val_*.bin"]
        trainer.run(output_dir, *words, *patterns, "--tokenizer=none", ranks=ranks)
        return metrics(output_dir), parameters_of(output_dir)

    return start


def assert_equal(ours, theirs, limit=LIMIT):
    records, weights = ours
    expected_records, expected_weights = theirs
    assert [r["step"] for r in records] == [r["step"] for r in expected_records]
    for record, wanted in zip(records, expected_records, strict=True):
        assert {k: record[k] for k in wanted} == pytest.approx(wanted, abs=limit, rel=0), f"step {wanted['step']}"
        assert record["lr"] == pytest.approx(wanted["lr"], rel=1e-12)
        assert ("val_loss" in record) == ("val_loss" in wanted)
    assert weights.keys() == expected_weights.keys()
    for name, wanted in expected_weights.items():
        assert weights[name].shape == wanted.shape
        assert (weights[name].double() - wanted).abs().max() <= limit, name


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
    # shape, ranks, stage, flags that differ from TRAINING
    ("gpt2", 1, 0, {"schedule": "cosine", "batch_size": 4}),
    ("gpt2", 2, 0, {"dropout": 0.2, "flash": False}),
    ("gpt2", 2, 1, {"schedule": "linear", "activation_checkpointing": "block"}),
    slow("gpt2", 2, 3, {"schedule": "constant"}),
    slow("llama", 1, 3, {"schedule": "linear"}),
    slow("llama", 2, 0, {"batch_size": 8}),
    ("llama", 2, 2, {"schedule": "cosine"}),
    ("llama", 2, 3, {"dropout": 0.1, "flash": False, "activation_checkpointing": "block"}),
    slow("gpt2", 1, 3, {}),
    slow("llama", 1, 0, {}),
]


@pytest.mark.parametrize("shape, ranks, stage, flags", CASES)
def test_training_gives_the_numbers_of_the_reference(run, expected, tmp_path, shape, ranks, stage, flags):
    flags = {**SIZE, **{"gpt2": GPT2, "llama": LLAMA}[shape], **TRAINING, **flags}
    assert_equal(run(tmp_path / "run", ranks, zero_stage=stage, **flags), expected(ranks, **flags))


@pytest.mark.parametrize(
    "shape, ranks, stage", [("gpt2", 2, 0), ("llama", 2, 3), slow("gpt2", 2, 1), slow("llama", 1, 2)]
)
def test_only_counted_tokens_enter_the_loss(run, expected, masked_data, tmp_path, shape, ranks, stage):
    flags = {**SIZE, **{"gpt2": GPT2, "llama": LLAMA}[shape], **TRAINING}
    assert_equal(
        run(tmp_path / "run", ranks, masked_data, zero_stage=stage, **flags), expected(ranks, masked_data, **flags)
    )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_float16_gives_the_norms_of_the_reference_within_its_rounding(run, expected, tmp_path, ranks):
    """The parameters are sharded and offloaded to the host."""
    flags = {**SIZE, **GPT2, **TRAINING}
    half = {"dtype": "float16", "zero_stage": 3, "cpu_offload": True}
    records, _ = run(tmp_path / "run", ranks, **flags, **half)
    for record, wanted in zip(records, expected(ranks, **flags)[0], strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=2**-11)
        limit = 2**-11 if record["step"] <= 3 else 2**-8  # the rounding of earlier updates adds up
        assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=limit), record["step"]
    state = json.loads((tmp_path / "run/checkpoints/step_00000010/state.json").read_text())
    assert state["scaler"] == {"value": 2.0**16, "good_steps": 10}


@pytest.mark.parametrize("flag", DEFAULTS)
def test_every_training_flag_changes_the_numbers_of_the_reference(expected, flag):
    """Otherwise a flag that the command ignores would pass."""
    flags = {**SIZE, **GPT2, **TRAINING}
    theirs = expected(**{**flags, flag: DEFAULTS[flag]})
    with pytest.raises(AssertionError):
        assert_equal(expected(**flags), theirs, 20 * LIMIT)
