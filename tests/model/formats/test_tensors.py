"""Weights of other projects give the logits of their projects, and llm.c's files are written as llm.c writes them."""

import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cfg.config import ModelConfig
from model.formats import llama2c, llmc, nanogpt
from model.gpt import GPT, init_weights
from tests.format_files import (
    C,
    H,
    L,
    T,
    V,
    gpt2_weights,
    llama2c_bytes,
    llama2c_weights,
    llmc_bytes,
    nanogpt_checkpoint,
    random,
)
from util.errors import UserError


def put(path, content):
    path.write_bytes(content)
    return path


def saved(path, checkpoint):
    torch.save(checkpoint, path)
    return path


def flags_of(module, path):
    found = module.open_file(path)
    return found[0] if module is nanogpt else found.flags


@torch.no_grad()
def filled(module, path, dtype=torch.float32):
    """Returns our model with the weights of a file, read by the reader of its format."""
    config = ModelConfig(**flags_of(module, path))
    model, read = GPT(config).eval(), module.reader(path, config)
    for name, parameter in model.named_parameters():
        value = read(name)
        assert value.dtype == dtype and value.shape[1:] == parameter.shape[1:]
        assert len(value) == (V if name in ("wte.weight", "lm_head.weight") else len(parameter))
        parameter[: len(value)] = value
    return model


@torch.no_grad()
def assert_same_logits(model, expected):
    """Compares logits with those of `expected`, a function of ids (B, T)."""
    idx = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))
    logits = expected(idx)
    assert (model(idx) - logits).abs().max() < 1e-5 * (logits.max() - logits.min())


def transformers_gpt2(weights, activation, head=None):
    config = GPT2Config(
        vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, activation_function=activation,
        tie_word_embeddings=head is None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}  # missing biases are zero
    for name, value in weights.items():
        transposed = name.endswith("weight") and ".c_" in name
        state[f"transformer.{name}"] = torch.tensor(value.T if transposed else value)
    state["lm_head.weight"] = torch.tensor(weights["wte.weight"] if head is None else head)
    model.load_state_dict(state)
    return lambda idx: model(idx).logits


# llm.c


def test_llmc_in_fp32(tmp_path):
    model = filled(llmc, put(tmp_path / "x.bin", llmc_bytes(gpt2_weights())))
    assert_same_logits(model, transformers_gpt2(gpt2_weights(), "gelu_new"))


def test_llmc_in_bf16(tmp_path):
    path = put(tmp_path / "x.bin", llmc_bytes(gpt2_weights(), 5))
    rounded = {name: torch.tensor(value).bfloat16().float().numpy() for name, value in gpt2_weights().items()}
    assert_same_logits(filled(llmc, path, torch.bfloat16), transformers_gpt2(rounded, "gelu_new"))


@pytest.mark.parametrize("version, dtype", [(3, torch.float32), (5, torch.bfloat16)])
def test_an_llmc_file_is_written_byte_for_byte(tmp_path, version, dtype):
    path = put(tmp_path / "x.bin", llmc_bytes(gpt2_weights(), version))
    config = ModelConfig(**llmc.open_file(path).flags)
    llmc.write_file(tmp_path / "sub" / "y.bin", config, llmc.reader(path, config), dtype)
    assert (tmp_path / "sub" / "y.bin").read_bytes() == path.read_bytes()
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["y.bin"]


def of_model(model):
    """Returns a reader of the parameters of a model."""
    named = dict(model.named_parameters())
    return lambda name: named[name][:V] if name == "wte.weight" else named[name]


