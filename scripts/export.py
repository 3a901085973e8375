"""Export of a checkpoint to another format: `python scripts/export.py --checkpoint RUN --to hf --output FOLDER`.

hf            a Hugging Face folder: config.json, model.safetensors, the tokenizer, a model card
peft          of a LoRA run: the adapter in PEFT's format, with the tokenizer and a model card
llmc          llm.c's model file
consolidated  a rawgpt checkpoint without the optimizer, its weights in one file; evaluation can load it

--checkpoint may also name a model in another format (hf:, peft:FOLDER, nanogpt:, llmc:, llama2c:FILE), which is
converted. The export needs memory for one file of the output at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from util.command import parse_first
from util.errors import CommandParser, UserError, refuse_broken_link, run_command

NAMES = {"hf": "a folder", "peft": "a folder", "llmc": "a file", "consolidated": "a folder"}


def parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="an output_dir, one checkpoint in it, or a model as --init_from names it")
    add("--to", choices=list(NAMES), default="consolidated", help="default: %(default)s")
    add("--output", type=Path, required=True, help="the folder or file to write; must not exist")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="for hf, peft and llmc (default: float32)",
    )
    add("--tokenizer", default="", help="name, or path of a tokenizer.json, for hf and peft (default: the model's own)")
    add("--base", default="", help="for peft: folder or hub name of the base model (default: hf:NAME of --init_from)")
    add("--max_file_gb", type=float, default=5.0, help="for hf: the largest size of a file in 10^9 bytes")
    return parser


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, lambda: parser().parse_args())

import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cfg.config import ModelConfig, model_config
from cfg.flags import LoraConfig
from data.tokenizers.chat_export import ends_of_text, open_chat, with_end_of_text_first
from data.tokenizers.export import tokenizer_files
from data.tokenizers.hf_json import GENERATION_CONFIG
from data.tokenizers.tokenizer import Tokenizer
from eval.model import load_model_tokenizer
from model.formats.checkpoint import (
    MANIFEST,
    STATE,
    load_tensors,
    read_manifest,
    read_state,
    tensor_shapes,
    with_sha256,
)
from model.formats.hf import write_config
from model.formats.hf_tensors import INDEX, SINGLE, is_nanochat, split_for_export
from model.formats.llmc import write_file
from model.formats.lora_base import base_in_state
from model.formats.peft import write_adapter
from model.formats.pretrained import (
    PretrainedModel,
    checkpoint_reader,
    initial_values,
    newest_checkpoint,
    open_pretrained,
    open_weights,
    split_name,
    stored_parameters,
)
from model.gpt import parameter_shapes
from scripts.model_card import model_card
from util.files import file_sha256, flush_to_disk


@dataclass(frozen=True)
class Source:
    """The model to export."""

    pretrained: PretrainedModel
    path: Path  # the checkpoint, folder or file
    config: ModelConfig
    read: Callable[[str], Tensor]  # returns a parameter by name, without vocabulary padding


def open_source(name: str) -> Source:
    """Opens the model that --checkpoint names."""
    pretrained = open_pretrained(name, "checkpoint")
    config = model_config(pretrained.flags, name)
    if pretrained.kind:
        return Source(pretrained, pretrained.path, config, open_weights(pretrained))
    found = newest_checkpoint(pretrained.path)
    return Source(pretrained, found, config, checkpoint_reader(found, config))


def consolidate(source: Source, folder: Path) -> None:
    """Writes a checkpoint without optimizer, its weights in one file, to the empty `folder`.

    LoRA adapters are merged, so the checkpoint needs no base.
    """
    checkpoint = source.path
    manifest = read_manifest(checkpoint)
    for name in manifest["files"]:
        if "/" not in name:  # not weights: the state and the tokenizer
            shutil.copy(checkpoint / name, folder / name)
    if manifest["config"].get("lora_rank"):
        manifest["config"] = {k: v for k, v in manifest["config"].items() if k not in LoraConfig.model_fields}
        write_json(folder / STATE, {k: v for k, v in read_state(checkpoint).items() if k != "base"})
        value = initial_values(source.read, source.config)
        shapes = parameter_shapes(source.config, padded=True)
        tensors = {name: value(name, shape).float() for name, shape in shapes.items()}
    else:
        tensors = {name: torch.empty(shape) for name, shape in tensor_shapes(checkpoint, "model").items()}
        load_tensors(checkpoint, "model", tensors)
    (folder / "model").mkdir()
    save_file(tensors, folder / "model" / SINGLE, metadata={"format": "pt"})
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest["files"] = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    write_json(folder / MANIFEST, with_sha256(manifest))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def export_hf(source: Source, folder: Path, dtype: torch.dtype, limit: float, tokenizer_name: str) -> None:
    """Writes a Hugging Face folder of the model to the empty `folder`.

    A model for which transformers has no class is a user error.
    """
    model = write_config(source.config.model_dump())
    ids = write_tokenizer(source, folder, tokenizer_name)
    kind = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**model, **ids, "torch_dtype": kind})
    write_weights(source, folder, dtype, limit)
    count = sum(map(prod, parameter_shapes(source.config).values()))
    card = model_card(source.path, source.pretrained, source.config, kind, count)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_tokenizer(source: Source, folder: Path, name: str) -> dict[str, Any]:
    """Writes the files of the tokenizer `name`, or of the model's own, if it is known.

    Returns bos_token_id and eos_token_id, as config.json and generation_config.json contain them.
    """
    tokenizer = open_tokenizer(source, name)
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    files, chat = tokenizer_files(tokenizer, source.config.n_positions), open_chat(tokenizer)
    if chat and source.pretrained.flags.get("doc_mask"):
        files = with_end_of_text_first(files, chat)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    ids = {"bos_token_id": tokenizer.bos_tokens[0], "eos_token_id": ends_of_text(tokenizer, chat)}
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ids})
    return ids


def open_adapter(name: str) -> Source:
    """Opens the LoRA run that --checkpoint names. `read` returns trained parameters only."""
    pretrained = open_pretrained(name, "checkpoint")
    if pretrained.kind or not pretrained.flags.get("lora_rank"):
        raise UserError(f"--to=peft: --checkpoint={name} is no LoRA run, so it has no adapter; use --to=hf")
    found, config = newest_checkpoint(pretrained.path), model_config(pretrained.flags, name)
    return Source(pretrained, found, config, stored_parameters(found, config)[0])


def base_of_adapter(source: Source, wanted: str) -> tuple[str, str]:
    """Returns the folder or hub name of the base model of a LoRA run, and its revision.

    It is --base, if given. It must be in Hugging Face's format, and compute what the run's base computes.
    """
    recorded = base_in_state(read_state(source.path), source.path).init_from
    kind, name = split_name(recorded)
    if kind != "hf" and not wanted:
        raise UserError(
            f"--to=peft: the base model {recorded} is not in Hugging Face's format; export it with"
            f" --checkpoint={recorded} --to=hf, and name that folder with --base"
        )
    wanted = wanted.removeprefix("hf:")
    base = open_pretrained(f"hf:{wanted or name}", "base")
    ours, theirs = write_config(source.config.model_dump()), write_config({"dropout": 0.0} | base.flags)
    for key in ours:
        if key in ("vocab_size", "max_position_embeddings") or "drop" in key or ours[key] == theirs.get(key):
            continue
        raise UserError(
            f"--base={wanted or name}: has {key}={theirs.get(key)}, but the model of the run {ours[key]}; name the base"
            " of the run, or use --to=hf if the run has changed it"
        )
    size = source.config.vocab_size
    if size != base.flags["vocab_size"]:
        print(f"the base model has {base.flags['vocab_size']} tokens, the adapter {size}: load both with PEFT's")
        print(f"AutoPeftModelForCausalLM, or call resize_token_embeddings({size}) of the base model first")
    name, _, revision = base.hub.partition("@")
    return name or str(base.path.absolute()), revision


def export_peft(source: Source, folder: Path, dtype: torch.dtype, wanted_base: str, tokenizer_name: str) -> None:
    """Writes the adapter of a LoRA run in PEFT's format to the empty `folder`."""
    base, revision = base_of_adapter(source, wanted_base)
    write_tokenizer(source, folder, tokenizer_name)
    flags = source.pretrained.flags
    tensors = {name: source.read(name) for name in tensor_shapes(source.path, "model")}
    alpha, dropout = flags["lora_alpha"], flags["lora_dropout"]
    write_adapter(folder, source.config, tensors, alpha, base, revision, dropout, dtype)
    count = sum(tensor.numel() for tensor in tensors.values())
    kind = str(dtype).removeprefix("torch.")
    card = model_card(source.path, source.pretrained, source.config, kind, count, base)
    (folder / "README.md").write_text(card, encoding="utf-8")


