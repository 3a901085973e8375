"""Small models of transformers, random adapters that PEFT makes of them, and random A and B of rawgpt."""

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

from model.gpt import parameter_shapes
from model.lora import A as OUR_A

CPU = torch.device("cpu")
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 40, "bos_token_id": None}
CONFIGS = {
    "gpt2": lambda: GPT2Config(**GPT2, eos_token_id=None),
    "gpt2_untied": lambda: GPT2Config(**GPT2, eos_token_id=None, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=7, head_dim=6),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=6),
    "nanochat": lambda: NanoChatConfig(**SIZES),
}
# The others are slow tests: their classes differ from Llama's in nothing that an adapter sees.
FAST = ("gpt2", "llama", "llama_tied", "nanochat")
FAMILIES = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in CONFIGS]
LLAMA_MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
MODULES = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "nanochat": "q_proj k_proj v_proj o_proj fc1 fc2".split(),
}
OURS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def modules_of(family):
    return MODULES.get(family.partition("_")[0], LLAMA_MODULES)


def embedding_of(family):
    return "wte" if family.startswith("gpt2") else "embed_tokens"


def randomize(parameters, seed, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * scale)


def save_bases(root):
    """Writes folders of small random models of transformers, one for each family."""
    for family, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config())
        randomize(model.parameters(), 0, 0.1)
        model.save_pretrained(root / family)


def logits(model, length=30, vocab=61):
    idx = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(idx)
    return getattr(found, "logits", found)


def assert_equal(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def make_adapter(base, folder, **options):
    """Saves a random adapter that PEFT has made, and returns PEFT's model. Every module has its own A and B."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options)).eval()
    randomize([p for p in model.parameters() if p.requires_grad], 3)
    model.save_pretrained(folder)
    return model


def our_tensors(config, targets=OURS, rank=3, embeddings=False):
    """Returns random A and B of our model, and its embeddings and head if wanted."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in parameter_shapes(config).items():
        if any(name.endswith(f"{module}.weight") for module in targets):
            stem = name.removesuffix(".weight")
            found[f"{stem}.lora_a"] = torch.randn(rank, shape[1], generator=generator) * 0.3
            found[f"{stem}.lora_b"] = torch.randn(shape[0], rank, generator=generator) * 0.3
        elif embeddings and name in ("wte.weight", "wpe.weight", "lm_head.weight"):
            found[name] = torch.randn(shape, generator=generator) * 0.3
    return found


def with_adapters(model, tensors, scale):
    """Adds the product of A and B to the weights of our model: the definition, written out."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            stem = name.removesuffix(".weight")
            if stem + OUR_A in tensors:
                p += scale * tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
            elif name in tensors:
                p[: len(tensors[name])] = tensors[name]
    return model
