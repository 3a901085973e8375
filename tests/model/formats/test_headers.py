"""The headers of other projects' model files are understood, or refused in one line before a tensor is read."""

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg.config import ModelConfig
from model.formats import llama2c, llmc, nanogpt
from tests.format_files import (
    KV,
    C,
    F,
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

few = settings(max_examples=150, deadline=None)
INT32 = st.integers(-(2**31), 2**31 - 1)
SIZE = st.one_of(st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 2**16, 2**31 - 1]), st.integers(1, 64), INT32)
SMALL = st.integers(1, 9)
# Random numbers, or sizes that a model could have.
LLMC_SIZES = st.lists(SIZE, min_size=6, max_size=6) | st.tuples(*[SMALL] * 6).map(
    lambda n: [n[0], n[1], n[2], n[3], n[3] * n[4], n[1] + n[5] - 2]
)
LLAMA2C_SIZES = st.lists(SIZE, min_size=7, max_size=7) | st.tuples(*[SMALL] * 6, st.booleans()).map(
    lambda n: [2 * n[0] * n[1], n[2], n[3], n[0], n[0] if n[6] else 1, n[4] * (-1) ** n[5], n[5]]
)
GPT2 = {
    "n_layer": L,
    "n_head": H,
    "n_kv_head": H,
    "n_embd": C,
    "vocab_size": V,
    "n_positions": T,
    "positions": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "norm_weight": True,
    "embedding_norm": False,
    "mlp": "gelu",
    "mlp_hidden": 4 * C,
    "bias": True,
    "tie_embeddings": True,
    "rope_base": 10000.0,
    "qk_norm": False,
    "logit_softcap": 0.0,
    "head_dim": 0,
    "qkv_bias": False,
    "rope_scaling": "",
    "sliding_window": 0,
}
LLAMA = GPT2 | {
    "n_kv_head": KV,
    "positions": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "mlp_hidden": F,
    "bias": False,
}


def llmc_flags(path):
    return llmc.open_file(path).flags


def llama2c_flags(path):
    return llama2c.open_file(path).flags


