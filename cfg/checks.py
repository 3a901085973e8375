"""Checks between flags. The ranges of single flags are in cfg/flags.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cfg.flags import LoraConfig
from cfg.lora import module_sizes, parse_lora_targets
from util.errors import UserError, quote

if TYPE_CHECKING:
    from cfg.flags import Config, ModelConfig

# Flags in which a leading ~ means the home directory.
PATH_FLAGS = ("input_train_bin", "input_val_bin", "output_dir", "resume", "tokenizer", "hellaswag_data", "lora_init")
MUON_RATES = ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")


def check_model(c: ModelConfig) -> None:
    """Checks that the sizes of a model fit together. Zeros that mean "derive it" must have been replaced."""
    for name in ("n_kv_head", "n_positions", "mlp_hidden"):
        if not getattr(c, name):
            raise UserError(f"--{name}=0: a trained model has at least 1; the file is damaged")
    pair = 2 if c.positions == "rotary" else 1  # rotary positions rotate pairs of dimensions
    unit = c.n_head * pair
    if c.head_dim % pair:
        raise UserError(f"--head_dim={c.head_dim} must be even: --positions=rotary rotates pairs of dimensions")
    if c.n_embd % unit and not c.head_dim:
        multiple = f"--n_head={c.n_head}" + (" times two (--positions=rotary rotates pairs)" if unit > c.n_head else "")
        raise UserError(f"--n_embd={c.n_embd} must be a multiple of {multiple}; nearest: {_multiples(c.n_embd, unit)}")
    if c.n_head % c.n_kv_head:
        divisors = [d for d in range(1, c.n_head + 1) if c.n_head % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - c.n_kv_head))
        raise UserError(f"--n_kv_head={c.n_kv_head} must divide --n_head={c.n_head}; nearest: {nearest}")
    parse_rope_scaling(c.rope_scaling)
    if c.rope_scaling and c.positions != "rotary":
        raise UserError(f"--rope_scaling={quote(c.rope_scaling)} needs --positions=rotary")


def parse_rope_scaling(text: str) -> tuple[str, list[float]]:
    """Returns the kind and the numbers of --rope_scaling, ("", []) for an empty text."""
    counts = {"linear": 1, "llama3": 4}
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(n) for n in rest.split(",")] if text else []
    except ValueError:
        numbers = []
    if text and (len(numbers) != counts.get(kind) or not all(0 < n < float("inf") for n in numbers)):
        raise UserError(f"--rope_scaling={quote(text)}: give linear:FACTOR or llama3:FACTOR,LOW,HIGH,POSITIONS")
    if kind == "llama3" and not numbers[1] < numbers[2]:
        raise UserError(f"--rope_scaling={quote(text)}: LOW must be below HIGH")
    return kind, numbers


def check_run(c: Config, world_size: int) -> None:
    """Checks the flags of a run that depend on each other or on the number of ranks."""
    if c.sequence_length > c.n_positions:
        way_out = "raise --n_positions" + (" or use --positions=rotary" if c.positions == "learned" else "")
        if c.positions == "learned" and c.init_from != "scratch":
            way_out = "the position table of the --init_from model has no more; lower it"
        raise UserError(f"--sequence_length={c.sequence_length} exceeds --n_positions={c.n_positions}; {way_out}")
    if c.doc_mask and c.tokenizer == "none":
        raise UserError("--doc_mask=1 needs the end-of-text token; give the --tokenizer of the shards")
    if c.resize_embeddings and c.init_from == "scratch":
        raise UserError("--resize_embeddings=1 needs a pretrained model; give --init_from")
    check_lora(c)
    if c.head_init == "zero" and c.tie_embeddings and c.init_from == "scratch":
        raise UserError("--head_init=zero: the head is the token embedding; add --tie_embeddings=0")
    if c.hellaswag_every and c.tokenizer == "none":
        raise UserError("--hellaswag_every encodes text; give the --tokenizer of the shards")
    if c.replicas > 1 and c.zero_stage < 2:
        raise UserError(f"--replicas={c.replicas} needs --zero_stage=2 or 3; in lower stages every rank is a replica")
    if world_size % c.replicas:
        raise UserError(f"--replicas={c.replicas} must divide the number of ranks, {world_size}")
    if c.cpu_offload and c.zero_stage < 2:
        raise UserError("--cpu_offload=1 needs --zero_stage=2 or 3 (also on one GPU)")
    if c.compile == "model" and c.zero_stage >= 2:
        raise UserError(f"--compile=model does not work with --zero_stage={c.zero_stage}, which compiles blocks; use 1")
    if c.residual_dtype == "bfloat16" and c.dtype != "bfloat16":
        raise UserError(f"--residual_dtype=bfloat16: needs --dtype=bfloat16, not {c.dtype}; change one of them")
    if not c.batch_size and not c.flash:
        raise UserError(
            "--batch_size=0: the memory plan does not include the T × T scores of --flash=0; give a --batch_size"
        )
    if not c.total_batch_size:  # only with --batch_size=0: otherwise it has been derived
        raise UserError("--batch_size=0: needs --total_batch_size (in tokens), which it divides into micro-steps")
    rows = c.batch_size or 1
    micro = rows * c.sequence_length * world_size
    if c.total_batch_size % micro:
        raise UserError(
            f"--total_batch_size={c.total_batch_size} must be a multiple of batch_size × sequence_length × ranks"
            f" = {rows} × {c.sequence_length} × {world_size} = {micro};"
            f"{_smaller_batch(c, world_size)} nearest: {_multiples(c.total_batch_size, micro)}"
        )


def check_lora(c: Config) -> None:
    """Checks the flags of LoRA."""
    if not c.lora_rank:
        for name, field in LoraConfig.model_fields.items():
            if (value := getattr(c, name)) != field.default:
                shown = int(value) if isinstance(value, bool) else value
                raise UserError(f"--{name}={quote(shown)}: has no effect without adapters; give --lora_rank")
        return
    if c.optimizer == "muon":
        raise UserError("--optimizer=muon: does not train the adapters of --lora_rank; use --optimizer=adamw")
    sizes = module_sizes(c)
    for module in parse_lora_targets(c.lora_targets):
        if c.lora_rank > (side := min(sizes[module])):
            raise UserError(
                f"--lora_rank={c.lora_rank}: {module} has a side of {side}, and a rank above it adds nothing;"
                f" use at most {side}"
            )


def check_rates(c: Config, flags: Iterable[str]) -> None:
    """Raises UserError if one of the `flags` of a command line is a learning rate that has no effect."""
    if unused := unused_rates(c).intersection(flags):
        raise UserError(unused_rate_message(c, min(unused)))


def unused_rates(c: Config) -> set[str]:
    """Returns the flags of the learning rates that have no effect."""
    if c.optimizer != "muon":
        return set(MUON_RATES)
    has_vectors = c.bias or c.qkv_bias or c.norm_weight
    return {"learning_rate"} | ({"head_lr"} if c.tie_embeddings else set()) | (set() if has_vectors else {"scalar_lr"})


def unused_rate_message(c: Config, name: str) -> str:
    """Returns the message that a learning rate has no effect: why, and what to use instead."""
    text = f"--{name}={getattr(c, name)}: has no effect "
    if name == "learning_rate":
        return f"{text}with --optimizer=muon; use {', '.join(f'--{rate}' for rate in MUON_RATES)}"
    if c.optimizer != "muon":
        return f"{text}with --optimizer={c.optimizer}; use --learning_rate, or add --optimizer=muon"
    if name == "head_lr":
        return f"{text}with --tie_embeddings=1; --embedding_lr is the rate of a tied head"
    return f"{text}on a model without biases and norm weights; leave it out"


def _smaller_batch(c: Config, world_size: int) -> str:
    """Returns advice to lower --batch_size to one that divides the total batch, or "" if there is none."""
    rows, rest = divmod(c.total_batch_size, c.sequence_length * world_size)
    if rest or not c.batch_size or not rows:
        return ""
    return f" lower --batch_size to {largest_divisor(rows, c.batch_size)}, or choose the"


def largest_divisor(n: int, most: int) -> int:
    """Returns the largest divisor of `n` that is at most `most`, and at most 4096: no micro-batch is larger."""
    return next(d for d in range(min(n, most, 4096), 0, -1) if n % d == 0)


def _multiples(value: int, of: int) -> str:
    """Returns the multiples of `of` just below and above `value`, as text."""
    below, above = value // of * of, -(-value // of) * of
    return f"{below} or {above}" if below else str(above)
