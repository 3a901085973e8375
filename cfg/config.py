"""Every flag of train_gpt.py, once: its type, range, default and help.

`load_config` reads a preset (`--cfg`) and the command line, checks each value and how the values
fit together, and returns one frozen `Config`. Mistakes are `UserError`s of one line. Nothing here
imports torch, so that `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from cfg import hf
from cfg.checks import PATH_FLAGS, check_model, check_paths, check_run
from cfg.origin import FREE, Origin, open_origin
from cfg.yaml_text import read_yaml
from util.errors import CommandParser, UserError, closest, quote
from util.launcher import launched_world_size

PRESETS = Path(__file__).resolve().parent


# More than anybody means. What is computed from such numbers would be endless, or more than 64 bits hold.
MOST = hf.MOST | {"sequence_length": 2**24, "vocab_pad": 2**24, "mlp_hidden": 2**27, "seed": 2**63 - 1}
MOST_OF_OTHERS = 10**12


class Flags(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _means_what_it_says(cls, value: Any, info: ValidationInfo) -> Any:
        """Not `true` for 1, which pydantic would take. But 2.0 for 2, as other programs write it."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind in (int, float):
            raise PydanticCustomError("truth", "input should be a number, not true or false")
        return value

    @field_validator("*")
    @classmethod
    def _is_not_endless(cls, value: Any, info: ValidationInfo) -> Any:
        most = MOST.get(info.field_name or "", MOST_OF_OTHERS)
        if isinstance(value, int) and value > most:
            raise PydanticCustomError("endless", "input should be less than or equal to {most}", {"most": most})
        return value


class ModelConfig(Flags):
    """Model: the default is GPT-2 124M"""

    n_layer: int = Field(12, ge=1, description="transformer blocks")
    n_head: int = Field(12, ge=1, description="query heads per block")
    n_kv_head: int = Field(0, ge=0, description="key/value heads (grouped-query attention); 0: n_head")
    n_embd: int = Field(768, ge=1, description="width of the residual stream")
    head_dim: int = Field(0, ge=0, description="width of a head; 0: n_embd/n_head")
    vocab_size: int = Field(50257, ge=2, description="true vocabulary; ids at or above it are refused")
    vocab_pad: int = Field(
        64, ge=1, description="pad the embedding rows to a multiple of this; padding is never predicted"
    )
    n_positions: int = Field(0, ge=0, description="positions seen at once, rows of a learned table; 0: sequence_length")
    positions: Literal["learned", "rotary"] = Field("learned", description="position encoding")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies")
    rope_scaling: str = Field(
        "",
        description="stretch rotary positions: linear:FACTOR, or llama3:FACTOR,LOW,HIGH,POSITIONS; empty: no",
    )
    sliding_window: int = Field(0, ge=0, description="tokens that one attends to, itself included; 0: all before it")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the normalisation")
    mlp: Literal["gelu", "gelu_exact", "swiglu", "relu2"] = Field(
        "gelu", description="feed-forward: tanh-GELU (GPT-2), exact GELU (nanoGPT), SwiGLU or ReLU squared"
    )
    mlp_hidden: int = Field(
        0, ge=0, description="feed-forward width; 0: 4*n_embd, for swiglu 8/3*n_embd rounded up to 64"
    )
    bias: bool = Field(True, description="biases in linear layers and LayerNorm")
    qkv_bias: bool = Field(False, description="biases of query, key and value also with --bias=0")
    tie_embeddings: bool = Field(True, description="the output head shares the token embedding")
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head")
    logit_softcap: float = Field(0.0, ge=0, description="logits become c*tanh(logits/c); 0: off")
    zero_init: bool = Field(False, description="output projections of attention and MLP start at zero")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability, also on attention weights")
    flash: bool = Field(True, description="1: scaled_dot_product_attention; 0: plain masked softmax, the same numbers")

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.n_embd // self.n_head


class InitConfig(Flags):
    """Initial weights: random, or somebody's (docs/huggingface.md)"""

    init_from: str = Field(
        "scratch",
        min_length=1,
        description="scratch; hf:FOLDER_OR_NAME, nanogpt:FILE, llmc:FILE, llama2c:FILE, or a run or checkpoint of ours:"
        " its weights and the model's flags",
    )
    resize_embeddings: bool = Field(
        False,
        description="with --init_from: turn its embeddings into those of another --tokenizer",
    )