def open_tokenizer(source: Source, name: str) -> Tokenizer | None:
    """Returns the tokenizer `name`, or the model's own. Without a name a missing tokenizer is not an error."""
    flags = source.pretrained.flags | {"tokenizer": source.pretrained.tokenizer, "vocab_size": source.config.vocab_size}
    try:
        return load_model_tokenizer(name, source.path, flags)
    except UserError as error:
        if name:
            raise
        print(f"exporting without a tokenizer: {error}")
        return None


def write_weights(source: Source, folder: Path, dtype: torch.dtype, limit: float) -> None:
    """Writes model.safetensors, or several files with an index if they hold more than `limit` bytes."""
    from tqdm import tqdm

    # transformers' GPT-2 class always has biases, and all classes but NanoChat's have weights in norms. Where the model
    # has none, zeros and ones are written.
    config = source.config
    added = {"bias": config.bias or config.positions == "learned", "norm_weight": not is_nanochat(config)}
    shapes = parameter_shapes(config.model_copy(update=added))
    groups = list(grouped(shapes, limit / dtype.itemsize))
    own = parameter_shapes(config)
    places: dict[str, str] = {}
    total = 0
    bar = tqdm(total=len(shapes), desc="tensors", unit="", disable=None)
    for number, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            neutral = torch.zeros if name.endswith(".bias") else torch.ones
            value = source.read(name).to(dtype) if name in own else neutral(shapes[name], dtype=dtype)
            tensors |= split_for_export(name, value, config)
            bar.update()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    bar.close()
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def grouped(shapes: dict[str, torch.Size], limit: float) -> Iterator[list[str]]:
    """Yields names of parameters in groups of at most `limit` values. A larger parameter is a group alone."""
    group: list[str] = []
    held = 0
    for name, shape in shapes.items():
        if group and held + prod(shape) > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += prod(shape)
    yield group


