"""Models from Hugging Face folders give the logits of transformers; unsupported ones are an error."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

from model.formats.hf import read_flags, write_config
from model.formats.pretrained import load_model, open_pretrained
from util.errors import UserError

CPU = torch.device("cpu")
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, **ROPES["llama3"]}
QWEN2 = {"model_type": "qwen2", "architectures": None, "use_sliding_window": True}


def randomize(module):
    """Draws weights far from the initial ones, so that biases and norms matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def save(config, folder, **options):
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.save_pretrained(folder, **options)
    return model


def same(folder, theirs, vocab, length=40):
    ours, flags, _ = load_model(f"hf:{folder}", CPU)
    assert flags["vocab_size"] == vocab
    idx = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits.float()
        got = ours(idx)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    return ours


@st.composite
def rotary_configs(draw):
    family = draw(st.sampled_from([LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, NanoChatConfig]))
    kv = draw(st.sampled_from([1, 2, 3]))
    heads = kv * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(2, 8))
    common = {
        "vocab_size": draw(st.integers(2, 300)),
        "hidden_size": heads * head_dim if family is Qwen2Config else heads * draw(st.sampled_from([head_dim, 8])),
        "intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family is not Qwen2Config:
        common["head_dim"] = head_dim
    kind = draw(st.sampled_from(list(ROPES)))
    common["rope_parameters"] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e4, 5e5])), **ROPES[kind]}
    if family is MistralConfig:
        common["sliding_window"] = draw(st.sampled_from([None, 7, 40, 100]))
    if family in (Qwen2Config, Qwen3Config) and draw(st.booleans()):
        common |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": draw(st.sampled_from([0, 9]))}
    if family is NanoChatConfig:
        common["final_logit_softcapping"] = draw(st.sampled_from([None, 1.5, 15.0]))
    if family is LlamaConfig and draw(st.booleans()):
        common |= {"attention_bias": True, "mlp_bias": True}
    return family(**common)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=rotary_configs())
def test_rotary_families(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("hf")
    same(folder, save(config, folder), config.vocab_size)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.integers(1, 4),
    vocab=st.integers(2, 300),
    inner=st.sampled_from([None, 50]),
    tied=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
    activation=st.sampled_from(["gelu_new", "gelu"]),
)
def test_gpt2(tmp_path_factory, heads, vocab, inner, tied, eps, activation):
    folder = tmp_path_factory.mktemp("hf")
    shape = {"n_embd": heads * 6, "n_head": heads, "n_layer": 2, "n_positions": 40, "n_inner": inner}
    shape |= {"layer_norm_epsilon": eps, "activation_function": activation}
    config = GPT2Config(vocab_size=vocab, tie_word_embeddings=tied, **shape)
    same(folder, save(config, folder), vocab)


def small_llama(**changes):
    shape = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{"vocab_size": 61, "max_position_embeddings": 64, **shape, **changes})


def small_nanochat(**changes):
    shape = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return NanoChatConfig(**{"vocab_size": 61, "max_position_embeddings": 64, **shape, **changes})


def small_gpt2(**changes):
    return GPT2Config(**{"vocab_size": 61, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 40, **changes})


def test_a_folder_in_many_files_and_in_bfloat16(tmp_path):
    theirs = save(small_llama(), tmp_path / "one").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    same(tmp_path / "many", AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32), 61)


def test_gpt2_as_it_was_released(tmp_path):
    """Names without "transformer.", mask buffers, and a configuration of 2019."""
    theirs = save(small_gpt2(), tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(2)}
    save_file(tensors, old / "model.safetensors")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    config |= {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 40, "n_ctx": 40, "vocab_size": 61}
    (old / "config.json").write_text(json.dumps(config))
    same(old, theirs, 61)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("several", [False, True])
def test_a_head_that_differs_from_a_tied_embedding_is_read(tmp_path, capsys, family, several):
    """config.json ties the two, but the file has another head. transformers 5 uses the head."""
    shape = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}.get(family)
    config = kind(**shape, **heads, tie_word_embeddings=False) if kind else small_gpt2(tie_word_embeddings=False)
    theirs = save(config, tmp_path, **({"max_shard_size": "4KB"} if several else {}))
    written = json.loads((tmp_path / "config.json").read_text())
    written["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(written))
    ours = same(tmp_path, theirs, 61)
    assert not ours.config.tie_embeddings
    assert "lm_head.weight differs from the embedding, so the head is not tied to it" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"num_key_value_heads": 2}, {"head_dim": 6, "tie_word_embeddings": True}])
def test_nanochat(tmp_path, change):
    """The shape of the published models, and what else the class computes."""
    ours = same(tmp_path, save(small_nanochat(**change), tmp_path), 61)
    names = [name for name, _ in ours.named_parameters() if not name.startswith("h.")]
    assert names == ["wte.weight", "lm_head.weight"][: 1 if "head_dim" in change else 2]


def test_a_folder_may_contain_a_tied_head(tmp_path):
    theirs = save(small_llama(tie_word_embeddings=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    same(tmp_path, theirs, 61)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"model_type": "gemma2"}, "gemma2"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "from layer to layer"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling differ"),
        ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32}, "32, but 16"),
        ("llama", {**QWEN2, "layer_types": ["sliding_attention", "full_attention"]}, "1 of 2 layers"),
        ("llama", {**QWEN2, "sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "the model has 0"),
        ("llama", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, "the model has 0"),
        (
            "llama",
            {
                "model_type": "mistral",
                "architectures": None,
                "sliding_window": 5,
                "layer_types": ["full_attention"] * 2,
            },
            "the model has 2",
        ),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"architectures": 3}, "architecture 3"),
        ("llama", {"num_key_value_heads": 3}, "--n_kv_head=3 must divide"),
        ("llama", {"head_dim": 7}, "--head_dim=7 must be even"),
        ("llama", {"vocab_size": 4 * 10**10}, "vocab_size=40000000000"),
        ("llama", {"num_hidden_layers": 10**9}, "n_layer=1000000000"),
        ("llama", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ("llama", {"hidden_size": None}, "damaged"),
        ("llama", {"num_hidden_layers": 0}, "n_layer"),
        ("nanochat", {"hidden_act": "silu"}, "hidden_act=silu is not supported; only relu2"),
        ("nanochat", {"attention_bias": True}, "attention_bias=True is not supported; only False"),
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_an_unsupported_option_is_an_error_that_names_it(tmp_path, family, change, named):
    config = {"gpt2": small_gpt2, "llama": small_llama, "nanochat": small_nanochat}[family]().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=named):
        load_model(f"hf:{tmp_path}", CPU)