class DataConfig(Flags):
    """Data"""

    input_train_bin: str = Field(
        "data/tinyshakespeare/*_train.bin",
        min_length=1,
        description="glob of the training shards, or several to mix by weight: web=0.7:GLOB,code=0.3:GLOB",
    )
    input_val_bin: str = Field("", description="glob of the validation shards; empty: no validation")
    tokenizer: str = Field(
        "gpt2",
        min_length=1,
        description="the shards' tokenizer, for samples and bits per byte: gpt2, gpt2-fim, cl100k_base, o200k_base,"
        " the path of a tokenizer.json, of its folder or of a llama2.c tokenizer.bin, hf:NAME; none: unknown",
    )
    shuffle: bool = Field(True, description="draw windows in a seeded random order, new each epoch; 0: file order")
    check_data: bool = Field(False, description="check every token id at start, not a sample of them")
    doc_mask: bool = Field(False, description="attend only within a document, and count positions from its start")


class BatchConfig(Flags):
    """Run length and batch"""

    num_iterations: int = Field(1000, ge=1, description="optimizer steps in the whole run")
    sequence_length: int = Field(1024, ge=1, description="tokens per sequence")
    batch_size: int = Field(
        4,
        ge=0,
        description="sequences per rank per micro-step; 0: the largest power of two, at most 64 (4 on a CPU), that fits"
        " the GPU and divides a rank's sequences per step",
    )
    total_batch_size: int = Field(
        0, ge=0, description="tokens per optimizer step over all ranks; 0: batch_size*sequence_length*ranks"
    )
    overfit_single_batch: bool = Field(False, description="train on the first batch only (sanity check)")
    max_minutes: float = Field(0.0, ge=0, description="save and stop after this many minutes; 0: no limit")
    seed: int = Field(1337, ge=0, lt=2**63, description="seed of weights, sample order and dropout")


class OptimizerConfig(Flags):
    """Optimizer and learning rate"""

    optimizer: Literal["adamw"] = Field("adamw", description="optimizer")
    learning_rate: float = Field(6e-4, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape of the learning rate after warm-up"
    )
    warmup_iters: int = Field(0, ge=0, description="steps of linear warm-up")
    learning_rate_decay_frac: float = Field(
        0.1, ge=0, le=1, description="final learning rate as a fraction of the peak"
    )
    cooldown_frac: float = Field(
        0.2, gt=0, le=1, description="wsd: the last fraction of the run, over which the rate falls linearly"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay, on weights of two or more dimensions")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second-moment decay")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    grad_clip: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0: off")
    skip_spikes: float = Field(
        0.0,
        ge=0,
        description="do not take a step whose norm is so many standard deviations above the mean of 128; 0: off",
    )
    rollback_after: int = Field(
        5,
        ge=0,
        description="steps not taken in a row, for spikes or NaN, until the run goes back a checkpoint; 0: never",
    )
    max_rollbacks: int = Field(
        3, ge=0, description="how often to go back to the same checkpoint, past the data since, before it ends diverged"
    )


