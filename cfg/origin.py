"""What --init_from names: a model that somebody has trained, its flags, and where its files are.

hf:FOLDER, or hf:NAME[@REVISION] of the hub; nanogpt:FILE, llmc:FILE, llama2c:FILE; or a run or checkpoint of ours.
Evaluation and export take the same names as --checkpoint. model/origin.py reads the weights.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfg import hf
from cfg.errors import UserError

KINDS = ("hf", "nanogpt", "llmc", "llama2c")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
DESCRIPTION = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")  # not consolidated.safetensors, the same once more
# Flags that may be given beside --init_from and differ from the model's: what is of training, how vocabularies are
# padded, and what is changed to make a context longer.
FREE = {"dropout", "flash", "vocab_pad", "zero_init", "rope_base", "rope_scaling", "sliding_window"}


@dataclass(frozen=True)
class Origin:
    """A model that is there to be read."""

    kind: str  # one of KINDS, or "" for a run or checkpoint of ours
    path: Path  # folder or file; of a model of the hub, the folder in its cache
    hub: str  # its name there, if it is from the hub
    flags: dict[str, Any]  # of ModelConfig
    tokenizer: str  # the name or path of its own, none if there is no telling


def split(text: str) -> tuple[str, str]:
    """The kind, "" for a checkpoint of ours, and what stands behind it."""
    kind, colon, rest = text.partition(":")
    return (kind, rest) if colon and kind in KINDS else ("", text)


def open_origin(text: str, flag: str = "init_from") -> Origin:
    """Reads what describes a model, not its weights. Raises UserError if it cannot be, beginning with --flag."""
    kind, name = split(text)
    path = Path(os.path.expanduser(name))
    where = f"--{flag}={text}"
    if not name:
        raise UserError(f"{where}: names nothing")
    if kind == "hf":
        return _open_hf(name, where)
    if kind:
        if not path.is_file():
            raise UserError(f"{where}: no such file")
        from cfg import neighbours  # with numpy, which --help does without

        readers = (neighbours.nanogpt_flags, neighbours.llmc_flags, neighbours.llama2c_flags)
        flags = dict(zip(KINDS[1:], readers, strict=True))[kind](path)
        return Origin(kind, path, "", flags, _tokenizer_beside(kind, path, flags["vocab_size"]))
    found = _config_of_run(path, where)
    own = next((str(p.parent) for p in sorted(path.rglob("tokenizer.json"))), "")
    return Origin("", path, "", found, own or str(found["tokenizer"]))


def hf_folder(name: str, where: str) -> tuple[Path, str]:
    """The folder of what follows on hf:, and its name if it is the hub's, of which then the description is fetched.

    Raises UserError if there is no such folder and nothing of this name to be fetched.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path, ""
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: no such folder")
    return fetch(name, DESCRIPTION, where), name


def _open_hf(name: str, where: str) -> Origin:
    path, hub = hf_folder(name, where)
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as e:
        raise UserError(f"{where}: {file}: {e.strerror}; a Hugging Face model's folder has one") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: {file} is damaged ({e})") from e
    if not isinstance(config, dict):
        raise UserError(f"{where}: {file} is damaged (not an object)")
    flags = hf.flags_of(config, f"{where}: {file.name}")
    own = (path / "tokenizer.json").is_file()
    tokenizer = (f"hf:{hub}" if hub else str(path)) if own else _known_by_size(flags["vocab_size"])
    return Origin("hf", path, hub, flags, tokenizer)


def fetch(name: str, patterns: tuple[str, ...], where: str) -> Path:
    """The folder in the hub's cache that holds the files of a model; those not there yet are fetched.

    Every rank may ask: the library locks. Raises UserError if they cannot be had.
    """
    if os.environ.get("RANK", "0") != "0":
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UserError(f"{where}: pip install huggingface_hub, or give hf:FOLDER") from e
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as e:  # its own kinds, those of its HTTP library, OSError
        reason = " ".join(str(e).split())[:160]
        raise UserError(
            f"{where}: there is no such folder, and the hub does not have it or cannot be reached"
            f" ({type(e).__name__}: {reason}); fetch the model elsewhere and give hf:FOLDER"
        ) from e


def _known_by_size(vocab_size: int) -> str:
    return "gpt2" if vocab_size in (50257, 50304) else "none"  # GPT-2's, as it is and as it is often padded


def _tokenizer_beside(kind: str, path: Path, vocab_size: int) -> str:
    """llama2.c keeps tok512.bin beside a model of 512 tokens, and Llama's as tokenizer.bin."""
    if kind != "llama2c":
        return _known_by_size(vocab_size)
    beside = path.with_name("tokenizer.bin" if vocab_size == 32000 else f"tok{vocab_size}.bin")
    return str(beside) if beside.is_file() else "none"


def _config_of_run(path: Path, where: str) -> dict[str, Any]:
    """The flags in the manifest of a checkpoint, or of the newest one of a run that can be read."""
    if not path.is_dir():
        kinds = ", ".join(f"{kind}:" for kind in KINDS)
        raise UserError(f"{where}: no such run or checkpoint; other models are named with {kinds} in front")
    path = path.parent if path.name == "checkpoints" else path
    for file in [path / "manifest.json", *sorted(path.glob("checkpoints/step_*/manifest.json"), reverse=True)]:
        try:
            config = json.loads(file.read_bytes())["config"]
            return dict(config)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(f"{where}: holds no checkpoint")
