"""Adapters from elsewhere: broken or unsupported ones are one line, others are initial values of --lora_init."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfg.config import load_config, model_config
from model.formats.peft import read_adapter, write_adapter
from model.formats.pretrained import load_model, open_pretrained
from model.gpt import parameter_shapes
from tests.adapters import (
    CPU,
    FAMILIES,
    LLAMA_MODULES,
    assert_equal,
    logits,
    make_adapter,
    our_tensors,
    with_adapters,
)
from util.errors import UserError

# --- broken and unsupported adapters ---------------------------------------------------------------


@pytest.fixture
def adapter(bases, tmp_path):
    """The folder of an adapter of all matrices of a small Llama."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = model_config(open_pretrained(f"hf:{bases / 'llama'}").flags, "base")
    write_adapter(folder, config, our_tensors(config), 6.0, str(bases / "llama"))
    return folder


def refused(folder, said):
    with pytest.raises(UserError, match=said) as caught:
        load_model(f"peft:{folder}", CPU)
    assert "\n" not in str(caught.value) and (str(folder) in str(caught.value))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3 is not supported; only LORA"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias=all is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_new_setting": {"a": 1}}, "some_new_setting"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base model"),
        ({"modules_to_save": ["model.norm"]}, "modules_to_save has model.norm; only the embeddings"),
        ({"modules_to_save": ["embed_tokens"]}, "no weights of embed_tokens, which modules_to_save names"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head; only adapters of matrices in blocks"),
        ({"rank_pattern": {r".*\.q_proj": 4}}, "rank_pattern has .*, a regular expression"),
        ({"alpha_pattern": {"(a+)+": 4}}, "alpha_pattern has .*, a regular expression"),
        ({"r": 4}, r"shape \(.*\), but adapter_config.json and the base model need \(4, "),
        ({"r": True}, "damaged"),
        ({"r": 0}, "damaged"),
        ({"lora_alpha": "x"}, "damaged"),
        ({"use_rslora": "yes"}, "damaged"),
        ({"target_modules": [1]}, "damaged"),
        ({"layers_to_transform": ["x"]}, "damaged"),
        ({"target_modules": ["q_proj"]}, "has an adapter of .*, which adapter_config.json does not name"),
        ({"layers_to_transform": [0]}, "has an adapter of .*layers.1.*, which adapter_config.json does not name"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"base_model_name_or_path": "/no/where"}, "base_model_name_or_path=/no/where: no such folder"),
        ({"base_model_name_or_path": "/"}, "the base model in adapter_config.json: /config.json"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_read_is_an_error_that_names_it(adapter, setting, said):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    refused(adapter, said)


@pytest.mark.parametrize("missing", ["peft_type", "r"])
def test_a_missing_setting_is_an_error(adapter, missing):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != missing}))
    refused(adapter, f"{missing}. is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_an_error(adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    refused(adapter, "adapter_config.json is damaged")


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"has no tensor {NAME}"),
        (lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], "has no tensor .*layers.1.*; truncated"),
        (lambda t: t.clear(), "has no tensor"),
        (lambda t: t.update({NAME: torch.zeros(3, 15)}), r"up_proj.lora_A.weight has shape \(3, 15\), .* \(3, 16\)"),
        (lambda t: t.update({NAME: torch.zeros(3 * 16)}), "shape"),
        (lambda t: t.update({NAME: torch.zeros(3, 16, dtype=torch.int64)}), "dtype I64"),
        (lambda t: t.update({NAME.replace("layers.1", "layers.2"): t[NAME].clone()}), "layers.2.* is not read"),
        (lambda t: t.update({NAME.removeprefix("base_model.model."): t.pop(NAME)}), "is not read"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(16)}), "model.norm.weight is not read"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(62, 16)}), "has 62 rows, the base model 61"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(61, 15)}), "shape"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(())}), "has 0 rows"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_an_error(adapter, change, said):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, said)


def test_truncated_missing_and_pickled_files_are_an_error(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole + b"x"):
        file.write_bytes(content)
        refused(adapter, "not a safetensors file|claims a header")
    file.unlink()
    refused(adapter, "adapter_model.safetensors: no such file; save")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(adapter, "only adapter_model.bin, a pickle, which is not read")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, "adapter_config.json: No such file or directory; the folder of a PEFT adapter has one")


