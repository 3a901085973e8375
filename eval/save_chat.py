"""Conversations as rows of a .jsonl file, which data/sft.py reads."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from data.tokenizers.chat import Message
from eval.prompts import ROWS
from util.errors import UserError
from util.values import user_path


def save(messages: Sequence[Message], name: str) -> Path:
    """Writes a conversation as a row with `messages`. Returns the file.

    The row is appended to the file `name`, or written to a new file in the current folder. Errors begin with /save.
    """
    if all(message["role"] != "assistant" for message in messages):
        raise UserError("/save: the conversation has no reply yet")
    row = (json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n").encode()
    path = user_path(name) if name else new_name()
    if path.suffix not in ROWS:
        raise UserError(f"/save {name}: give a name that ends in .jsonl; data/sft.py reads such files")
    try:
        append_row(path, row)
    except OSError as e:
        raise UserError(f"/save {path}: {e.strerror}; give another name") from e
    return path


def new_name() -> Path:
    """Returns a name in the current folder that no file has."""
    stem = f"chat_{datetime.now():%Y%m%d_%H%M%S}"
    path = Path(f"{stem}.jsonl")
    while path.exists():
        path = path.with_stem(path.stem + "_")
    return path


def append_row(path: Path, row: bytes) -> None:
    """Appends a line to a file, which keeps its content. After an error the file is as it was."""
    existed = path.exists()
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            row = row if file.read(1) == b"\n" else b"\n" + row
        try:
            if file.write(row) != len(row):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            if not existed:
                path.unlink()
            raise
