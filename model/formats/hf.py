"""Hugging Face's config.json ↔ our model flags. docs/huggingface.md lists what is read and written.

Options that our model does not compute are refused by name: ignoring one would run the model with other arithmetic
than it was trained with. Defaults are those of transformers' configuration classes. hf_tensors.py reads the weights.
"""

from __future__ import annotations

from typing import Any

from cfg.checks import parse_rope_scaling
from cfg.config import model_config
from cfg.flags import architecture
from util.errors import UserError

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",  # Llama 1 to 3, SmolLM, TinyLlama and many others
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "nanochat": "NanoChatForCausalLM",
}
GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
TRAINED_LENGTH = "original_max_position_embeddings"
ROPE_KINDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", TRAINED_LENGTH)}


def read_flags(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the architecture that a config.json describes, as flags of `ModelConfig` with no size left to derive.

    Errors begin with `where`; unknown architectures and options are errors.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CLASSES:
        raise UserError(f"{where}: model_type {family!r} is not read; those that are: {', '.join(CLASSES)}")
    named = config.get("architectures") or [CLASSES[family]]
    named = named if isinstance(named, list) else [named]
    if CLASSES[family] not in named:
        raise UserError(f"{where}: architecture {named[0]} is not read; of {family}, only {CLASSES[family]}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantized weights are not read; get the original model")
    try:
        flags = _read_gpt2(config, where) if family == "gpt2" else _read_rotary(family, config, where)
    except KeyError as e:
        raise UserError(f"{where}: {e} is missing") from e
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: damaged ({e})") from e
    return architecture(model_config(flags, where))


def _only(config: dict[str, Any], where: str, **wanted: Any) -> None:
    """Checks that each option has one of the `wanted` values. A missing option has the first of them."""
    for key, values in wanted.items():
        values = values if isinstance(values, tuple) else (values,)
        if (value := config.get(key, values[0])) not in values:
            raise UserError(f"{where}: {key}={value} is not supported; only {' or '.join(map(str, values))}")


def _read_gpt2(config: dict[str, Any], where: str) -> dict[str, Any]:
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
        "vocab_size": int(config["vocab_size"]),
        "n_positions": int(config["n_positions"]),
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "mlp": GELUS[config.get("activation_function", "gelu_new")],
        "mlp_hidden": int(config.get("n_inner") or 4 * width),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def _read_rotary(family: str, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads Llama and its relatives."""
    switches = _read_nanochat(config, where) if family == "nanochat" else _read_llama(family, config, where)
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = config.get("num_key_value_heads", {"llama": heads, "nanochat": heads, "mistral": 8}.get(family, 32))
    head_dim = int(config.get("head_dim") or (128 if family == "qwen3" else 0))
    base, scaling = _read_rope(config, where)
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
        "norm": "rmsnorm",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "mlp_hidden": int(config["intermediate_size"]),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        **switches,
    }


def _read_llama(family: str, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the switches of Llama, Mistral and Qwen."""
    _only(config, where, hidden_act=("silu", "swish"), use_mrope=False)
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention_bias and not (family == "llama" and mlp_bias):
        raise UserError(f"{where}: attention_bias=True is not supported without mlp_bias=True (--bias=1 is both)")
    if mlp_bias and not attention_bias:
        raise UserError(f"{where}: mlp_bias=True is not supported without attention_bias=True (--bias=1 is both)")
    return {
        "sliding_window": _read_window(family, config, where),
        "mlp": "swiglu",
        "bias": attention_bias,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
    }


def _read_nanochat(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the switches of nanochat (Karpathy 2025). Its class normalises queries and keys after their rotation.

    Our model normalises first. The result is equal, because these norms have no weights and a rotation keeps lengths.
    """
    _only(config, where, hidden_act="relu2", attention_bias=False)
    return {
        "mlp": "relu2",
        "bias": False,
        "qk_norm": True,
        "norm_weight": False,
        "embedding_norm": True,
        "logit_softcap": float(config.get("final_logit_softcapping", 15.0) or 0.0),
    }


def _read_rope(config: dict[str, Any], where: str) -> tuple[float, str]:
    """Returns --rope_base and --rope_scaling. Since transformers 5 both are in rope_parameters."""
    options = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)] or [{}]
    found = [_read_rope_options(each, config, where) for each in options]
    if found[0] != found[-1]:
        raise UserError(f"{where}: rope_parameters and rope_scaling differ; remove the one that is wrong")
    return found[0]


def _read_rope_options(options: dict[str, Any], config: dict[str, Any], where: str) -> tuple[float, str]:
    """Returns --rope_base and --rope_scaling from the content of rope_parameters or rope_scaling."""
    if any(isinstance(value, dict) for value in options.values()):
        raise UserError(f"{where}: rope_parameters that differ from layer to layer are not supported")
    base = float(options.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if (part := options.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={part} is not supported; only 1")
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "default":
        return base, ""
    if kind not in ROPE_KINDS:
        raise UserError(f"{where}: rope_type {kind!r} is not supported; only default, {', '.join(ROPE_KINDS)}")
    # The trained length may stand in two places, and versions of transformers do not agree on which one counts.
    outer, inner = config.get(TRAINED_LENGTH), options.get(TRAINED_LENGTH)
    if kind == "llama3" and outer is not None and outer != inner:
        raise UserError(
            f"{where}: {TRAINED_LENGTH}={outer}, but {inner} in the rotary scaling; remove the one that is wrong"
        )
    return base, f"{kind}:{','.join(f'{float(options[key]):.17g}' for key in ROPE_KINDS[kind])}"


def _read_window(family: str, config: dict[str, Any], where: str) -> int:
    """Returns --sliding_window, which our model has in all layers or in none."""
    layers = int(config["num_hidden_layers"])
    window = int(config.get("sliding_window", 4096) or 0)
    if family == "llama" or (family != "mistral" and not config.get("use_sliding_window")):
        window = 0  # these classes ignore the option
    first = 0 if family == "mistral" else int(config.get("max_window_layers", 28))
    windowed = max(0, layers - first) if window else 0
    if kinds := config.get("layer_types"):
        if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
            raise UserError(f"{where}: layer_types has {min(unknown)}; only full_attention and sliding_attention")
        listed = sum(kind == "sliding_attention" for kind in kinds)
        if listed != windowed and (not window or family == "mistral"):  # transformers' class ignores layer_types here
            raise UserError(f"{where}: sliding_attention for {listed} of layer_types, but the model has {windowed}")
        windowed = listed
    if windowed not in (0, layers):
        raise UserError(f"{where}: a sliding window in {windowed} of {layers} layers; only in all or none")
    return window if windowed else 0


def write_config(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a model with these flags of `ModelConfig`.

    A switch that no class of transformers computes is a UserError.
    """
    return _write_gpt2(flags) if flags["positions"] == "learned" else _write_rotary(flags)


def _needs(flags: dict[str, Any], model_class: str, **wanted: Any) -> None:
    """Checks that the flags have the values that `model_class` of transformers computes."""
    for name, value in wanted.items():
        if flags[name] != value:
            now, then = (int(v) if isinstance(v, bool) else v for v in (flags[name], value))
            raise UserError(
                f"--{name}={now}: transformers' {model_class} has only --{name}={then}; train with that to export"
            )


def _write_gpt2(flags: dict[str, Any]) -> dict[str, Any]:
    model_class = CLASSES["gpt2"] + " (the one for --positions=learned)"
    mlp = flags["mlp"] if flags["mlp"] in GELUS.values() else "gelu"
    _needs(
        flags, model_class, norm="layernorm", mlp=mlp, qk_norm=False, logit_softcap=0.0, sliding_window=0, head_dim=0
    )
    _needs(flags, model_class, embedding_norm=False, n_kv_head=flags["n_head"])
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


def _rotary_family(flags: dict[str, Any]) -> str:
    """Returns the model_type of a model with rotary positions, after a check that its class computes the switches."""
    if flags["mlp"] == "relu2":
        model_class = CLASSES["nanochat"] + " (the one for --mlp=relu2)"
        _needs(flags, model_class, norm="rmsnorm", norm_weight=False, embedding_norm=True, qk_norm=True)
        _needs(flags, model_class, bias=False, qkv_bias=False, sliding_window=0)
        return "nanochat"
    special = [name for name in ("qk_norm", "qkv_bias", "sliding_window") if flags[name]]
    family = {"qk_norm": "qwen3", "qkv_bias": "qwen2", "sliding_window": "mistral"}[special[0]] if special else "llama"
    model_class = CLASSES[family] + (f" (the one for --{special[0]})" if special else "")
    _needs(flags, model_class, norm="rmsnorm", mlp="swiglu", logit_softcap=0.0, embedding_norm=False)
    if family != "llama":
        _needs(flags, model_class, bias=False)
    for name in special[1:]:
        _needs(flags, model_class, **{name: type(flags[name])(0)})
    return family


def _write_rotary(flags: dict[str, Any]) -> dict[str, Any]:
    family = _rotary_family(flags)
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
        "hidden_act": "relu2" if family == "nanochat" else "silu",
        "rms_norm_eps": flags["norm_eps"],
        "rope_theta": flags["rope_base"],
        "attention_dropout": flags["dropout"],
        "tie_word_embeddings": flags["tie_embeddings"],
    }
    if family == "llama":
        config |= {"attention_bias": flags["bias"], "mlp_bias": flags["bias"]}
    if family == "mistral":
        config |= {"sliding_window": flags["sliding_window"]}
    if family == "nanochat":  # without pad_token_id=None, token 1 would be padding, whose embedding is not trained
        config |= {"attention_bias": False, "pad_token_id": None}
        config |= {"final_logit_softcapping": flags["logit_softcap"] or None}
    if flags["rope_scaling"]:
        kind, values = parse_rope_scaling(flags["rope_scaling"])
        options: dict[str, Any] = dict(zip(ROPE_KINDS[kind], values, strict=True))
        if kind == "llama3":
            options[TRAINED_LENGTH] = int(options[TRAINED_LENGTH])
        config["rope_scaling"] = {"rope_type": kind, **options}
    return config