GPT2 = dict(n_layer=L, n_head=H, n_kv_head=H, n_embd=C, vocab_size=V, n_positions=T, mlp_hidden=4 * C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_can_be_written_and_read_back(tmp_path, dtype):
    config = ModelConfig(**GPT2, dropout=0.1, vocab_pad=1, zero_init=True)
    model = GPT(config)
    init_weights(model, 0)
    llmc.write_file(tmp_path / "x.bin", config, of_model(model), dtype)
    assert llmc.open_file(tmp_path / "x.bin").flags.items() <= config.model_dump().items()
    read = llmc.reader(tmp_path / "x.bin", config)
    for name, parameter in model.named_parameters():
        assert torch.equal(read(name), parameter.detach().to(dtype)), name


@pytest.mark.parametrize(
    "flags",
    [
        {"positions": "rotary"},
        {"norm": "rmsnorm"},
        {"norm_eps": 1e-6},
        {"mlp": "swiglu"},
        {"mlp": "gelu_exact"},
        {"mlp_hidden": 100},
        {"bias": False},
        {"tie_embeddings": False},
        {"qk_norm": True},
        {"logit_softcap": 30.0},
        {"n_kv_head": 2},
    ],
)
def test_a_flag_that_llmc_does_not_have_is_an_error(tmp_path, flags):
    config = ModelConfig(**(GPT2 | flags))
    with pytest.raises(UserError) as caught:
        llmc.write_file(tmp_path / "x.bin", config, of_model(GPT(config)), torch.float32)
    (name, value), message = *flags.items(), str(caught.value)
    assert message.startswith(f"--{name}={int(value) if isinstance(value, bool) else value}: llm.c")
    assert not list(tmp_path.iterdir())


def test_llmc_files_have_two_dtypes(tmp_path):
    config = ModelConfig(**GPT2)
    with pytest.raises(UserError, match="float32 or bfloat16, not float16"):
        llmc.write_file(tmp_path / "x.bin", config, of_model(GPT(config)), torch.float16)


def test_an_existing_file_is_not_overwritten(tmp_path):
    config = ModelConfig(**GPT2)
    put(tmp_path / "x.bin", b"mine")
    with pytest.raises(UserError, match="already there"):
        llmc.write_file(tmp_path / "x.bin", config, of_model(GPT(config)), torch.float32)

    def slow(name):  # another process writes this file meanwhile
        put(tmp_path / "y.bin", b"yours")
        return of_model(GPT(config))(name)

    with pytest.raises(UserError, match="y.bin is already there"):
        llmc.write_file(tmp_path / "y.bin", config, slow, torch.float32)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.bin": b"mine", "y.bin": b"yours"}


def test_a_failed_write_leaves_no_file(tmp_path):
    config = ModelConfig(**GPT2)

    def broken(name):
        if name == "h.1.ln_2.weight":
            raise UserError("the disk is gone")
        return of_model(GPT(config))(name)

    with pytest.raises(UserError, match="the disk is gone"):
        llmc.write_file(tmp_path / "x.bin", config, broken, torch.float32)
    with pytest.raises(ValueError, match="wte.weight has shape"):  # with its padding
        llmc.write_file(tmp_path / "x.bin", config, dict(GPT(config).named_parameters()).__getitem__, torch.float32)
    assert not list(tmp_path.iterdir())


# llama2.c


def llama2c_forward(w, ids, kv_heads, base):
    """Returns the logits (T, V) of llama2.c's run.c for ids (T,), in fp64. Rotary pairs are adjacent."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    size = C // H
    angles = np.outer(np.arange(len(ids)), base ** -(np.arange(0, size, 2) / size))
    turn = np.exp(1j * angles)[:, None]  # (T, 1, D/2)

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotated(x, heads):
        pairs = x.reshape(len(ids), heads, size // 2, 2)
        return ((pairs[..., 0] + 1j * pairs[..., 1]) * turn).view(np.float64).reshape(len(ids), heads, size)

    x = w["tok_embeddings"][ids]
    for i in range(L):
        y = norm(x, w[f"{i}.attention_norm"])
        q, k = rotated(y @ w[f"{i}.wq"].T, H), rotated(y @ w[f"{i}.wk"].T, kv_heads)
        v = (y @ w[f"{i}.wv"].T).reshape(len(ids), kv_heads, size)
        heads = []
        for h in range(H):
            g = h // (H // kv_heads)
            scores = np.where(np.tri(len(ids)), q[:, h] @ k[:, g].T / np.sqrt(size), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, g])
        x = x + np.concatenate(heads, -1) @ w[f"{i}.wo"].T
        y = norm(x, w[f"{i}.ffn_norm"])
        gate = y @ w[f"{i}.w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[f"{i}.w3"].T)) @ w[f"{i}.w2"].T
    return norm(x, w["norm"]) @ w.get("output", w["tok_embeddings"]).T


@pytest.mark.parametrize(
    "version, tied, kv_heads, base",
    [(0, True, 2, 10000.0), (0, False, 4, 500000.0), (1, True, 1, 10000.0), (1, False, 2, 10000.0)],
)
def test_llama2c(tmp_path, version, tied, kv_heads, base):
    weights = llama2c_weights(kv_heads, tied, base)
    path = put(tmp_path / "x.bin", llama2c_bytes(weights, version, kv_heads))
    assert_same_logits(
        filled(llama2c, path),
        lambda idx: torch.tensor(np.stack([llama2c_forward(weights, row, kv_heads, base) for row in idx.numpy()])),
    )


# nanoGPT


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path, bias, prefix):
    weights = gpt2_weights(bias)
    path = saved(tmp_path / "ckpt.pt", nanogpt_checkpoint(weights, prefix, masks=bias))
    assert_same_logits(filled(nanogpt, path), transformers_gpt2(weights, "gelu"))


def test_the_first_versions_of_nanogpt(tmp_path):
    weights, head = gpt2_weights(), random(V, C, seed=7)
    path = saved(tmp_path / "ckpt.pt", nanogpt_checkpoint(weights, head=head, bias=None))
    assert_same_logits(filled(nanogpt, path), transformers_gpt2(weights, "gelu_new", head))


def test_the_two_gelus_differ(tmp_path):
    weights = gpt2_weights()
    model = filled(nanogpt, saved(tmp_path / "ckpt.pt", nanogpt_checkpoint(weights)))
    with pytest.raises(AssertionError):
        assert_same_logits(model, transformers_gpt2(weights, "gelu_new"))


def test_a_nanogpt_checkpoint_in_bf16(tmp_path):
    checkpoint = nanogpt_checkpoint(gpt2_weights())
    checkpoint["model"] = {name: value.bfloat16() for name, value in checkpoint["model"].items()}
    filled(nanogpt, saved(tmp_path / "ckpt.pt", checkpoint), torch.bfloat16)


# All


def files(folder):
    yield llmc, put(folder / "llmc.bin", llmc_bytes(gpt2_weights()))
    yield llama2c, put(folder / "llama2c.bin", llama2c_bytes(llama2c_weights()))
    yield nanogpt, saved(folder / "ckpt.pt", nanogpt_checkpoint(gpt2_weights()))


def test_another_model_is_an_error(tmp_path):
    for module, path in files(tmp_path):
        fits = flags_of(module, path)
        with pytest.raises(UserError, match="has no parameter h.0.attn.q_norm.weight"):
            module.reader(path, ModelConfig(**fits))("h.0.attn.q_norm.weight")
        for change, name in [
            ({"n_layer": L + 1}, f"h.{L}.attn.c_attn"),
            ({"tie_embeddings": False}, "lm_head.weight is only in the model of the flags"),
            ({"n_head": 2, "n_kv_head": 1}, "it has 4 heads"),
        ]:
            with pytest.raises(UserError, match=name) as caught:
                module.reader(path, ModelConfig(**(fits | change)))
            assert str(path) in str(caught.value)
        for change, name in [({"vocab_size": V + 1}, "wte.weight"), ({"mlp_hidden": 8}, "h.2.mlp.c_fc.weight")]:
            with pytest.raises(UserError, match=f"{name} has shape"):
                module.reader(path, ModelConfig(**(fits | change)))(name)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    for module, path in list(files(tmp_path))[:2]:
        read = module.reader(path, ModelConfig(**flags_of(module, path)))
        os.truncate(path, 5000)
        with pytest.raises(UserError, match="changed while it was read"):
            read("ln_f.weight")
        path.unlink()
        with pytest.raises(UserError, match="No such file"):
            read("ln_f.weight")


def test_only_the_requested_tensor_is_read(tmp_path):
    """Reads from a sparse file of GPT-2 1558M: 6 GB that take no disk space."""
    sizes = dict(n_layer=48, n_head=25, n_kv_head=25, n_embd=1600, vocab_size=50257, n_positions=1024, mlp_hidden=6400)
    header = struct.pack("<8i", 20240326, 3, 1024, 50257, 48, 25, 1600, 50304).ljust(1024, b"\0")
    path = put(tmp_path / "gpt2_1558M.bin", header)
    os.truncate(path, 1024 + 4 * (1_557_611_200 + 47 * 1600))
    assert llmc.open_file(path).flags.items() >= sizes.items()
    tracemalloc.start()
    try:
        assert llmc.reader(path, ModelConfig(**sizes))("h.47.ln_2.weight").shape == (1600,)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