class ComputeConfig(Flags):
    """Device and precision"""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="compute dtype; weights stay float32"
    )
    tensorcores: bool = Field(False, description="TF32 for float32 matrix products on CUDA")
    deterministic: bool = Field(False, description="only kernels that repeat bit for bit; costs some speed on CUDA")
    residual_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the residual stream in training; bfloat16 is faster and less precise"
    )
    compile: bool | Literal["model"] = Field(
        False,
        description="torch.compile each block and the loss; model: all before the loss as one graph (stages 0 and 1)",
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_is_a_choice(cls, value: Any) -> Any:
        """Takes "model" and what other booleans take; raises one error where pydantic would raise one per type."""
        if str(value).lower() == "model":
            return "model"
        try:
            return TypeAdapter(bool).validate_python(value)
        except ValidationError:
            raise PydanticCustomError("compile", "input should be 0, 1 or model") from None


class ParallelConfig(Flags):
    """Strategy: the same numbers, another division of memory and communication (docs/parallel.md)"""

    zero_stage: int = Field(
        0,
        ge=0,
        le=3,
        description="0: DDP or one process; 1: optimizer states sharded; 2: gradients too; 3: parameters too",
    )
    replicas: int = Field(1, ge=1, description="stages 2, 3: shard over ranks/replicas, replicate over the rest (HSDP)")
    sync_every_microbatch: bool = Field(
        False, description="stages 2, 3: reduce gradients after each micro-step: less memory, more communication"
    )
    cpu_offload: bool = Field(
        False, description="stages 2, 3: sharded parameters, gradients and optimizer in host memory"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = Field(
        "none",
        description="recompute in backward: nothing, each block, or all but its matrix products and attention",
    )
    start_timeout_minutes: float = Field(
        30.0, gt=0, le=1e5, description="longest wait for another rank until the first step is done, and while saving"
    )
    step_timeout_minutes: float = Field(
        10.0, gt=0, le=1e5, description="longest time without progress in training, such as a micro-step"
    )


class EvalConfig(Flags):
    """Evaluation and samples"""

    val_loss_every: int = Field(250, ge=0, description="steps between validations; 0: only at the end")
    val_max_steps: int = Field(20, ge=1, description="validation batches of total_batch_size tokens, fixed for the run")
    sample_every: int = Field(0, ge=0, description="steps between samples; 0: none")
    sample_tokens: int = Field(64, ge=1, description="tokens per sample")
    sample_prompt: str = Field("", description="text that a sample continues; empty: a new document")
    hellaswag_every: int = Field(0, ge=0, description="steps between HellaSwag evaluations; 0: none")
    hellaswag_limit: int = Field(0, ge=0, description="the first so many of its examples; 0: all 10,042")
    hellaswag_data: str = Field("", description="a copy of hellaswag_val.jsonl; empty: fetched if need be")


class CheckpointConfig(Flags):
    """Checkpoints and resume"""

    output_dir: str = Field("outdir", min_length=1, description="everything the run writes")
    save_every_niter: int = Field(
        1000, ge=0, description="steps between checkpoints; 0: only at the end and when stopped"
    )
    keep_last: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="also keep every checkpoint whose step is a multiple of this; 0: none")
    resume: str = Field(
        "auto", min_length=1, description="auto: go on from output_dir; never: refuse to; or a checkpoint's PATH"
    )
    async_save: Literal["auto", "0", "1"] = Field(
        "auto", description="write checkpoints in the background, from a copy in host memory; auto: on GPUs"
    )


class LogConfig(Flags):
    """Logging"""

    log_every: int = Field(10, ge=1, description="steps between console lines (metrics.jsonl has every step)")
    wandb_project_id: str = Field("", description="Weights & Biases project; empty: off; without a key: offline")
    wandb_log_iters: int = Field(1, ge=1, description="steps between Weights & Biases records")
    tensorboard: bool = Field(False, description="write TensorBoard events to output_dir/logs")
    record_memory: bool = Field(
        False, description="CUDA: note where in the code memory is taken, for the snapshot written when it runs out"
    )


class Config(
    ModelConfig,
    InitConfig,
    DataConfig,
    BatchConfig,
    OptimizerConfig,
    ComputeConfig,
    ParallelConfig,
    EvalConfig,
    CheckpointConfig,
    LogConfig,
):
    """All flags of a run. `cfg` names the preset that was read, if any."""

    cfg: str = Field("", description="preset name (a file in cfg/) or path to a YAML file; flags win over it")


GROUPS: tuple[type[Flags], ...] = Config.__bases__  # as --help and docs/flags.md show them


def type_name(field: FieldInfo) -> str:
    if isinstance(field.default, bool):
        return "0|1|model" if get_args(field.annotation) else "0|1"
    if get_origin(field.annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(field.annotation))
    return {str: "TEXT", int: "INT", float: "FLOAT"}[field.annotation]  # type: ignore[index]


def shown_default(field: FieldInfo) -> str:
    value = int(field.default) if isinstance(field.default, bool) else field.default
    return "''" if value == "" else str(value)


def _help_line(field: FieldInfo) -> str:
    return f"{field.description} (default {shown_default(field)})".replace("%", "%%")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="train_gpt.py",
        usage="train_gpt.py [--flag=value ...]",
        description="Train a GPT. Flags take --flag=value or --flag value; booleans take 0/1/true/false.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--cfg", metavar="NAME", help=_help_line(Config.model_fields["cfg"]))
    for group in GROUPS:
        section = parser.add_argument_group((group.__doc__ or "").strip())
        for name, field in group.model_fields.items():
            options: dict[str, Any] = {"metavar": type_name(field), "help": _help_line(field)}
            if isinstance(field.default, bool):
                options |= {"nargs": "?", "const": "1"}
            section.add_argument(f"--{name}", **options)
    return parser


def _read_preset(name: str) -> dict[str, Any]:
    """Reads cfg/NAME.yaml, or NAME itself if it is a path."""
    name = os.path.expanduser(name)
    path = Path(name) if name.endswith((".yaml", ".yml")) or os.sep in name else PRESETS / f"{name}.yaml"
    if not os.path.isfile(path):
        known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        near = closest(name, known)
        hint = f"did you mean {near}?" if near else f"presets are {', '.join(known)}"
        raise UserError(f"--cfg={quote(name)}: no such preset or file; {hint}")
    try:
        values = read_yaml(path, depth=1)
    except (ValueError, OSError) as e:
        what = getattr(e, "strerror", None) or e
        raise UserError(f"--cfg={name}: {path}: {what}; a preset is lines of `flag: value`") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--cfg={name}: {path} must hold `flag: value` lines")
    for key in values:
        if key not in Config.model_fields:
            what = quote(key)
            raise UserError(f"--cfg={name}: unknown flag {what!r} in {path}{_did_you_mean(what)}")
    return values


