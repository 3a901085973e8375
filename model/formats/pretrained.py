"""Pretrained models, as --init_from and --checkpoint name them: their flags, their weights, and how to load them.

A name is hf:FOLDER, or hf:OWNER/NAME[@REVISION] on the hub; peft:FOLDER, an adapter that is merged into its base model;
nanogpt:FILE, llmc:FILE, llama2c:FILE; or a run or checkpoint of rawgpt. torch is imported in the functions that read
weights, so that a wrong name is reported at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfg.config import model_config
from cfg.flags import ModelConfig
from util.errors import UserError, quote
from util.files import is_latest_file, read_json
from util.hub import ADAPTER, WEIGHTS, download, model_folder
from util.launcher import launched_rank

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from model.formats.raw import Reader
    from model.gpt import GPT, InitialValue

KINDS = ("hf", "peft", "nanogpt", "llmc", "llama2c")
# For each new token the old ones whose mean it becomes: all ids in one array, and where each token's ids begin.
Rows = tuple["np.ndarray", "np.ndarray"]


@dataclass(frozen=True)
class PretrainedModel:
    """A pretrained model whose description has been read."""

    kind: str  # one of KINDS, or "" for a run or checkpoint of rawgpt
    path: Path  # folder or file; for a model on the hub, its folder in the cache
    hub: str  # its name on the hub, or ""
    flags: dict[str, Any]  # of ModelConfig; for a run, all of its flags
    tokenizer: str  # name or path of the tokenizer, "none" if unknown
    base: PretrainedModel | None = None  # the model that an adapter of PEFT belongs to


def split_name(text: str) -> tuple[str, str]:
    """Returns the kind, "" for a run or checkpoint of rawgpt, and the rest of the name."""
    kind, colon, rest = text.partition(":")
    return (kind, rest) if colon and kind in KINDS else ("", text)


# --- the description ---


def open_pretrained(text: str, flag: str = "init_from") -> PretrainedModel:
    """Reads the description of a model, not its weights. Errors begin with --`flag`."""
    kind, name = split_name(text)
    where = f"--{flag}={quote(text)}"
    if not name:
        raise UserError(f"{where}: the name is empty")
    if kind == "hf":
        return _open_hf(name, where)
    if kind == "peft":
        return _open_peft(name, where)
    path = Path(os.path.expanduser(name))
    if not kind:
        return _open_run(path, where)
    if not os.path.isfile(path):
        raise UserError(f"{where}: no such file")
    from model.formats import llama2c, llmc, nanogpt  # these import numpy, which --help does not need

    if kind == "nanogpt":
        flags, _ = nanogpt.open_file(path)
    else:
        flags = (llmc if kind == "llmc" else llama2c).open_file(path).flags
    return PretrainedModel(kind, path, "", flags, _tokenizer_beside(kind, path, flags["vocab_size"]))


def _open_hf(name: str, where: str) -> PretrainedModel:
    from model.formats import hf

    path, hub = model_folder(name, where)
    file = path / "config.json"
    try:
        config = read_json(file)
    except OSError as e:
        adapter = (path / "adapter_config.json").is_file()
        hint = f"it holds a PEFT adapter; give peft:{name}" if adapter else "the folder of a Hugging Face model has one"
        raise UserError(f"{where}: {file}: {e.strerror}; {hint}") from e
    except ValueError as e:
        raise UserError(f"{where}: {file} is damaged ({e})") from e
    if not isinstance(config, dict):
        raise UserError(f"{where}: {file} is damaged (not an object)")
    flags = hf.read_flags(config, f"{where}: {file.name}")
    if flags["tie_embeddings"]:
        if hub:  # so far only the description has been downloaded
            download(hub, WEIGHTS, where)
        flags["tie_embeddings"] = not _has_other_head(path)
    if (path / "tokenizer.json").is_file():
        tokenizer = f"hf:{hub}" if hub else str(path)
    else:
        tokenizer = _tokenizer_of_size(flags["vocab_size"])
    return PretrainedModel("hf", path, hub, flags, tokenizer)


def _open_peft(name: str, where: str) -> PretrainedModel:
    from model.formats.peft_config import CONFIG, base_name, read_adapter_config

    path, hub = model_folder(name, where, ADAPTER)
    settings = read_adapter_config(path, where)
    base = _open_hf(base_name(settings, where), f"{where}: the base model in {CONFIG}")
    from model.formats.peft import vocabulary_of  # imports torch

    vocab_size, tied = vocabulary_of(settings, model_config(base.flags, str(base.path)))
    flags = base.flags | {"vocab_size": vocab_size, "tie_embeddings": tied}
    tokenizer = base.tokenizer if vocab_size == base.flags["vocab_size"] else _tokenizer_of_size(vocab_size)
    if (path / "tokenizer.json").is_file():
        tokenizer = f"hf:{hub}" if hub else str(path)
    return PretrainedModel("peft", path, hub, flags, tokenizer, base)


@cache
def _has_other_head(folder: Path) -> bool:
    """Returns whether the files contain a head that differs from the embedding, although config.json ties the two.

    transformers 5 uses this head too. A folder without weights has none; reading them will be the error.
    """
    if not any(folder.glob("model*.safetensors")):
        return False
    from model.formats.hf_tensors import has_other_head

    found = has_other_head(folder)
    if found and launched_rank() == 0:
        print(f"{folder}: lm_head.weight differs from the embedding, so the head is not tied to it", file=sys.stderr)
    return found


def _open_run(path: Path, where: str) -> PretrainedModel:
    path = path.parent if is_latest_file(path) else path
    flags = _flags_of_run(path, where)
    model_config(flags, where)
    patterns = "tokenizer.json", "step_*/tokenizer.json", "checkpoints/step_*/tokenizer.json"  # no run in a subfolder
    own = next((str(file.parent) for pattern in patterns for file in sorted(path.glob(pattern))), "")
    return PretrainedModel("", path, "", flags, own or str(flags.get("tokenizer", "none")))


def _flags_of_run(path: Path, where: str) -> dict[str, Any]:
    """Returns the flags in the manifest of a checkpoint, or of the newest readable checkpoint of a run."""
    if not os.path.isdir(path):
        kinds = ", ".join(f"{kind}:" for kind in KINDS)
        raise UserError(f"{where}: no such run or checkpoint; other models are named with {kinds} in front")
    patterns = ("manifest.json", "checkpoints/step_*/manifest.json", "step_*/manifest.json")
    for file in chain.from_iterable(sorted(path.glob(pattern), reverse=True) for pattern in patterns):
        try:
            flags = read_json(file)["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(flags, dict):
            return flags
    raise UserError(f"{where}: contains no checkpoint{_other_kind(path)}")


def _other_kind(path: Path) -> str:
    """Returns a hint for an error if the folder holds a model or an adapter of Hugging Face, otherwise ""."""
    kinds = (("adapter_config.json", "peft", "a PEFT adapter"), ("config.json", "hf", "a Hugging Face model"))
    found = (f"; it holds {what}: give {kind}:{path}" for file, kind, what in kinds if (path / file).is_file())
    return next(found, "")


def flags_to_resume(output_dir: str, resume: str) -> dict[str, Any]:
    """Returns the flags in the checkpoint that a run with these flags resumes from, {} if it starts fresh."""
    names = {"never": [], "auto": [output_dir]}.get(resume, [output_dir, resume])
    for name in names:
        path = Path(os.path.expanduser(name))
        path = path.parent if is_latest_file(path) else path
        if os.path.isdir(path):
            with suppress(UserError):
                return _flags_of_run(path, name)
    return {}


def _tokenizer_of_size(vocab_size: int) -> str:
    return "gpt2" if vocab_size in (50257, 50304) else "none"  # GPT-2's vocabulary, also as it is often padded


def _tokenizer_beside(kind: str, path: Path, vocab_size: int) -> str:
    """Returns the tokenizer that llama2.c keeps beside a model: tok512.bin for 512 tokens, tokenizer.bin for Llama."""
    if kind != "llama2c":
        return _tokenizer_of_size(vocab_size)
    beside = path.with_name("tokenizer.bin" if vocab_size == 32000 else f"tok{vocab_size}.bin")
    return str(beside) if beside.is_file() else "none"


def absolute_name(pretrained: PretrainedModel) -> str:
    """Returns the name of an opened model, which is the same in any working directory."""
    if pretrained.hub:
        return f"{pretrained.kind}:{pretrained.hub}"
    path = pretrained.path.expanduser().resolve()
    return f"{pretrained.kind}:{path}" if pretrained.kind else str(path)


# --- the weights ---


def open_weights(pretrained: PretrainedModel, report: Any = print) -> Reader:
    """Returns `read(name)`, which loads one whole parameter in its stored dtype and without vocabulary padding.

    Checks first that the files have the parameters of the model that they describe.
    """
    config = model_config(pretrained.flags, str(pretrained.path))
    if pretrained.kind == "hf":
        from model.formats.hf_tensors import HFReader

        if pretrained.hub:
            download(pretrained.hub, WEIGHTS, f"hf:{pretrained.hub}")
        return HFReader(pretrained.path, config)
    if pretrained.base:
        from model.formats.peft import PeftMerger, open_adapter
        from model.formats.peft_config import read_adapter_config

        settings = read_adapter_config(pretrained.path, f"{pretrained.kind}:{pretrained.path}")
        adapter = open_adapter(settings, config, pretrained.base.flags["tie_embeddings"])
        return PeftMerger(adapter, open_weights(pretrained.base))
    if pretrained.kind:
        from model.formats import llama2c, llmc, nanogpt

        readers = {"nanogpt": nanogpt.reader, "llmc": llmc.reader, "llama2c": llama2c.reader}
        return readers[pretrained.kind](pretrained.path, config)
    return checkpoint_reader(newest_checkpoint(pretrained.path, report), config)


def newest_checkpoint(path: Path, report: Any = print) -> Path:
    """Returns the newest valid checkpoint of a run, or `path` itself. The optimizer's files are not hashed."""
    from model.formats.checkpoint import find_checkpoint

    found = find_checkpoint(path, report, skip="optimizer/")
    if found is None:
        raise UserError(f"{path}: contains no checkpoint{_other_kind(path)}")
    return found


