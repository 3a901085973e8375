"""The model gives the logits of transformers' GPT-2 and Llama for equal weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cfg.config import load_config
from model.gpt import GPT, init_weights


def make(*flags):
    config = load_config(
        ["--n_layer=3", "--n_embd=48", "--sequence_length=40", "--vocab_size=211", *flags], world_size=1
    )
    return GPT(config).eval()


def randomize(module):
    """Draws weights far from the initial ones, so that biases and norms matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


@torch.no_grad()
def set_head(ours, theirs):
    ours.wte.weight[:211] = theirs.get_input_embeddings().weight
    if ours.lm_head is not None:
        ours.lm_head.weight[:211] = theirs.lm_head.weight


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied):
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=211, n_positions=40, n_embd=48, n_layer=3, n_head=4, tie_word_embeddings=tied)
    ).eval()
    randomize(theirs)
    ours = make("--n_head=4", f"--tie_embeddings={int(tied)}")
    set_head(ours, theirs)
    source = theirs.transformer.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name in ("wte.weight", "lm_head.weight"):
                continue
            value = source[name]
            conv1d = name.endswith("weight") and ("c_" in name)  # transformers stores these transposed
            parameter.copy_(value.t() if conv1d else value)
    idx = torch.randint(211, (3, 40))
    assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_llama(kv_heads, tied):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=211,
            hidden_size=48,
            intermediate_size=100,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    randomize(theirs)
    flags = ["--positions=rotary", "--rope_base=5000", "--norm=rmsnorm", "--mlp=swiglu", "--mlp_hidden=100", "--bias=0"]
    ours = make("--n_head=4", f"--n_kv_head={kv_heads}", f"--tie_embeddings={int(tied)}", *flags)
    set_head(ours, theirs)
    with torch.no_grad():
        for block, layer in zip(ours.h, theirs.model.layers, strict=True):
            a, m = layer.self_attn, layer.mlp
            block.attn.c_attn.weight.copy_(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]))
            block.attn.c_proj.weight.copy_(a.o_proj.weight)
            block.mlp.c_fc.weight.copy_(torch.cat([m.gate_proj.weight, m.up_proj.weight]))
            block.mlp.c_proj.weight.copy_(m.down_proj.weight)
            block.ln_1.weight.copy_(layer.input_layernorm.weight)
            block.ln_2.weight.copy_(layer.post_attention_layernorm.weight)
        ours.ln_f.weight.copy_(theirs.model.norm.weight)
    idx = torch.randint(211, (3, 40))
    assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-5


def test_gpt2_has_the_published_sizes():
    published = {(12, 12, 768): 124_439_808, (24, 16, 1024): 354_823_168, (48, 25, 1600): 1_557_611_200}
    for (layers, heads, width), count in published.items():
        config = load_config([f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}"], world_size=1)
        with torch.device("meta"):
            assert GPT(config).num_params() == count


def test_padding_changes_neither_count_nor_logits():
    padded, exact = make("--n_head=4", "--vocab_pad=64"), make("--n_head=4", "--vocab_pad=1")
    init_weights(padded, 3)
    exact.load_state_dict({k: v[:211] if k == "wte.weight" else v for k, v in padded.state_dict().items()})
    assert padded.num_params() == exact.num_params()
    idx = torch.randint(211, (2, 40))
    assert padded(idx).shape == (2, 40, 211)
    assert torch.allclose(padded(idx), exact(idx), atol=1e-6)