def test_an_unused_window_is_ignored():
    """Llama's class in transformers always ignores it, Qwen's without use_sliding_window or without a size."""
    for change in ({"sliding_window": 5}, {**QWEN2, "sliding_window": None, "max_window_layers": 0}):
        assert read_flags({**small_llama().to_dict(), "layer_types": None, **change}, "here")["sliding_window"] == 0
    change = QWEN2 | {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}
    assert read_flags(small_llama().to_dict() | change, "here")["sliding_window"] == 0


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_a_missing_option_is_an_error(tmp_path, missing):
    config = small_llama().to_dict()
    del config[missing]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=missing):
        open_pretrained(f"hf:{tmp_path}")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "[" * 100_000])
def test_a_damaged_configuration_is_an_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        open_pretrained(f"hf:{tmp_path}")


def broken(folder, name, change):
    """Checks that a small Llama whose tensors `change` has altered is an error."""
    save(small_llama(), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=name):
        load_model(f"hf:{folder}", CPU)


def test_tensors_of_another_model_are_an_error(tmp_path):
    gate, norm = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"
    broken(tmp_path / "a", gate, lambda t: t.pop(gate))
    broken(tmp_path / "b", "layers.2", lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}))
    broken(tmp_path / "c", gate, lambda t: t.update({gate: torch.zeros(3, 16)}))
    broken(tmp_path / "d", gate, lambda t: t.update({gate: torch.zeros(3, 5)}))
    broken(tmp_path / "e", "I64", lambda t: t.update({norm: torch.zeros(16, dtype=torch.int64)}))
    broken(tmp_path / "f", "embed_tokens", lambda t: t.update({"model.embed_tokens.weight": torch.zeros(60, 16)}))


def test_parts_of_wrong_sizes_with_the_right_sum_are_an_error(tmp_path):
    """Gate and up, or query, key and value, have wrong sizes, but their sum is right."""
    gate, up = ("model.layers.0.mlp.gate_proj.weight", torch.zeros(30, 16)), "model.layers.0.mlp.up_proj.weight"
    broken(tmp_path / "a", gate[0], lambda t: t.update({gate[0]: gate[1], up: torch.zeros(50, 16)}))
    query, key = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    broken(tmp_path / "b", query, lambda t: t.update({query: torch.zeros(24, 16), key: torch.zeros(8, 16)}))


def test_corrupt_or_malicious_files_are_an_error(tmp_path):
    save(small_llama(), tmp_path)
    weights, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    whole = weights.read_bytes()

    def refused(name):
        with pytest.raises(UserError, match=name):
            load_model(f"hf:{tmp_path}", CPU)

    for header in (2**63, 2**40, len(whole), 2**25):  # larger than the file, or than the header of any model
        weights.write_bytes(struct.pack("<Q", header) + whole[8:] + bytes(2**25 if header == 2**25 else 0))
        refused("claims a header|not a safetensors file")
    huge = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(huge)) + huge)
    refused("not a safetensors file")
    for content in (b"", whole[:4], whole[: len(whole) // 2], whole + b"x"):
        weights.write_bytes(content)
        refused("not a safetensors file|claims a header")
    weights.unlink()
    refused("no weights at all")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("a pickle, which is not read")

    outside = tmp_path.parent / f"{tmp_path.name}_outside.safetensors"
    outside.write_bytes(whole)
    names = list(load_file(outside))
    for path in (f"../{outside.name}", str(outside), f"x/../../{outside.name}", "pytorch_model.bin", ".."):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, path)}))
        refused("not a .safetensors file of this folder")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}))
    refused("gone.safetensors, which is missing")
    for content in ("", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        refused("damaged|not a .safetensors")


def test_no_code_of_a_folder_is_run(tmp_path):
    """The classes in `auto_map` and the files of the folder are not imported."""
    save(small_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    load_model(f"hf:{tmp_path}", CPU)
    assert not ran.exists()


def test_a_missing_or_empty_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, said in [
        (str(tmp_path / "nowhere"), "no such folder; check the path"),
        ("no such name", "no such folder"),
        ("../x", "no such folder"),
        ("", "the name is empty"),
        (str(tmp_path), "config.json"),
        ("nobody/nothing", "the hub does not have it or cannot be reached"),
    ]:
        with pytest.raises(UserError, match=said):
            open_pretrained(f"hf:{name}")


@settings(max_examples=50, deadline=None)
@given(config=rotary_configs())
def test_configurations_survive_the_round_trip(config):
    flags = read_flags(config.to_dict(), "config.json") | {"dropout": 0.0}
    special = [flags["bias"], flags["qkv_bias"], flags["qk_norm"], bool(flags["sliding_window"])]
    special = [] if flags["mlp"] == "relu2" else special
    try:
        back = read_flags(write_config(flags), "config.json")
    except UserError as error:
        assert sum(special) > 1 and "--" in str(error)
        return
    assert back | {"dropout": 0.0} == flags
