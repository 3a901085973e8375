"""Masks beside shards of conversations: which tokens count as targets.

NAME.mask has one byte per token of NAME.bin, 1 if the token is counted and 0 if not. It has no header: its size shows
whether it is complete and belongs to the shard. data/sft.py packs conversations into blocks of --sequence_length
tokens, which become the loader's windows. Each shard holds whole blocks. The last one has one more token, the target of
the last input.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.shards import Shard
from util.errors import UserError, user_errors
from util.files import read_json

SUFFIX = ".mask"


def packed_length(folder: Path) -> int | None:
    """Returns the sequence length for which the shards of a folder were packed, or None if they are not packed.

    A folder without a manifest is not packed. A damaged manifest is an error: packed shards need what it says.
    """
    file = folder / "manifest.json"
    try:
        manifest = read_json(file)
    except OSError:
        return None
    except ValueError as e:
        raise UserError(f"{file}: damaged ({e}); restore it, or prepare the data again") from e
    length = manifest.get("sequence_length") if isinstance(manifest, dict) else None
    return length if isinstance(length, int) else None


def open_masks(shards: list[Shard], sequence_length: int, flag: str) -> list[Shard] | None:
    """Opens and checks the masks of a set of shards. Returns None if the shards have no masks."""
    paths = [shard.path.with_suffix(SUFFIX) for shard in shards]
    lengths = {folder: packed_length(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    there = [path.exists() for path in paths]
    if not any(there) and not any(lengths.values()):
        return None
    for folder, length in lengths.items():
        if length not in (None, sequence_length):
            raise UserError(
                f"--sequence_length={sequence_length}: the conversations in {folder} were packed for"
                f" --sequence_length={length}; give that, or prepare them again with data/sft.py"
            )
    for path, found in zip(paths, there, strict=True):
        if not found:
            raise UserError(f"--{flag}: {path} is missing; restore it, or prepare the data again with data/sft.py")
    masks = [_open_mask(path, shard) for path, shard in zip(paths, shards, strict=True)]
    odd = [shard for shard in shards[:-1] if shard.count % sequence_length]
    odd += [shard for shard in shards[-1:] if shard.count % sequence_length > 1]
    if odd:
        raise UserError(
            f"--{flag}: {odd[0].path} has {odd[0].count} tokens, which are not whole blocks of"
            f" --sequence_length={sequence_length}; give one data set, or mix several with name=weight:GLOB"
        )
    return masks


def _open_mask(path: Path, shard: Shard) -> Shard:
    """Returns the mask as a shard of bytes, after checking its size."""
    with user_errors(path):
        size = path.stat().st_size
    if size != shard.count:
        what = "truncated" if size < shard.count else "too long"
        raise UserError(
            f"{path}: {what}: {size} bytes for the {shard.count} tokens of {shard.path.name}; prepare the data again"
        )
    return Shard(path, size, np.dtype("u1"), 0)
