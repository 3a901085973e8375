"""Fingerprints: what a checkpoint says of its training data, and what checkpoints and shards say of their tokenizer.

Comparing them keeps a resumed run on its data, and keeps token ids from being read with another tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.tokenizers.tokenizer import MAX_UNUSED_IDS, NAMED_FINGERPRINTS
from util.errors import UserError, quote
from util.files import read_json

ORDER_FLAGS = ("seed", "sequence_length", "total_batch_size", "shuffle")  # with the shards, they decide the order


# --- training data ---


def check_same_data(saved: dict[str, Any], now: dict[str, Any], run: Path | str = "RUN") -> None:
    """Checks that a resumed run sees the tokens that its checkpoint was trained on.

    `saved` and `now` are fingerprints of a Loader or a MixedLoader. The error names the flag, source or shard, and how
    to start a new run from the weights of `run`.
    """
    new_run = f"start a new run from its weights with --init_from={run} and another --output_dir"
    for flag in ORDER_FLAGS:
        if saved[flag] != now[flag]:
            raise UserError(
                f"--{flag}={now[flag]}, but the checkpoint was trained with {quote(saved[flag])}, and the order of the"
                f" data depends on it; set it back, or {new_run}"
            )
    old, new = _sources(saved), _sources(now)
    for name in sorted(old.keys() ^ new.keys()):
        what = f"source {quote(name)}" if name else "a single glob without name=weight:"
        when = (
            "belongs to the checkpoint and is missing now" if name in old else "is new since the checkpoint was written"
        )
        raise UserError(f"--input_train_bin: {what} {when}; set it back, or {new_run}")
    for name in old:
        if old[name]["weight"] != new[name]["weight"]:
            raise UserError(
                f"--input_train_bin: source {name} has a share of {new[name]['weight']}, but the checkpoint was trained"
                f" with {quote(old[name]['weight'])}; set it back, or {new_run}"
            )
        where = f"--input_train_bin: source {name}: " if name else "--input_train_bin: "
        _check_same_shards(old[name]["shards"], new[name]["shards"], where, new_run)


def _sources(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Returns the sources by name. A single glob is one source without a name."""
    sources = fingerprint.get("sources") or [{"name": "", "weight": 1, "shards": fingerprint["shards"]}]
    return {source["name"]: source for source in sources}


def _check_same_shards(saved: list[dict[str, Any]], now: list[dict[str, Any]], where: str, new_run: str) -> None:
    if saved == now:
        return
    before, after = ([shard["name"] for shard in shards] for shards in (saved, now))
    added, missing = ([n for n in a if n not in b] for a, b in ((after, before), (before, after)))
    if added and not missing:
        what = f"{added[0]} is new" if len(added) == 1 else f"{len(added)} shards are new (first: {added[0]})"
        raise UserError(f"{where}{what} since the checkpoint was written; to train on more data, {new_run}")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"{quote(missing[0])}{more}, on which the checkpoint was trained, is missing"
    else:
        odd = next((n["name"] for n, o in zip(now, saved, strict=False) if n != o), after[-1])
        what = f"{odd} is not the file the checkpoint was trained on"
    raise UserError(f"{where}{what}; restore the shards, or {new_run}")


# --- tokenizers: {"name", "vocab_size", "sha256"}, or the name alone where the files were not read ---


def same_tokenizer(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Compares two fingerprints by hash, or by name if one of them has no hash."""
    return a["sha256"] == b["sha256"] if "sha256" in a and "sha256" in b else a["name"] == b["name"]


def check_same_tokenizer(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that a checkpoint was trained with this tokenizer. The name `none` matches every tokenizer."""
    if "none" not in (saved["name"], now["name"]) and not same_tokenizer(saved, now):
        raise UserError(
            f"--tokenizer={now['name']}, but the checkpoint was trained with {quote(saved['name'])}"
            f"{', whose files have changed since' if now['name'] == saved['name'] else ''};"
            f" set it back, or use another --output_dir"
        )


def check_shards_tokenizer(paths: Iterable[Path], fingerprint: dict[str, Any], vocab_size: int, flag: str) -> None:
    """Checks that the manifests beside the shards name this tokenizer, whose ids must fit `vocab_size`.

    The name `none` matches every tokenizer that fits. Shards without a rawgpt manifest pass.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        made = tokenizer_in_manifest(folder)
        if made is None:
            continue
        if fingerprint["name"] != "none" and not same_tokenizer(made, fingerprint):
            changed = ", whose files have changed since" if made["name"] == fingerprint["name"] else ""
            raise UserError(
                f"--{flag}: the shards in {folder} were made with tokenizer {quote(made['name'])}, but"
                f" --tokenizer={fingerprint['name']}{changed}; give --tokenizer={quote(made['name'])}, or other shards"
            )
        if not made["vocab_size"] <= vocab_size <= made["vocab_size"] + MAX_UNUSED_IDS:
            raise UserError(
                f"--{flag}: the shards in {folder} were made with tokenizer {quote(made['name'])}, which has"
                f" {made['vocab_size']} ids, but the model has --vocab_size={vocab_size}; give"
                f" --vocab_size={made['vocab_size']}, or other shards"
            )


def tokenizer_in_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the tokenizer's fingerprint in a folder's manifest.json, or None without a manifest by rawgpt.

    The first versions of rawgpt wrote only the tokenizer's name.
    """
    try:
        made = read_json(folder / "manifest.json")["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if made in ("gpt2", "gpt2-fim"):
        return NAMED_FINGERPRINTS[made]
    kinds = {"name": str, "vocab_size": int, "sha256": str}
    valid = isinstance(made, dict) and all(isinstance(made.get(key), kind) for key, kind in kinds.items())
    return made if valid else None