def checkpoint_reader(path: Path, config: ModelConfig) -> Reader:
    """Returns `read(name)` for a rawgpt checkpoint; LoRA adapters are merged into their base."""
    from model.formats.checkpoint import read_manifest

    read, names = stored_parameters(path, config)
    flags = read_manifest(path)["config"]
    if flags.get("lora_rank"):
        from model.formats.lora_base import merging_reader

        return merging_reader(path, read, names, flags, lambda name: open_weights(open_pretrained(name)))
    return read


def stored_parameters(path: Path, config: ModelConfig) -> tuple[Reader, list[str]]:
    """Returns `read(name)` for the parameters that a rawgpt checkpoint holds, adapters included, and their names."""
    import torch

    from model.formats.checkpoint import load_tensors, tensor_shapes
    from model.lora import VOCABULARY

    shapes = tensor_shapes(path, "model")

    def read(name: str) -> Tensor:
        if name not in shapes:
            raise UserError(f"{path}: has no {name}")
        tensor = torch.empty(shapes[name])
        load_tensors(path, "model", {name: tensor}, subset=True)
        return tensor[: config.vocab_size] if name in VOCABULARY else tensor

    return read, list(shapes)


def initial_values(read: Callable[[str], Tensor], config: ModelConfig, rows: Rows | None = None) -> InitialValue:
    """Returns what `read` returns as initial values for `init_weights`, with the vocabulary padded by zeros.

    `rows` map the embeddings and the head to another vocabulary.
    """
    import torch

    from model.lora import VOCABULARY

    def value(name: str, shape: torch.Size) -> Tensor:
        found = read(name)
        expected = shape
        if name in VOCABULARY:
            found = found if rows is None else mean_of_rows(found, rows)
            expected = torch.Size((config.vocab_size, *shape[1:]))
        if found.shape != expected:
            raise UserError(
                f"--init_from: {name} has shape {tuple(found.shape)}, but the flags of its model need"
                f" {tuple(expected)}; the files are damaged, or belong to different models"
            )
        if expected != shape:
            found = torch.cat((found, found.new_zeros(shape[0] - expected[0], *shape[1:])))
        return found

    return value