def write_folder(output: Path, write: Callable[[Path], None]) -> None:
    """Creates a folder with `write`, so that it is complete or absent."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        write(folder)
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only the owner can read
                flush_to_disk(path)
        os.rename(folder, output)


def main(args: Namespace) -> None:
    output, dtype = args.output, getattr(torch, args.dtype)
    refuse_broken_link(output, "output")
    if os.path.lexists(output):
        raise UserError(f"--output={output} exists; choose another name")
    if not args.max_file_gb > 0:
        raise UserError(f"--max_file_gb={args.max_file_gb} must be above 0")
    if args.base and args.to != "peft":
        raise UserError(f"--base={args.base}: has no effect with --to={args.to}; it is for --to=peft")
    source = open_adapter(args.checkpoint) if args.to == "peft" else open_source(args.checkpoint)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"--output={output}: cannot create the folder above it ({e.strerror}); choose another place"
        ) from e
    if args.to == "consolidated":
        if source.pretrained.kind:
            raise UserError(
                f"--to=consolidated needs a rawgpt checkpoint; --checkpoint={args.checkpoint} is not one; use --to=hf"
            )
        write_folder(output, lambda folder: consolidate(source, folder))
    elif args.to == "hf":
        limit = args.max_file_gb * 1e9
        write_folder(output, lambda folder: export_hf(source, folder, dtype, limit, args.tokenizer))
    elif args.to == "peft":
        write_folder(output, lambda folder: export_peft(source, folder, dtype, args.base, args.tokenizer))
    else:
        write_file(output, source.config, source.read, dtype)
    files = [p for p in output.rglob("*") if p.is_file()] if output.is_dir() else [output]
    print(f"{output}: exported {source.path}, {sum(p.stat().st_size for p in files) / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_command(lambda: main(args))