def test_a_folder_without_an_adapter_or_with_one_is_named(adapter, bases, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--init_from=peft:nowhere: no such folder"):
        open_pretrained("peft:nowhere")
    with pytest.raises(UserError, match=f"it holds a PEFT adapter; give peft:{adapter}"):
        open_pretrained(f"hf:{adapter}")


# --- initial values of our adapters --------------------------------------------------------------


def flags_for(bases, *flags, family="llama"):
    base = ["--sequence_length=24", f"--init_from=hf:{bases / family}", "--lora_rank=3", "--lora_alpha=6"]
    return load_config([*base, *flags], 1, open_pretrained)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_from_one_that_was_written(bases, tmp_path, family):
    config = flags_for(bases, "--lora_embeddings=1", family=family)
    tensors = our_tensors(config, embeddings=True)
    write_adapter(tmp_path, config, tensors, 6.0, str(bases / family))
    value, shapes = read_adapter(tmp_path, config), parameter_shapes(config)
    for name, tensor in tensors.items():
        assert torch.equal(value(name, shapes.get(name, tensor.shape)), tensor), name
    padded = value("wte.weight", torch.Size((64, 16)))
    assert torch.equal(padded[:61], tensors["wte.weight"]) and not padded[61:].any()
    assert value("ln_f.weight", torch.Size((16,))) is None


def test_a_scale_of_rslora_is_an_alpha(bases, tmp_path):
    theirs = make_adapter(bases / "gpt2", tmp_path / "a", target_modules=["c_fc"], use_rslora=True)
    scale = 7 / 3**0.5
    alpha = f"--lora_alpha={3 * scale:.12g}"
    config = flags_for(bases, "--lora_targets=c_fc", alpha, family="gpt2")
    value = read_adapter(tmp_path / "a", config)
    ours, _, _ = load_model(f"hf:{bases / 'gpt2'}", CPU)
    names = [f"h.{i}.mlp.c_fc.lora_{x}" for i in range(2) for x in "ab"]
    assert_equal(logits(with_adapters(ours, {n: value(n, None) for n in names}, scale)), logits(theirs))
    with pytest.raises(UserError, match="--lora_alpha=6: the adapter of .* has 12.1243"):
        read_adapter(tmp_path / "a", flags_for(bases, "--lora_targets=c_fc", family="gpt2"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_rank=4"], "--lora_rank=4: the adapter of --lora_init=.* has rank 3 .*; give 3"),
        (["--lora_alpha=7"], "--lora_alpha=7: the adapter of --lora_init=.* has 6 .*; give 6"),
        (["--lora_targets=attn"], "--lora_targets=attn: the adapter of --lora_init=.* has one of model.layers.0.mlp"),
    ],
)
def test_a_flag_that_differs_from_the_adapter_is_an_error(bases, adapter, flags, said):
    with pytest.raises(UserError, match=said):
        read_adapter(adapter, flags_for(bases, *flags))


def test_an_adapter_that_cannot_be_continued_is_an_error_that_names_the_way_out(bases, tmp_path):
    """Different A in the parts of one matrix, fewer matrices, and trained embeddings."""
    make_adapter(bases / "llama", tmp_path / "a", target_modules=LLAMA_MODULES)
    with pytest.raises(UserError, match="its A of q_proj and k_proj and v_proj differ.*--init_from=peft:"):
        read_adapter(tmp_path / "a", flags_for(bases, "--lora_alpha=7"))
    make_adapter(bases / "llama", tmp_path / "b", target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match="--lora_targets=c_attn: the adapter of .* has none of .*.k_proj"):
        read_adapter(tmp_path / "b", flags_for(bases, "--lora_alpha=7", "--lora_targets=c_attn"))
    config = flags_for(bases)
    write_adapter(tmp_path, config, our_tensors(config, embeddings=True), 6.0, "x")
    with pytest.raises(UserError, match="--lora_embeddings=0: the adapter of .* contains trained embeddings"):
        read_adapter(tmp_path, config)
