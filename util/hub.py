"""Models on the Hugging Face hub: their folder in the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from util.errors import UserError

DESCRIPTION = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "chat_template.jinja",
)
ADAPTER = (*DESCRIPTION[2:], "adapter_config.json", "adapter_model.safetensors")  # of PEFT, with its tokenizer
# Not consolidated.safetensors, which some models have as a second copy.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def model_folder(name: str, where: str, patterns: tuple[str, ...] = DESCRIPTION) -> tuple[Path, str]:
    """Returns the folder of a model, and its name on the hub ("" for a folder that exists here).

    `name` is FOLDER, or OWNER/NAME[@REVISION] on the hub, of which only the files of these `patterns` are downloaded,
    by default the description. Errors begin with `where`.
    """
    if os.path.isdir(path := os.path.expanduser(name)):
        return Path(path), ""
    if name.startswith(("/", "./", "../", "~")):  # no name on the hub begins so
        raise UserError(f"{where}: no such folder; check the path")
    return download(name, patterns, where), name


def download(name: str, patterns: tuple[str, ...], where: str) -> Path:
    """Returns the folder in the hub's cache with a model's files of these patterns; downloads those that are missing.

    All ranks may call it at once: the library locks.
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
    except Exception as e:  # the library's own kinds, its HTTP library's, OSError
        reason = " ".join(str(e).split())[:160]
        raise UserError(
            f"{where}: no such folder, and the hub does not have it or cannot be reached"
            f" ({type(e).__name__}: {reason}); download it elsewhere and give its folder"
        ) from e
