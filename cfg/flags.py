"""Every flag of train_gpt.py, once: its type, range, default and help.

cfg/checks.py has the checks between flags, cfg/config.py reads the command line.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from util.values import parse_count

# Marks a flag of ModelConfig that changes training but not the function that the trained weights compute.
TRAINING_ONLY: dict[str, Any] = {"training_only": True}
DEFAULT_OUTPUT_DIR = "outdir/run-NAME"  # cfg.config.default_output_dir fills in the name


class Flags(BaseModel):
    """A group of flags. Upper limits (le) keep a typo from allocating without bound or overflowing int64."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads counts such as 0.5M. Refuses true and false for a number: pydantic would take them for 1 and 0."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind in (int, float):
            raise PydanticCustomError("boolean", "input should be a number, not true or false")
        if isinstance(value, str) and kind is int:
            with suppress(ValueError):  # pydantic has the message
                return parse_count(value)
        return value


class ModelConfig(Flags):
    """Model: the default is GPT-2 124M"""

    n_layer: int = Field(12, ge=1, le=10_000, description="transformer blocks")
    n_head: int = Field(12, ge=1, le=2**16, description="query heads per block")
    n_kv_head: int = Field(0, ge=0, le=2**16, description="key/value heads (grouped-query attention); 0: n_head")
    n_embd: int = Field(768, ge=1, le=2**24, description="width of the residual stream")
    head_dim: int = Field(0, ge=0, le=2**16, description="width of a head; 0: n_embd/n_head")
    vocab_size: int = Field(50257, ge=2, le=2**24, description="number of token ids; if not given, that of --tokenizer")
    vocab_pad: int = Field(
        64, ge=1, le=2**24, description="pad the embedding to a multiple of this many rows; padding is never predicted"
    )
    n_positions: int = Field(
        0, ge=0, le=2**24, description="context length, rows of a learned position table; 0: sequence_length"
    )
    positions: Literal["learned", "rotary"] = Field("learned", description="position encoding")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary frequencies")
    rope_scaling: str = Field(
        "",
        description="scaling of rotary positions: linear:FACTOR, or llama3:FACTOR,LOW,HIGH,POSITIONS; empty: none",
    )
    sliding_window: int = Field(
        0, ge=0, le=2**24, description="tokens that a token attends to, itself included; 0: all earlier ones"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the normalisation")
    norm_weight: bool = Field(
        True, description="norms have learned weights; 0: no parameters in any norm, as in nanochat (Karpathy 2025)"
    )
    embedding_norm: bool = Field(
        False, description="normalise the token embedding, as in BLOOM (Le Scao et al. 2022) and nanochat"
    )
    mlp: Literal["gelu", "gelu_exact", "swiglu", "relu2"] = Field(
        "gelu", description="feed-forward: tanh-GELU (GPT-2), exact GELU (nanoGPT), SwiGLU or ReLU squared"
    )
    mlp_hidden: int = Field(
        0, ge=0, le=2**27, description="feed-forward width; 0: 4*n_embd, for swiglu 8/3*n_embd rounded up to 64"
    )
    bias: bool = Field(True, description="biases in linear layers and LayerNorm")
    qkv_bias: bool = Field(False, description="biases of query, key and value, also with --bias=0")
    tie_embeddings: bool = Field(True, description="the output head shares the token embedding")
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head")
    logit_softcap: float = Field(0.0, ge=0, description="c in c*tanh(logits/c), which bounds the logits; 0: off")
    embedding_std: float = Field(
        0.02,
        gt=0,
        json_schema_extra=TRAINING_ONLY,
        description="standard deviation of the initial token embedding: GPT-2 has 0.02, nanochat 1",
    )
    head_init: Literal["normal", "zero"] = Field(
        "normal",
        json_schema_extra=TRAINING_ONLY,
        description="initial output head, if untied; zero: the first predictions are uniform (modded-nanogpt,"
        " Jordan et al. 2024)",
    )
    zero_init: bool = Field(
        False, json_schema_extra=TRAINING_ONLY, description="output projections of attention and MLP start at zero"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, json_schema_extra=TRAINING_ONLY, description="dropout probability, also on attention weights"
    )
    flash: bool = Field(
        True,
        json_schema_extra=TRAINING_ONLY,
        description="1: scaled_dot_product_attention; 0: masked softmax written out, equal up to rounding",
    )

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.n_embd // self.n_head


class InitConfig(Flags):
    """Initial weights: random or pretrained (docs/huggingface.md)"""

    init_from: str = Field(
        "scratch",
        min_length=1,
        description="scratch; hf:FOLDER_OR_NAME, peft:FOLDER_OR_NAME (an adapter, merged), nanogpt:FILE, llmc:FILE,"
        " llama2c:FILE, or a run or checkpoint of rawgpt: its weights and the flags of its model",
    )
    resize_embeddings: bool = Field(
        False,
        description="with --init_from: convert its embeddings to another --tokenizer",
    )


class LoraConfig(Flags):
    """LoRA: train small adapters and leave the pretrained weights as they are (docs/finetuning.md)"""

    lora_rank: int = Field(0, ge=0, le=2**16, description="rank of the adapters; 0: no LoRA, all weights are trained")
    lora_alpha: float = Field(32.0, gt=0, description="the adapters' output is multiplied by lora_alpha/lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability on the input of the adapters")
    lora_targets: str = Field(
        "all",
        description="matrices with an adapter: all, attn, mlp, or a comma-separated list of attn, mlp, c_attn,"
        " attn.c_proj, c_fc, mlp.c_proj",
    )
    lora_embeddings: bool = Field(
        False, description="also train token embedding, position table and untied head, for new special tokens"
    )
    lora_init: str = Field("", description="folder of a PEFT adapter from which the adapters start; empty: new ones")
    base_dtype: Literal["float32", "bfloat16"] = Field("float32", description="LoRA: dtype of the frozen weights")


class DataConfig(Flags):
    """Data"""

    input_train_bin: str = Field(
        "data/tinyshakespeare/*_train.bin",
        description="glob or folder of the training shards, or a weighted mix: web=0.7:GLOB,code=0.3:GLOB",
    )
    input_val_bin: str = Field("", description="glob or folder of the validation shards; empty: no validation")
    tokenizer: str = Field(
        "gpt2",
        min_length=1,
        description="the shards' tokenizer, for samples and bits per byte: gpt2, gpt2-fim, cl100k_base, o200k_base,"
        " bytes, the path of a tokenizer.json, of its folder or of a llama2.c tokenizer.bin, hf:NAME; none: unknown",
    )
    shuffle: bool = Field(True, description="draw windows in a seeded random order, new each epoch; 0: file order")
    check_data: bool = Field(False, description="check every token id at the start, not only a sample")
    doc_mask: bool = Field(False, description="attend only within a document and count positions from its start")


class BatchConfig(Flags):
    """Run length and batch"""

    num_iterations: int = Field(1000, ge=1, description="optimizer steps in the whole run")
    num_epochs: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="epochs to train for (may be a fraction), instead of --num_iterations; 0: off",
    )
    sequence_length: int = Field(1024, ge=1, le=2**24, description="tokens per sequence")
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

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer; muon: Muon for the hidden matrices, AdamW for the rest"
    )
    learning_rate: float = Field(6e-4, gt=0, description="peak learning rate with --optimizer=adamw")
    matrix_lr: float = Field(0.02, gt=0, description="muon: peak learning rate of the hidden matrices")
    embedding_lr: float = Field(
        0.3,
        gt=0,
        description="muon: peak learning rate of the token embedding and of a tied head, as a multiple of"
        " --embedding_std; of learned positions, as a multiple of 0.02",
    )
    head_lr: float = Field(0.004, gt=0, description="muon: peak learning rate of an untied output head")
    scalar_lr: float = Field(0.015, gt=0, description="muon: peak learning rate of biases and norm weights")
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
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="adamw: decay of weights with two or more dimensions; muon: cautious decay of the hidden"
        " matrices, falling linearly to 0",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay; muon: not of the hidden matrices")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second-moment decay; muon: also of the row variances")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    grad_clip: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0: off")
    skip_spikes: float = Field(
        0.0,
        ge=0,
        description="skip a step whose gradient norm is so many standard deviations above the mean of 128; 0: off",
    )
    rollback_after: int = Field(
        5,
        ge=0,
        description="consecutive skipped steps (spikes or NaN) before the run rolls back to a checkpoint; 0: never",
    )
    max_rollbacks: int = Field(
        3, ge=0, description="roll-backs to one checkpoint, each with later data, before the run ends as diverged"
    )


