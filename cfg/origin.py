"""What --init_from names: a model that somebody has trained, its flags, and where its files are.

hf:FOLDER, or hf:NAME[@REVISION] of the hub; nanogpt:FILE, llmc:FILE, llama2c:FILE; or a run or checkpoint of ours.
Evaluation and export take the same names as --checkpoint. model/formats/pretrained.py reads the weights.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfg import hf
from util.errors import UserError, quote
from util.files import read_json

KINDS = ("hf", "nanogpt", "llmc", "llama2c")
# As the hub has them. A revision also names a file in its library's cache, so there is no .. in it.
HUB_PART = r"(?!.*(\.\.|--))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(?<!\.git)(?<![.-])"
HUB_NAME = re.compile(rf"{HUB_PART}(/{HUB_PART})?")
HUB_REVISION = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}")
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
    where = f"--{flag}={quote(text)}"
    if not name or "\0" in name:
        raise UserError(f"{where}: names nothing")
    path = Path(os.path.expanduser(name))
    if kind == "hf":
        return _open_hf(name, where)
    if kind:
        if not os.path.isfile(path):
            raise UserError(f"{where}: no such file")
        from cfg import neighbours  # with numpy, which --help does without

        readers = (neighbours.nanogpt_flags, neighbours.llmc_flags, neighbours.llama2c_flags)
        flags = dict(zip(KINDS[1:], readers, strict=True))[kind](path)
        return Origin(kind, path, "", flags, _tokenizer_beside(kind, path, flags["vocab_size"]))
    found = _config_of_run(path, where)
    own = next((str(p.parent) for p in sorted(path.rglob("tokenizer.json"))), "")
    return Origin("", path, "", found, own or str(found.get("tokenizer", "none")))


def check_hub_name(name: str, where: str) -> None:
    """Raises UserError for what cannot be NAME, OWNER/NAME or one of these with @REVISION: no library need see it."""
    repository, at, revision = name.partition("@")
    if not HUB_NAME.fullmatch(repository):
        raise UserError(f"{where}: no such folder, nor can it be a name of the hub (OWNER/NAME[@REVISION])")
    if at:
        check_hub_revision(revision, where)


def check_hub_revision(revision: str, where: str) -> None:
    """Raises UserError for what cannot be a branch, a tag or a commit."""
    if not HUB_REVISION.fullmatch(revision):
        raise UserError(f"{where}: the revision cannot be one of the hub: a branch, a tag or a commit")


def hf_folder(name: str, where: str) -> tuple[Path, str]:
    """The folder of what follows on hf:, and its name if it is the hub's, of which then the description is fetched.

    Raises UserError if there is no such folder and nothing of this name to be fetched.
    """
    if "\0" not in name and os.path.isdir(path := os.path.expanduser(name)):
        return Path(path), ""
    check_hub_name(name, where)
    return fetch(name, DESCRIPTION, where), name


def _open_hf(name: str, where: str) -> Origin:
    path, hub = hf_folder(name, where)
    file = path / "config.json"
    try:
        config = read_json(file)
    except OSError as e:
        raise UserError(f"{where}: {file}: {e.strerror}; a Hugging Face model's folder has one") from e
    except ValueError as e:
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
    if not os.path.isdir(path):
        kinds = ", ".join(f"{kind}:" for kind in KINDS)
        raise UserError(f"{where}: no such run or checkpoint; other models are named with {kinds} in front")
    path = path.parent if path.name == "checkpoints" else path
    for file in [path / "manifest.json", *sorted(path.glob("checkpoints/step_*/manifest.json"), reverse=True)]:
        try:
            config = read_json(file)["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(config, dict):
            return config
    raise UserError(f"{where}: holds no checkpoint")
