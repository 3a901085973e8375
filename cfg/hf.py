"""Hugging Face's config.json to our model flags and back: docs/huggingface.md lists what is read and written.

What a configuration says that we do not compute is refused by name, never passed over: a model that runs with other
arithmetic than it was trained with is worse than none. Defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

from typing import Any

from util.errors import UserError

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",  # Llama 1 to 3, SmolLM, TinyLlama and many others
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LINEAR, LLAMA3 = ("factor",), ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
ROPE_KINDS = {"linear": LINEAR, "llama3": LLAMA3}
# More than any model has: a damaged number must not make endless lists, nor one that overflows.
MOST = {"n_layer": 10_000, "n_head": 2**16, "n_kv_head": 2**16, "head_dim": 2**16}
MOST |= dict.fromkeys(("n_embd", "vocab_size", "n_positions", "mlp_hidden"), 2**24)


def flags_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The flags of `ModelConfig` that a config.json stands for, none left to be derived.

    Raises UserError, beginning with `where`, for an architecture or an option that our model does not have.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CLASSES:
        raise UserError(f"{where}: model_type {family!r} is not read; those that are: {', '.join(CLASSES)}")
    named = config.get("architectures") or [CLASSES[family]]
    named = named if isinstance(named, list) else [named]
    if CLASSES[family] not in named:
        raise UserError(f"{where}: architecture {named[0]} is not read; of {family}, only {CLASSES[family]}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantized weights are not read; get the model's own")
    try:
        flags = _gpt2(config, where) if family == "gpt2" else _rotary(family, config, where)
    except KeyError as e:
        raise UserError(f"{where}: {e} is missing") from e
    except (TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: damaged ({e})") from e
    for name, most in MOST.items():
        if not 0 <= flags[name] <= most:
            raise UserError(f"{where}: damaged (a model of {name}={flags[name]})")
    return flags


def _only(config: dict[str, Any], where: str, **wanted: Any) -> None:
    """Refuses options that are not as the model computes; one that is missing is the first of those it may be."""
    for key, values in wanted.items():
        values = values if isinstance(values, tuple) else (values,)
        if (value := config.get(key, values[0])) not in values:
            raise UserError(f"{where}: {key}={value} is not supported; only {' or '.join(map(str, values))}")


def _gpt2(config: dict[str, Any], where: str) -> dict[str, Any]:
    _only(
        config,
        where,
        activation_function=tuple(GELUS),
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    width, heads = int(config["n_embd"]), int(config["n_head"])
    return {
        "n_layer": int(config["n_layer"]),
        "n_head": heads,
        "n_kv_head": heads,
        "n_embd": width,
        "head_dim": 0,
        "vocab_size": int(config["vocab_size"]),
        "n_positions": int(config["n_positions"]),
        "positions": "learned",
        "rope_scaling": "",
        "sliding_window": 0,
        "norm": "layernorm",
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "mlp": GELUS[config.get("activation_function", "gelu_new")],
        "mlp_hidden": int(config.get("n_inner") or 4 * width),
        "bias": True,
        "qkv_bias": False,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "qk_norm": False,
        "logit_softcap": 0.0,
    }


def _rotary(family: str, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Llama and what descends from it."""
    _only(config, where, hidden_act=("silu", "swish"), use_mrope=False)
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention_bias and not (family == "llama" and mlp_bias):
        raise UserError(f"{where}: attention_bias=True is not supported without mlp_bias=True (--bias=1 is both)")
    if mlp_bias and not attention_bias:
        raise UserError(f"{where}: mlp_bias=True is not supported without attention_bias=True (--bias=1 is both)")
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = config.get("num_key_value_heads", {"llama": heads, "mistral": 8}.get(family, 32))
    head_dim = int(config.get("head_dim") or (128 if family == "qwen3" else 0))
    base, scaling = _rope(config, where)
    return {
        "n_layer": int(config["num_hidden_layers"]),
        "n_head": heads,
        "n_kv_head": int(kv_heads or heads),
        "n_embd": width,
        "head_dim": 0 if head_dim * heads == width else head_dim,
        "vocab_size": int(config["vocab_size"]),
        "n_positions": int(config["max_position_embeddings"]),
        "positions": "rotary",
        "rope_base": base,
        "rope_scaling": scaling,
        "sliding_window": _window(family, config, where),
        "norm": "rmsnorm",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "mlp": "swiglu",
        "mlp_hidden": int(config["intermediate_size"]),
        "bias": attention_bias,
        "qkv_bias": family == "qwen2",
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "qk_norm": family == "qwen3",
        "logit_softcap": 0.0,
    }


def _rope(config: dict[str, Any], where: str) -> tuple[float, str]:
    """Base and --rope_scaling; since transformers 5 both stand in rope_parameters."""
    said = [about for key in ("rope_parameters", "rope_scaling") if (about := config.get(key))] or [{}]
    found = [_rope_of(about, config, where) for about in said]
    if found[0] != found[-1]:
        raise UserError(f"{where}: rope_parameters and rope_scaling differ; remove the one that is wrong")
    return found[0]