def nanogpt_flags(path):
    return nanogpt.open_file(path)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the many examples of a property."""
    return tmp_path_factory.mktemp("models")


def put(path, content):
    path.write_bytes(content)
    return path


def saved(path, checkpoint):
    torch.save(checkpoint, path)
    return path


def refusal(flags, path):
    with pytest.raises(UserError) as caught:
        flags(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_flags_are_read_without_torch():
    modules = "hf, llama2c, llmc, nanogpt, pretrained"
    code = f"import sys; from model.formats import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], check=True)


def test_every_flag_of_the_architecture_is_given():
    others = {"vocab_pad", "zero_init", "embedding_std", "head_init", "dropout", "flash"}
    assert GPT2.keys() == ModelConfig.model_fields.keys() - others
    assert LLAMA.keys() == GPT2.keys()


# llm.c


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(tmp_path, version):
    flags = llmc_flags(put(tmp_path / "gpt2.bin", llmc_bytes(gpt2_weights(), version)))
    assert flags == GPT2 and all(type(flags[name]) is type(GPT2[name]) for name in GPT2)
    assert ModelConfig(**flags).n_embd == C


@pytest.mark.parametrize("flags", [llmc_flags, llama2c_flags, nanogpt_flags])
def test_a_missing_empty_or_random_file_is_an_error(tmp_path, flags):
    assert refusal(flags, tmp_path / "none.bin") == "No such file or directory"
    assert refusal(flags, tmp_path) == "Is a directory"
    assert refusal(flags, put(tmp_path / "empty.bin", b"")) == "empty file"
    for content in (b"x", b"x" * 27, b"\0" * 28, b"x" * 300, b"\0" * 2000, b"\xff" * 2000):
        refusal(flags, put(tmp_path / "x.bin", content))


@pytest.mark.parametrize("cut", [1, 1000, -1, -4096])
def test_a_file_of_another_length_is_an_error(tmp_path, cut):
    for flags, content in [
        (llmc_flags, llmc_bytes(gpt2_weights())),
        (llmc_flags, llmc_bytes(gpt2_weights(), 5)),
        (llama2c_flags, llama2c_bytes(llama2c_weights())),
        (llama2c_flags, llama2c_bytes(llama2c_weights(), 1)),
    ]:
        changed = content[:-cut] if cut > 0 else content + bytes(-cut)
        message = refusal(flags, put(tmp_path / "x.bin", changed))
        assert ("truncated" if cut > 0 else "too long") in message
        assert f"{len(content):,} bytes, the file has {len(changed):,}" in message


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, 20240520, "magic 20240520"),  # a token shard
        (0, 20240803, "magic 20240803"),  # train_llama3.py's
        (1, 1, r"version 1 (fp32 without padded vocabulary) of llm.c's model file; 3 (fp32) and 5 (bf16) are read"),
        (1, 2, "version 2 (bf16 without padded vocabulary)"),
        (1, 4, "version 4 (bf16 with fp32 norms)"),
        (1, 6, "version 6 of"),
        (1, 5, "too long"),
        (2, 0, "n_positions=0"),
        (3, 1, "vocab_size=1"),
        (4, -1, "n_layer=-1"),
        (4, 2**31 - 1, "n_layer=2147483647"),
        (5, 5, "must be a multiple of --n_head=5"),
        (6, -C, f"n_embd=-{C}"),
        (6, 2**31 - 1, "n_embd=2147483647"),
        (6, 2**20, "truncated"),
        (7, V - 1, f"{V - 1} rows of embedding"),
    ],
)
def test_a_wrong_header_of_llmc_is_an_error(tmp_path, place, value, message):
    content = bytearray(llmc_bytes(gpt2_weights()))
    content[4 * place : 4 * place + 4] = struct.pack("<i", value)
    assert message in refusal(llmc_flags, put(tmp_path / "x.bin", content))


@few
@given(sizes=LLMC_SIZES, version=st.sampled_from([3, 5]), right=st.booleans())
def test_any_header_of_llmc_is_read_or_an_error(folder, sizes, version, right):
    positions, vocab, layers, heads, width, rows = sizes
    numbers = rows * width + positions * width + layers * (12 * width**2 + 13 * width) + 2 * width
    size = 1024 + numbers * (4 if version == 3 else 2)
    path = put(folder / "x.bin", struct.pack("<8i", 20240326, version, *sizes).ljust(1024, b"\0"))
    os.truncate(path, size if right and 1024 < size < 2**26 else 5000)  # a sparse file takes no space
    try:
        flags = llmc_flags(path)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        if path.stat().st_size == size:  # only impossible numbers are an error
            assert min(sizes) < 1 or vocab < 2 or rows < vocab or width % heads or layers > 10_000
    else:
        assert path.stat().st_size == size and min(sizes) > 0 and width % heads == 0
        assert [flags[n] for n in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")] == sizes[:5]


# llama2.c


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_llama2c(tmp_path, version, tied):
    path = put(tmp_path / "stories.bin", llama2c_bytes(llama2c_weights(tied=tied), version))
    flags, expected = llama2c_flags(path), LLAMA | {"tie_embeddings": tied}
    assert flags == expected and all(type(flags[name]) is type(expected[name]) for name in expected)
    assert ModelConfig(**flags).mlp_hidden == F


@pytest.mark.parametrize("base", [10000.0, 500.0, 500000.0, 1e6, 1234567.0])
def test_the_rotary_base_is_computed_from_the_tables(tmp_path, base):
    path = put(tmp_path / "x.bin", llama2c_bytes(llama2c_weights(base=base)))
    assert llama2c_flags(path)["rope_base"] == (pytest.approx(base, rel=1e-6) if base == 1234567.0 else base)


def test_tables_of_zeros_mean_base_10000(tmp_path):
    weights = llama2c_weights()
    weights["cos"], weights["sin"] = weights["cos"] * 0, weights["sin"] * 0
    assert llama2c_flags(put(tmp_path / "x.bin", llama2c_bytes(weights)))["rope_base"] == 10000.0


def test_rotary_tables_without_a_base_are_an_error(tmp_path):
    weights = llama2c_weights()
    scaled = np.outer(np.arange(T) / 4, 10000.0 ** -(np.arange(0, 8, 2) / 8))
    for cos, sin in [
        (np.cos(scaled), np.sin(scaled)),
        (weights["cos"], -weights["sin"]),
        (weights["cos"] * np.nan, weights["sin"]),
        (weights["cos"], weights["sin"] + np.inf),
        (weights["cos"], weights["sin"] * 0),
    ]:
        weights["cos"], weights["sin"] = cos.astype("<f4"), sin.astype("<f4")
        assert "rotary tables" in refusal(llama2c_flags, put(tmp_path / "x.bin", llama2c_bytes(weights)))


@pytest.mark.parametrize(
    "version, message", [(2, "version 2 (int8, Q8_0)"), (3, "version 3 of"), (-1, "version -1 of")]
)
def test_other_versions_of_llama2c_are_an_error(tmp_path, version, message):
    path = put(tmp_path / "x.bin", llama2c_bytes(llama2c_weights(), version))
    assert message in refusal(llama2c_flags, path) and "0 and 1 (fp32) are read" in refusal(llama2c_flags, path)


def test_a_negative_vocabulary_is_for_version_0_only(tmp_path):
    content = bytearray(llama2c_bytes(llama2c_weights(), 1))
    content[28:32] = struct.pack("<i", -V)
    assert f"vocab_size=-{V}" in refusal(llama2c_flags, put(tmp_path / "x.bin", content))


@few
@given(sizes=LLAMA2C_SIZES, version=st.sampled_from([0, 1]), right=st.booleans())
def test_any_header_of_llama2c_is_read_or_an_error(folder, sizes, version, right):
    width, hidden, layers, heads, kv_heads, vocab, positions = sizes
    head_dim, start = width // heads if heads else 0, 28 if version == 0 else 256
    numbers = abs(vocab) * width * (2 if vocab < 0 else 1) + width
    numbers += layers * (2 * width + 2 * width**2 + 2 * kv_heads * head_dim * width + 3 * hidden * width)
    numbers += 2 * positions * (head_dim // 2) if version == 0 else 0
    size, header = start + 4 * numbers, struct.pack("<7i", *sizes)
    if version == 1:
        header = (struct.pack("<Ii", 0x616B3432, 1) + header + b"\1").ljust(256, b"\0")
    path = put(folder / "y.bin", header)
    os.truncate(path, size if right and start < size < 2**26 else 5000)
    try:
        flags = llama2c_flags(path)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        if path.stat().st_size == size:
            impossible = min(*sizes[:5], positions) < 1 or (vocab if version == 1 else abs(vocab)) < 2
            assert impossible or width % (2 * heads) or heads % kv_heads
    else:
        assert path.stat().st_size == size and min(*sizes[:5], positions) > 0
        assert width % (2 * heads) == 0 and heads % kv_heads == 0
        assert flags["tie_embeddings"] == (vocab > 0)
        names = ("n_embd", "mlp_hidden", "n_layer", "n_head", "n_kv_head", "vocab_size", "n_positions")
        assert [flags[n] for n in names] == [*sizes[:5], abs(vocab), positions]


def test_hostile_headers_take_little_memory(folder):
    most = 2**31 - 1
    headers = [
        struct.pack("<8i", 20240326, 3, *sizes).ljust(1024, b"\0") for sizes in ([most] * 6, [most, 2, 10000] * 2)
    ]
    headers += [struct.pack("<7i", *sizes) for sizes in ([most] * 7, [2**30, 1, 9999, 1, 1, 2, most])]
    tracemalloc.start()
    try:
        for header in headers:
            path = put(folder / "z.bin", header)
            os.truncate(path, 2**36)
            for flags in (llmc_flags, llama2c_flags):
                refusal(flags, path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
        path.unlink()


# nanoGPT


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path, bias, prefix):
    path = saved(tmp_path / "ckpt.pt", nanogpt_checkpoint(gpt2_weights(bias), prefix, masks=bias))
    flags, expected = nanogpt_flags(path), GPT2 | {"mlp": "gelu_exact", "bias": bias}
    assert flags == expected and all(type(flags[name]) is type(expected[name]) for name in expected)
    assert ModelConfig(**flags).mlp == "gelu_exact"


def test_the_first_versions_of_nanogpt(tmp_path):
    """Before 27 January 2023: no `bias` and no vocab_size in model_args, tanh-GELU, an untied head."""
    first = nanogpt_checkpoint(gpt2_weights(), masks=True, head=random(V, C, seed=7), bias=None, vocab_size=None)
    assert nanogpt_flags(saved(tmp_path / "ckpt.pt", first)) == GPT2 | {"tie_embeddings": False}


def test_a_head_that_is_a_copy_of_the_embedding_is_tied(tmp_path):
    weights = gpt2_weights()
    copied = nanogpt_checkpoint(weights, head=weights["wte.weight"].copy())
    assert nanogpt_flags(saved(tmp_path / "ckpt.pt", copied))["tie_embeddings"]


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["top", "model", "model_args", "optimizer", "tensor"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_pickle_with_code_is_an_error(tmp_path, place, packed):
    evil, checkpoint = Evil(f"touch {tmp_path}/pwned"), nanogpt_checkpoint(gpt2_weights())
    if place == "tensor":
        checkpoint["model"]["transformer.wpe.weight"] = evil
    else:
        checkpoint[place] = evil
    path = tmp_path / "ckpt.pt"
    if packed:
        torch.save(evil if place == "top" else checkpoint, path)
        assert "loading it would run" in refusal(nanogpt_flags, path) and "system" in refusal(nanogpt_flags, path)
    else:
        path.write_bytes(pickle.dumps(evil if place == "top" else checkpoint))
        refusal(nanogpt_flags, path)
    assert not (tmp_path / "pwned").exists()
    pickle.loads(pickle.dumps(evil))  # this would run it
    assert (tmp_path / "pwned").exists()


def changed(**tensors):
    checkpoint = nanogpt_checkpoint(gpt2_weights())
    for name, tensor in tensors.items():
        name = "transformer." + name.replace("__", ".")
        if tensor is None:
            del checkpoint["model"][name]
        else:
            checkpoint["model"][name] = tensor
    return checkpoint


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ([1, 2], "not a nanoGPT checkpoint"),
        ({"model": {}}, "not a nanoGPT checkpoint"),
        ({"model": {}, "model_args": {}}, "no transformer.wte.weight"),
        (nanogpt_checkpoint(gpt2_weights(), n_head=None), "no n_layer or no n_head"),
        (nanogpt_checkpoint(gpt2_weights(), n_head=True), "no n_layer or no n_head"),
        (nanogpt_checkpoint(gpt2_weights(), n_head=5), "must be a multiple of --n_head=5"),
        (nanogpt_checkpoint(gpt2_weights(), n_head=0), "n_head=0"),
        (nanogpt_checkpoint(gpt2_weights(), n_layer=10**30), "n_layer=1000"),
        (nanogpt_checkpoint(gpt2_weights(), n_layer=L + 1), "40 parameters; nanoGPT's model of 4 layers has 52"),
        (
            nanogpt_checkpoint(gpt2_weights(), block_size=T + 1),
            f"model_args say block_size={T + 1}, but the tensors {T}",
        ),
        (nanogpt_checkpoint(gpt2_weights(), bias=False), "model_args say bias=False"),
        (nanogpt_checkpoint(gpt2_weights(), head=random(V, C + 1, seed=0)), "lm_head.weight has shape"),
        (changed(h__1__attn__q_norm__weight=torch.ones(8)), "41 parameters"),  # a modified model
        (changed(h__1__attn__q_norm__weight=torch.ones(8), h__1__ln_1__bias=None), "h.1.ln_1.bias is missing"),
        (changed(h__1__ln_1__bias=None), "39 parameters"),
        (changed(h__0__mlp__c_fc__weight=torch.zeros(C, 4 * C)), "h.0.mlp.c_fc.weight has shape (32, 128)"),
        (changed(wpe__weight=torch.zeros(T, C, dtype=torch.int32)), "wpe.weight is not a plain tensor"),
        (changed(wpe__weight=[1.0]), "wpe.weight is not a plain tensor"),
        (changed(wpe__weight=torch.zeros(1).expand(10**9, C)), "wpe.weight is not a plain tensor"),  # 4 bytes
        (changed(wpe__weight=torch.zeros(T, C).to_sparse()), "wpe.weight is not a plain tensor"),
        (changed(wpe__weight=torch.zeros(10**9, C, device="meta")), "wpe.weight is not a plain tensor"),
    ],
)
def test_other_models_are_an_error(tmp_path, checkpoint, message):
    assert message in refusal(nanogpt_flags, saved(tmp_path / "ckpt.pt", checkpoint))


def test_other_zip_files_are_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as archive:
        archive.writestr("ckpt/data.pkl", pickle.dumps({"model": {}, "model_args": {}}))
    refusal(nanogpt_flags, tmp_path / "ckpt.pt")
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/data.pkl", bytes(2**24))
    assert "compressed" in refusal(nanogpt_flags, tmp_path / "ckpt.pt")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_is_read_or_an_error(folder, data):
    path = saved(folder / "ckpt.pt", nanogpt_checkpoint(gpt2_weights()))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo("ckpt/data.pkl").header_offset
            end = start + archive.getinfo("ckpt/data.pkl").file_size + 200
        place = data.draw(st.one_of(st.integers(start, end), st.integers(len(content) - 3000, len(content) - 1)))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        flags = nanogpt_flags(path)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        assert flags.keys() == GPT2.keys() and flags["n_embd"] == C