def _did_you_mean(name: str) -> str:
    near = closest(name, Config.model_fields)
    return f"; did you mean {near}?" if near else "; see --help for all flags"


def _validate(values: dict[str, Any]) -> Config:
    try:
        return Config(**values)
    except ValidationError as e:
        lines = []
        for error in e.errors():
            name = str(error["loc"][0])
            message = error["msg"][0].lower() + error["msg"][1:]
            lines.append(f"--{name}={quote(error['input'])}: {message}")
        raise UserError("; ".join(lines)) from e


def resolve(config: Config, world_size: int) -> Config:
    """Replaces the zeros that mean "derive it" and checks how the flags fit together."""
    c = config
    check_paths(c)
    hidden = 64 * -(-8 * c.n_embd // (3 * 64)) if c.mlp == "swiglu" else 4 * c.n_embd
    c = c.model_copy(
        update={
            "n_kv_head": c.n_kv_head or c.n_head,
            "n_positions": c.n_positions or c.sequence_length,
            "mlp_hidden": c.mlp_hidden or hidden,
            **{name: os.path.expanduser(getattr(c, name)) for name in PATH_FLAGS},
            "total_batch_size": c.total_batch_size or c.batch_size * c.sequence_length * world_size,
        }
    )
    check_model(c)
    check_run(c, world_size)
    return c


def load_config(argv: list[str] | None = None, world_size: int | None = None) -> Config:
    """Parses a command line (default: sys.argv) into a checked Config.

    `world_size` defaults to what torchrun put into the environment. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    known, rest = _parser().parse_known_args(argv)
    if rest:
        name = rest[0].split("=")[0]
        what = "flag" if name.startswith("-") else "argument"
        raise UserError(f"unknown {what} {quote(name)}{_did_you_mean(name.lstrip('-').replace('-', '_'))}")
    flags = vars(known)
    values = (_read_preset(flags["cfg"]) if flags.get("cfg") else {}) | flags
    world_size = launched_world_size() if world_size is None else world_size
    if (source := str(values.get("init_from", "scratch"))) == "scratch":
        return resolve(_validate(values), world_size)
    origin = open_origin(source)
    if "tokenizer" not in flags and values.get("tokenizer", "none") == "none":
        values["tokenizer"] = origin.tokenizer
    config = resolve(_with_shape(origin, values), world_size)
    _check_origin(config, origin, values)
    return config


def _with_shape(origin: Origin, values: dict[str, Any]) -> Config:
    """The flags that come with a model, and those given; its context is no shorter than what it is trained on."""
    shape = {k: v for k, v in origin.flags.items() if k in ModelConfig.model_fields and k not in ("dropout", "flash")}
    config = _validate(shape | values)
    if not config.n_positions:
        raise UserError("--init_from: says n_positions=0 of its model; damaged, or not one that was trained")
    length = config.sequence_length if "sequence_length" in values else min(config.sequence_length, config.n_positions)
    rotary = config.positions == "rotary" and "n_positions" not in values
    positions = max(config.n_positions, length) if rotary else config.n_positions
    return config.model_copy(update={"sequence_length": length, "n_positions": positions})


def _check_origin(config: Config, origin: Origin, values: dict[str, Any]) -> None:
    """Raises UserError if flags were given that make another model than the weights are of."""
    free = FREE | ({"n_positions"} if config.positions == "rotary" else set())
    free |= {"vocab_size"} if config.resize_embeddings else set()
    if origin.kind == "nanogpt" and config.mlp in ("gelu", "gelu_exact"):
        free |= {"mlp"}  # which of the two, the file does not tell
    given = origin.flags.keys() & values.keys() & ModelConfig.model_fields.keys()
    for name in sorted(given - free):
        if (value := getattr(config, name)) != origin.flags[name]:
            preset = f", or --cfg={values['cfg']} if it sets it" if values.get("cfg") else ""
            resize = "; or resize it with --resize_embeddings=1"
            way_out = resize if name == "vocab_size" else f"; leave the flag out{preset}"
            raise UserError(f"--{name}={value}, but the model of --init_from has {origin.flags[name]}{way_out}")
    if config.resize_embeddings and "vocab_size" not in values:
        raise UserError("--resize_embeddings=1: give the --vocab_size of the --tokenizer to change to")
    if config.resize_embeddings and "none" in (origin.tokenizer, config.tokenizer):
        whose = "the model of --init_from brings no tokenizer" if origin.tokenizer == "none" else "--tokenizer=none"
        raise UserError(f"--resize_embeddings=1 must know both tokenizers, but {whose}")


def to_yaml(config: Config) -> str:
    """The resolved flags as a preset that `--cfg=PATH` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