def _rope_of(about: dict[str, Any], config: dict[str, Any], where: str) -> tuple[float, str]:
    """The same, of one of the two."""
    if any(isinstance(value, dict) for value in about.values()):
        raise UserError(f"{where}: rope_parameters that differ from layer to layer are not supported")
    base = float(about.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if (part := about.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={part} is not supported; only 1")
    kind = about.get("rope_type", about.get("type", "default"))
    if kind == "default":
        return base, ""
    if kind not in ROPE_KINDS:
        raise UserError(f"{where}: rope_type {kind!r} is not supported; only default, {', '.join(ROPE_KINDS)}")
    own = config.get(within := LLAMA3[-1])  # versions of transformers do not agree on which of the two counts
    if kind == "llama3" and own is not None and own != about.get(within):
        said = about.get(within)
        raise UserError(f"{where}: {within}={own}, but {said} of the rotary scaling; remove the one that is wrong")
    return base, f"{kind}:{','.join(f'{float(about[key]):.17g}' for key in ROPE_KINDS[kind])}"


def _window(family: str, config: dict[str, Any], where: str) -> int:
    """--sliding_window. Ours holds for all layers or none."""
    layers = int(config["num_hidden_layers"])
    window = int(config.get("sliding_window", 4096) or 0)
    if family == "llama" or (family != "mistral" and not config.get("use_sliding_window")):
        window = 0  # it may be named, but is not used
    first = 0 if family == "mistral" else int(config.get("max_window_layers", 28))
    windowed = max(0, layers - first) if window else 0
    if kinds := config.get("layer_types"):
        if odd := set(kinds) - {"sliding_attention", "full_attention"}:
            raise UserError(f"{where}: layer_types has {min(odd)}; only full_attention and sliding_attention")
        said = sum(kind == "sliding_attention" for kind in kinds)
        if said != windowed and (not window or family == "mistral"):  # transformers' class does not look at them
            raise UserError(f"{where}: sliding_attention for {said} of layer_types, but the model has {windowed}")
        windowed = said
    if windowed not in (0, layers):
        raise UserError(f"{where}: a sliding window in {windowed} of {layers} layers; only in all or none")
    return window if windowed else 0


def config_of(flags: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model with these flags of `ModelConfig`.

    Raises UserError naming the switch if transformers has no class that computes it.
    """
    return _to_gpt2(flags) if flags["positions"] == "learned" else _to_rotary(flags)


def _needs(flags: dict[str, Any], who: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if flags[name] != value:
            now, then = (int(v) if isinstance(v, bool) else v for v in (flags[name], value))
            raise UserError(f"--{name}={now}: transformers' {who} has only --{name}={then}; train with that to export")


def _to_gpt2(flags: dict[str, Any]) -> dict[str, Any]:
    who = CLASSES["gpt2"] + " (the one for --positions=learned)"
    mlp = flags["mlp"] if flags["mlp"] in GELUS.values() else "gelu"
    _needs(flags, who, norm="layernorm", mlp=mlp, qk_norm=False, logit_softcap=0.0, sliding_window=0, head_dim=0)
    _needs(flags, who, n_kv_head=flags["n_head"])
    return {
        "model_type": "gpt2",
        "architectures": [CLASSES["gpt2"]],
        "n_layer": flags["n_layer"],
        "n_head": flags["n_head"],
        "n_embd": flags["n_embd"],
        "n_inner": flags["mlp_hidden"],
        "n_positions": flags["n_positions"],
        "vocab_size": flags["vocab_size"],
        "activation_function": {"gelu": "gelu_new", "gelu_exact": "gelu"}[mlp],
        "layer_norm_epsilon": flags["norm_eps"],
        "attn_pdrop": flags["dropout"],
        "embd_pdrop": flags["dropout"],
        "resid_pdrop": flags["dropout"],
        "tie_word_embeddings": flags["tie_embeddings"],
    }


def _to_rotary(flags: dict[str, Any]) -> dict[str, Any]:
    special = [name for name in ("qk_norm", "qkv_bias", "sliding_window") if flags[name]]
    family = {"qk_norm": "qwen3", "qkv_bias": "qwen2", "sliding_window": "mistral"}[special[0]] if special else "llama"
    who = CLASSES[family] + (f" (the one for --{special[0]})" if special else "")
    _needs(flags, who, norm="rmsnorm", mlp="swiglu", logit_softcap=0.0)
    if family != "llama":
        _needs(flags, who, bias=False)
    for name in special[1:]:
        _needs(flags, who, **{name: type(flags[name])(0)})
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "num_hidden_layers": flags["n_layer"],
        "num_attention_heads": flags["n_head"],
        "num_key_value_heads": flags["n_kv_head"],
        "hidden_size": flags["n_embd"],
        "head_dim": flags["head_dim"] or flags["n_embd"] // flags["n_head"],
        "intermediate_size": flags["mlp_hidden"],
        "max_position_embeddings": flags["n_positions"],
        "vocab_size": flags["vocab_size"],
        "hidden_act": "silu",
        "rms_norm_eps": flags["norm_eps"],
        "rope_theta": flags["rope_base"],
        "attention_dropout": flags["dropout"],
        "tie_word_embeddings": flags["tie_embeddings"],
    }
    if family == "llama":
        config |= {"attention_bias": flags["bias"], "mlp_bias": flags["bias"]}
    if family == "mistral":
        config |= {"sliding_window": flags["sliding_window"]}
    if flags["rope_scaling"]:
        kind, _, numbers = flags["rope_scaling"].partition(":")
        values = [float(n) for n in numbers.split(",")]
        about = dict(zip(ROPE_KINDS[kind], values, strict=True))
        if kind == "llama3":
            about["original_max_position_embeddings"] = int(values[3])
        config["rope_scaling"] = {"rope_type": kind, **about}
    return config
