"""The matrices of a block that can have LoRA adapters, and their names in --lora_targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from util.errors import UserError, quote

if TYPE_CHECKING:
    from cfg.flags import ModelConfig

LORA_MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the matrices of a block
# Value of --lora_targets → modules.
LORA_TARGETS = {
    "all": LORA_MODULES,
    "attn": LORA_MODULES[:2],
    "mlp": LORA_MODULES[2:],
    "c_attn": LORA_MODULES[:1],
    "c_fc": LORA_MODULES[2:3],
    **{name: (name,) for name in LORA_MODULES},
}
# Module names in other libraries → the module here that contains that matrix.
PARTS_OF_MODULES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv_proj"), "c_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "c_fc"),
    "o_proj": "attn.c_proj",
    "down_proj": "mlp.c_proj",
    "w2": "mlp.c_proj",
}
NOT_IN_BLOCKS = ("embed_tokens", "lm_head", "wte", "wpe")


def parse_lora_targets(text: str) -> tuple[str, ...]:
    """Returns the modules of a block that --lora_targets names, in the order of LORA_MODULES."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word in LORA_TARGETS:
            continue
        if module := PARTS_OF_MODULES.get(word):
            hint = f"{word} is a part of {module}, which has one adapter; use {module}"
        elif word in NOT_IN_BLOCKS:
            hint = "embeddings and the head have no adapters; train them in full with --lora_embeddings=1"
        elif word == "c_proj":
            hint = "give attn.c_proj or mlp.c_proj, or both"
        else:
            hint = "give all, or a comma-separated list of attn, mlp, c_attn, attn.c_proj, c_fc and mlp.c_proj"
        raise UserError(f"--lora_targets={quote(text)}: {quote(word) or 'a name'} is not a matrix of a block; {hint}")
    chosen = {module for word in words for module in LORA_TARGETS[word]}
    return tuple(module for module in LORA_MODULES if module in chosen)


def module_sizes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the number of inputs and outputs of each matrix of a block."""
    heads, wide = c.n_head * c.head_size, (2 if c.mlp == "swiglu" else 1) * c.mlp_hidden
    return {
        "attn.c_attn": (c.n_embd, heads + 2 * c.n_kv_head * c.head_size),
        "attn.c_proj": (heads, c.n_embd),
        "mlp.c_fc": (c.n_embd, wide),
        "mlp.c_proj": (c.mlp_hidden, c.n_embd),
    }
