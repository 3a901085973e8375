"""Data sets of the Hugging Face hub, read over the network through the package `datasets`.

    hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT]     a data set of the hub; hf:NAME for one without an owner
    hf:FOLDER[/CONFIG][:SPLIT]                    a folder in the hub's layout; it begins with /, . or ~

The split is `train` if none is given. Each file of a data set is a work unit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data.prepare.inputs import file_fingerprint, is_dataset
from data.prepare.text_files import field_of
from util.errors import UserError, closest

HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w.-]+))?(/(?P<config>[\w.+-]+))?(:(?P<split>[\w.-]+))?")
LOCAL = re.compile(r"(?P<name>[/.~].*?)(:(?P<split>[\w.-]+))?")


class Address(NamedTuple):
    """The parts of `hf:NAME[@REVISION][/CONFIG][:SPLIT]`."""

    name: str  # on the hub, or a folder
    revision: str | None
    config: str | None
    split: str


def parse(path: str) -> Address:
    """Parses the address of a data set."""
    text = path.removeprefix("hf:")
    if match := LOCAL.fullmatch(text):
        folder, config = Path(os.path.expanduser(match["name"])), None
        if not folder.is_dir():
            folder, config = folder.parent, folder.name
        if not folder.is_dir():
            raise UserError(f"{path}: no such folder")
        return Address(str(folder), None, config, match["split"] or "train")
    if match := HUB.fullmatch(text):
        return Address(match["name"], match["revision"], match["config"], match["split"] or "train")
    raise UserError(f"{path}: must be hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT]")


def pin(path: str, output_dir: Path) -> str:
    """Adds the hub's newest revision to an address without one, so that it always means the same files.

    An earlier command with this output decides, as the newest revision may have changed since.
    """
    address = parse(path)
    if address.revision or os.path.isdir(address.name):
        return path
    pinned = f"hf:{address.name}@{{}}{path.removeprefix(f'hf:{address.name}')}"
    before, after = map(re.escape, pinned.split("{}"))
    for folder in (output_dir, *sorted(output_dir.glob("part_*_of_*")), *sorted(output_dir.glob("source_*"))):
        for file in (folder / "manifest.json", folder / ".partial" / "recipe.json"):
            content = file.read_text(errors="replace") if file.is_file() else ""
            if match := re.search(rf'"name": "({before}\w+{after})"', content):
                return match[1]
    return pinned.format(_revision(path, address))


def _revision(path: str, address: Address) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(address.name).sha)
    except Exception as e:  # the library's own kinds, its HTTP library's, OSError
        raise _not_found(path, e) from e


def _not_found(path: str, e: Exception) -> UserError:
    reason = " ".join(str(e).split())[:200]
    return UserError(
        f"{path}: the hub does not have it or cannot be reached ({type(e).__name__}: {reason}); check the name and the"
        f" network, or download the files elsewhere and give these"
    )


def dataset_fingerprint(path: str) -> dict[str, Any]:
    """Returns the address, which names a revision. A folder is identified by the hashes of its files."""
    address = parse(path)
    if not os.path.isdir(address.name):
        return {"name": path}
    _open(path)  # checks configuration and split
    import datasets

    files = datasets.load_dataset_builder(address.name, address.config).config.data_files or {}
    found = [file_fingerprint(str(file)) for file in files.get(address.split, [])]
    return {
        "name": f"{Path(address.name).name}/{address.config or ''}:{address.split}",
        "hash": hashlib.sha256(json.dumps(found).encode()).hexdigest(),
    }


@lru_cache(maxsize=8)
def _open(path: str) -> Any:
    """Opens a data set for reading from its start, without downloading it first."""
    try:
        import datasets
    except ImportError as e:
        raise UserError(
            f"{path}: data sets of the hub are read through the package datasets: pip install datasets"
        ) from e
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    address = parse(path)
    try:
        return datasets.load_dataset(
            address.name, address.config, split=address.split, revision=address.revision, streaming=True
        )
    except ValueError as e:  # a configuration or a split that it does not have
        raise _wrong_part(path, address, str(e)) from e
    except Exception as e:  # the library's own kinds, its HTTP library's, OSError
        raise _not_found(path, e) from e


def _wrong_part(path: str, address: Address, message: str) -> UserError:
    """Returns the error for a configuration or split that does not exist, from the message of `datasets`."""
    known = re.findall(r"'([^']*)'", message.partition("[")[2].partition("]")[0])
    if not known:
        return UserError(f"{path}: {' '.join(message.split())[:200]}")
    listed = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
    if "split" in message:
        what, word, example = f"no split {address.split}", address.split, f":{known[0]}"
    elif address.config:
        what, word, example = f"no configuration {address.config}", address.config, f"/{known[0]}"
    else:
        what, word, example = "several configurations", "", f"/{known[0]}"
    near = closest(word, known)
    hint = f"did you mean {near}?" if near else f"it has {listed}; name one, for example with {example}"
    return UserError(f"{path}: {what}; {hint}")


def dataset_units(path: str, text_key: str) -> list[int]:
    """Returns the approximate bytes of each file of a data set. Checks that it has the column."""
    dataset = _open(path)
    columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    if text_key not in columns and text_key.partition(".")[0] not in columns:
        raise UserError(f"{path}: no column {text_key!r}; it has {', '.join(columns)}; see --text_key")
    split = (dataset.info.splits or {}).get(parse(path).split)
    size = (split.num_bytes if split else 0) or dataset.num_shards
    return [size // dataset.num_shards] * dataset.num_shards


def dataset_rows(path: str, file: int, text_key: str) -> Iterator[tuple[int, Any]]:
    """Yields number (from 1) and text of each row of a file of a data set."""
    dataset = _open(path)
    if text_key in (dataset.column_names or []):
        dataset = dataset.select_columns([text_key])
    for number, row in enumerate(dataset.shard(dataset.num_shards, file), 1):
        try:
            text = field_of(row, text_key)
        except (KeyError, TypeError) as e:
            raise UserError(f"{path}: no column {text_key!r}; it has {', '.join(row)}; see --text_key") from e
        if not isinstance(text, str | bytes | None):
            raise UserError(f"{path}: column {text_key!r} holds {type(text).__name__}, not text; see --text_key")
        yield number, text


def file_row_name(file: int, path: str, number: int) -> str:
    return f"{path}: row {number} of file {file + 1}"


def pin_datasets(paths: list[str], output_dir: Path) -> list[str]:
    """Returns the input with the revision of each data set of the hub (see `pin`)."""
    return [pin(path, output_dir) if is_dataset(path) else path for path in paths]
