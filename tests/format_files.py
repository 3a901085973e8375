"""Model files of llm.c, llama2.c and nanoGPT, written from their format descriptions without rawgpt's code."""

import struct

import numpy as np
import torch

L, H, C, V, T = 3, 4, 32, 211, 24  # layers, heads, width, vocabulary, positions
F, KV = 40, 2  # llama2.c: hidden width, key/value heads
GPT2_KINDS = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split()


def random(*shape, seed):
    """Draws numbers larger than initial weights, so that biases and norms matter."""
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype("<f4")


def gpt2_weights(bias=True):
    """Returns weights under nanoGPT's names without `transformer.`, matrices (out, in)."""
    shapes = {"wte": (V, C), "wpe": (T, C), "ln_f": (C,)}
    for i in range(L):
        sizes = [(C,), (3 * C, C), (C, C), (C,), (4 * C, C), (C, 4 * C)]
        shapes |= {f"h.{i}.{kind}": size for kind, size in zip(GPT2_KINDS, sizes, strict=True)}
    weights = {f"{name}.weight": random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    if bias:
        biased = [(n, s[0]) for n, s in shapes.items() if n not in ("wte", "wpe")]
        weights |= {f"{name}.bias": random(size, seed=100 + k) for k, (name, size) in enumerate(biased)}
    return weights


def llmc_bytes(weights, version=3):
    padded = -(-V // 128) * 128
    content = struct.pack("<8i", 20240326, version, T, V, L, H, C, padded).ljust(1024, b"\0")
    arrays = [np.pad(weights["wte.weight"], ((0, padded - V), (0, 0))), weights["wpe.weight"]]
    for kind in GPT2_KINDS:
        for part in ("weight", "bias"):
            arrays += [weights[f"h.{i}.{kind}.{part}"] for i in range(L)]
    arrays += [weights["ln_f.weight"], weights["ln_f.bias"]]
    for a in arrays:
        content += torch.tensor(a).bfloat16().view(torch.int16).numpy().tobytes() if version == 5 else a.tobytes()
    return content


def nanogpt_checkpoint(weights, prefix="transformer.", masks=False, head=None, **args):
    """Returns what train.py saves. `head` is an untied head. An argument of None is left out."""
    state = {f"{prefix}{name}": torch.tensor(value) for name, value in weights.items()}
    state[f"{prefix.removesuffix('transformer.')}lm_head.weight"] = (
        state[f"{prefix}wte.weight"] if head is None else torch.tensor(head)
    )
    if masks:
        state |= {f"{prefix}h.{i}.attn.bias": torch.ones(T, T).tril().view(1, 1, T, T) for i in range(L)}
    sizes = dict(n_layer=L, n_head=H, n_embd=C, block_size=T, bias="ln_f.bias" in weights, vocab_size=V, dropout=0.1)
    exp_avg = {k: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)} for k in range(2)}
    return {
        "model": state,
        "optimizer": {"state": exp_avg, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": [0, 1]}]},
        "model_args": {k: v for k, v in (sizes | args).items() if v is not None},
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.2),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
    }


def llama2c_weights(kv_heads=KV, tied=True, base=10000.0):
    """Returns weights under llama2.c's names, those of blocks behind `i.`, and the rotary tables."""
    kv, head_dim = C // H * kv_heads, C // H
    shapes = {"tok_embeddings": (V, C), "norm": (C,)} | ({} if tied else {"output": (V, C)})
    for i in range(L):
        shapes |= {f"{i}.attention_norm": (C,), f"{i}.wq": (C, C), f"{i}.wk": (kv, C), f"{i}.wv": (kv, C)}
        shapes |= {f"{i}.wo": (C, C), f"{i}.ffn_norm": (C,), f"{i}.w1": (F, C), f"{i}.w2": (C, F), f"{i}.w3": (F, C)}
    weights = {name: random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    angles = np.outer(np.arange(T), base ** -(np.arange(0, head_dim, 2) / head_dim))
    return weights | {"cos": np.cos(angles).astype("<f4"), "sin": np.sin(angles).astype("<f4")}


def llama2c_bytes(w, version=0, kv_heads=KV):
    def layers(*names):
        return [w[f"{i}.{name}"] for name in names for i in range(L)]

    head = [w["output"]] if "output" in w else []
    if version == 0:
        content = struct.pack("<7i", C, F, L, H, kv_heads, -V if head else V, T)
        arrays = [w["tok_embeddings"], *layers("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")]
        arrays += [w["norm"], w["cos"], w["sin"]]
    else:
        content = struct.pack("<Ii7iB", 0x616B3432, version, C, F, L, H, kv_heads, V, T, not head).ljust(256, b"\0")
        arrays = [*layers("attention_norm", "ffn_norm"), w["norm"], w["tok_embeddings"]]
        arrays += layers("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    return content + b"".join(a.tobytes() for a in arrays + head)