class ComputeConfig(Flags):
    """Device and precision"""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="compute dtype; weights stay float32"
    )
    tensorcores: bool = Field(False, description="TF32 for float32 matrix products on CUDA")
    deterministic: bool = Field(False, description="use only bit-reproducible kernels; costs some speed on CUDA")
    residual_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the residual stream in training; bfloat16 is faster and less precise"
    )
    compile: bool | Literal["model"] = Field(
        False,
        description="torch.compile each block and the loss; model: the whole model as one graph (stages 0 and 1)",
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_is_a_choice(cls, value: Any) -> Any:
        """Accepts "model" or a boolean, with one error message instead of pydantic's message for each type."""
        if str(value).lower() == "model":
            return "model"
        try:
            return TypeAdapter(bool).validate_python(value)
        except ValidationError:
            raise PydanticCustomError("compile", "input should be 0, 1 or model") from None


class ParallelConfig(Flags):
    """Strategy: divides memory and communication among ranks, and does not change the numbers (docs/parallel.md)"""

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
        False, description="stages 2, 3: keep sharded parameters, gradients and optimizer states in host memory"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = Field(
        "none",
        description="recompute in the backward pass: nothing, each block, or all but matrix products and attention",
    )
    start_timeout_minutes: float = Field(
        30.0,
        gt=0,
        le=1e5,
        description="longest wait for another rank before the end of the first step and while saving",
    )
    step_timeout_minutes: float = Field(
        10.0, gt=0, le=1e5, description="longest time for one unit of progress in training, such as a micro-step"
    )


class EvalConfig(Flags):
    """Evaluation and samples"""

    val_loss_every: int = Field(250, ge=0, description="steps between validations; 0: only at the end")
    val_max_steps: int = Field(
        20, ge=1, description="validation batches of total_batch_size tokens; the same ones in the whole run"
    )
    sample_every: int = Field(0, ge=0, description="steps between samples; 0: none")
    sample_tokens: int = Field(64, ge=1, description="tokens per sample")
    sample_prompt: str = Field("", description="text that samples continue; empty: start a new document")
    hellaswag_every: int = Field(0, ge=0, description="steps between HellaSwag evaluations; 0: none")
    hellaswag_limit: int = Field(0, ge=0, description="use only the first N HellaSwag examples; 0: all 10,042")
    hellaswag_data: str = Field("", description="path of hellaswag_val.jsonl; empty: download it if needed")


class CheckpointConfig(Flags):
    """Checkpoints and resume"""

    output_dir: str = Field(
        DEFAULT_OUTPUT_DIR,
        min_length=1,
        description="folder for everything the run writes; NAME is the preset, or n_layer x n_embd without one",
    )
    save_every_niter: int = Field(
        1000, ge=0, description="steps between checkpoints; 0: only at the end and when stopped"
    )
    keep_last: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="also keep every checkpoint whose step is a multiple of this; 0: none")
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: resume from output_dir; never: fail if it has checkpoints; or the PATH of a checkpoint",
    )
    async_save: Literal["auto", "0", "1"] = Field(
        "auto", description="write checkpoints in the background from a copy in host memory; auto: on GPUs"
    )


