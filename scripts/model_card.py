"""The README.md of an exported model: its size, training, results, and how to load it."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

from cfg.checks import unused_rates
from cfg.flags import Config, ModelConfig, architecture
from model.formats.checkpoint import read_manifest, read_state, step_of
from model.formats.pretrained import PretrainedModel
from train.metrics import read_records

# The flags to show, in this order.
TRAINING = """init_from input_train_bin tokenizer sequence_length total_batch_size num_iterations optimizer
    learning_rate matrix_lr embedding_lr head_lr scalar_lr schedule warmup_iters learning_rate_decay_frac weight_decay
    beta1 beta2 grad_clip dropout dtype zero_stage doc_mask seed""".split()
LORA = ["lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_embeddings", "base_dtype"]
MEASURED = {
    "loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "val_bpb": "validation bits per byte",
    "hellaswag_acc_norm": "HellaSwag acc_norm, completion style",
    "hellaswag_lm_eval_acc_norm": "HellaSwag acc_norm, as lm-evaluation-harness",
}


def model_card(
    path: Path, pretrained: PretrainedModel, config: ModelConfig, dtype: str, parameters: int, base: str = ""
) -> str:
    """Returns the model card in Markdown.

    A rawgpt checkpoint describes its training. Of a model in another format only the architecture is known. `base` is
    the base model if the export is an adapter in PEFT's format.
    """
    library = ["library_name: " + ("peft" if base else "transformers")]
    library += [f"base_model: {base}"] if base and not base.startswith("/") else []  # a path is private
    tags = ["tags:", "- rawgpt", *(["- lora"] if base else [])]
    lines = ["---", *library, "pipeline_tag: text-generation", *tags, "---", ""]
    lines += [f"# {path.resolve().name if pretrained.kind else run_name(path)}", ""]
    if pretrained.kind:
        lines += [
            f"{parameters:,} parameters in {dtype}, converted from `{pretrained.kind}:{path.name}` by rawgpt.",
            "",
        ]
    else:
        what = "An adapter (LoRA)" if base else "A language model"
        lines += training_section(path, f"{what} of {parameters:,} parameters in {dtype}")
    model_class, package = ("AutoPeftModelForCausalLM", "peft") if base else ("AutoModelForCausalLM", "transformers")
    imports = [f"from {package} import {model_class}", "from transformers import AutoTokenizer"] if base else []
    imports = imports or ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines += ["## Use", "", "```python", *imports, "", 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
    lines += [f'model = {model_class}.from_pretrained("FOLDER")', "```", ""]
    kind = "peft" if base else "hf"
    lines += [f"This folder can be trained on with `train_gpt.py --init_from={kind}:FOLDER`.", ""]
    lines += ["## Architecture", "", *table({k: v for k, v in architecture(config).items() if v not in ("", 0, False)})]
    return "\n".join(lines)


def run_name(checkpoint: Path) -> str:
    """Returns the name of the run's folder, or of the checkpoint's if it is not in a run."""
    folder = checkpoint.resolve()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def training_section(path: Path, what: str) -> list[str]:
    """Returns the lines about training and results of `what`, from the checkpoint and the log of its run."""
    flags = read_manifest(path)["config"]
    unused = unused_rates(Config.model_construct(**flags))
    shown = [name for name in TRAINING if name not in unused] + (LORA if flags.get("lora_rank") else [])
    record = read_state(path)["record"]
    metrics = path.resolve().parent.parent / "metrics.jsonl"
    if step_of(path) >= 0:
        # Evaluations of this step come after the save, so they are only in the log.
        record |= next((r for r in read_records(metrics) if r["step"] == record["step"]), {})
    found = {what: f"{record[key]:.4f}" for key, what in MEASURED.items() if record.get(key) is not None}
    if limit := flags.get("hellaswag_limit"):
        found = {f"{k}, {limit} examples" if k.startswith("HellaSwag") else k: v for k, v in found.items()}
    if record.get("val_loss") is not None:
        found["validation perplexity"] = f"{exp(record['val_loss']):.2f}"
    step, tokens = record.get("step", 0), record.get("tokens", 0)
    return [
        f"{what}, trained with rawgpt for {step:,} steps on {tokens:,} tokens.",
        "",
        "## Measured",
        "",
        *table(found),
        "",
        "## Training",
        "",
        *table({name: without_directory(flags[name]) for name in shown if name in flags}),
        "",
    ]


def without_directory(value: Any) -> Any:
    """Shortens a flag's value that is an absolute path to its last part, because the rest is private."""
    kind, colon, path = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return f"{kind}{colon}{Path(path).name}" if path.startswith(("/", "~")) else value


def table(rows: dict[str, Any]) -> list[str]:
    """Formats names and values as a Markdown table."""
    return ["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows.items())]