def mean_of_rows(table: Tensor, rows: Rows) -> Tensor:
    """Returns (V_new, C) from (V_old, C): each row is the mean of its old rows, or of all used ones if it has none."""
    import torch

    ids, offsets = (torch.from_numpy(a) for a in rows)
    table = table.float()
    mixed = torch.nn.functional.embedding_bag(ids, table, offsets, mode="mean", include_last_offset=True)
    mixed[offsets.diff() == 0] = table[ids.unique()].mean(0)  # without the rows that pad the old vocabulary
    return mixed


def load_model(path: Path | str, device: torch.device, report: Any = print) -> tuple[GPT, dict[str, Any], Path]:
    """Loads the model that --checkpoint names, in eval mode.

    Returns it with the flags that are known of its training, and the checkpoint, folder or file that was read.
    """
    from model.formats.checkpoint import load_tensors, read_manifest
    from model.gpt import GPT

    if split_name(str(path))[0]:
        return _load_foreign(open_pretrained(str(path), "checkpoint"), device)
    found = newest_checkpoint(Path(path), report)
    flags = read_manifest(found)["config"]
    config = model_config(flags, str(found))
    if flags.get("lora_rank"):
        return _filled(config, checkpoint_reader(found, config), device), flags, found
    model = GPT(config)
    load_tensors(found, "model", {name: p.detach() for name, p in model.named_parameters()})
    return model.to(device).eval(), flags, found


def _load_foreign(pretrained: PretrainedModel, device: torch.device) -> tuple[GPT, dict[str, Any], Path]:
    config = model_config(pretrained.flags, str(pretrained.path))
    read = open_weights(pretrained)  # checks the files before memory is allocated for the model
    flags = {**config.model_dump(), "tokenizer": pretrained.tokenizer, "doc_mask": False}
    return _filled(config, read, device), flags, pretrained.path


def _filled(config: ModelConfig, read: Reader, device: torch.device) -> GPT:
    """Returns the model with the weights that `read` returns, in eval mode."""
    import torch

    from model.gpt import GPT, init_weights

    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    init_weights(model, initial_values(read, config))
    return model.to(device).eval()