class LogConfig(Flags):
    """Logging"""

    log_every: int = Field(10, ge=1, description="steps between console lines (metrics.jsonl has every step)")
    wandb_project_id: str = Field("", description="Weights & Biases project; empty: off; without a key: offline")
    wandb_log_iters: int = Field(1, ge=1, description="steps between Weights & Biases records")
    tensorboard: bool = Field(False, description="write TensorBoard events to output_dir/logs")
    record_memory: bool = Field(
        False, description="CUDA: record where memory is allocated, for the snapshot that is written when it runs out"
    )


class Config(
    ModelConfig,
    InitConfig,
    LoraConfig,
    DataConfig,
    BatchConfig,
    OptimizerConfig,
    ComputeConfig,
    ParallelConfig,
    EvalConfig,
    CheckpointConfig,
    LogConfig,
):
    """All flags of a run."""

    cfg: str = Field("", description="preset name (a file in cfg/) or path to a YAML file; flags win over it")


GROUPS: tuple[type[Flags], ...] = Config.__bases__  # in the order of --help and docs/flags.md


def training_only_flags() -> frozenset[str]:
    """Returns the names of the model flags that do not change the function of the trained weights."""
    return frozenset(name for name, f in ModelConfig.model_fields.items() if f.json_schema_extra == TRAINING_ONLY)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """Returns the model flags that decide what the trained weights compute.

    The padding of the vocabulary is left out too: it changes the shape of two parameters, but no prediction.
    """
    left_out = training_only_flags() | {"vocab_pad"}
    return {name: getattr(config, name) for name in ModelConfig.model_fields if name not in left_out}


def type_name(field: FieldInfo) -> str:
    """Returns the type or the choices of a flag, as --help and docs/flags.md show them."""
    if isinstance(field.default, bool):
        return "0|1|model" if get_args(field.annotation) else "0|1"
    if get_origin(field.annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(field.annotation))
    return {str: "TEXT", int: "INT", float: "FLOAT"}[field.annotation]  # type: ignore[index]


def shown_default(field: FieldInfo) -> str:
    """Returns the default of a flag, as --help and docs/flags.md show it."""
    value = int(field.default) if isinstance(field.default, bool) else field.default
    return "''" if value == "" else str(value)
