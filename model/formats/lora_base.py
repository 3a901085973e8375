"""The base model of a LoRA run. Checkpoints record its name and fingerprints, and readers use them to open it again.

A checkpoint holds only what was trained. Reading it as a model opens the base and merges the adapters into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from util.errors import StorageError, UserError, quote

if TYPE_CHECKING:
    from torch import Tensor

    from model.formats.raw import Reader

SAMPLE = 4096  # values of a parameter that its fingerprint covers


@runtime_checkable
class Merger(Protocol):
    """A reader that merges adapters into weights: CheckpointMerger here, and PeftMerger in peft.py."""

    def fingerprint(self, name: str, value: Tensor) -> str:
        """Returns the fingerprint of a parameter from the weight and the adapter that are merged."""
        ...


@dataclass
class Base:
    """The base of a run: an absolute name, as --init_from takes it, and the fingerprints of its frozen parameters."""

    init_from: str
    parameters: dict[str, str] = field(default_factory=dict)  # name → fingerprint, filled while weights are read

    def to_json(self) -> dict[str, Any]:
        """Returns what state.json holds under "base"."""
        listed = "".join(f"{name} {digest}\n" for name, digest in sorted(self.parameters.items()))
        return {
            "init_from": self.init_from,
            "sha256": hashlib.sha256(listed.encode()).hexdigest(),
            "parameters": dict(self.parameters),
        }

    def recording(self, read: Reader, names: Iterable[str]) -> Reader:
        """Returns a reader that also records fingerprints of the parameters `names`."""
        recorded = set(names)

        def read_and_record(name: str) -> Tensor:
            value = read(name)
            if name in recorded:
                self.parameters[name] = fingerprint(name, value, read)
            return value

        return read_and_record

    def difference(self, other: Base) -> str:
        """Returns the name of a parameter that differs from the other base, or ""."""
        names = sorted(self.parameters.keys() | other.parameters.keys())
        return next((n for n in names if self.parameters.get(n) != other.parameters.get(n)), "")


def fingerprint(name: str, value: Tensor, read: Reader | None = None) -> str:
    """Returns the sha256 of a parameter's name, shape and a sample of its values, evenly spaced, in fp32.

    The parameter is whole, without vocabulary padding. If `read` merges adapters, hashes the unmerged weight and the
    adapter instead: the merged product rounds differently on other machines.
    """
    if isinstance(read, Merger):
        return read.fingerprint(name, value)
    flat = value.detach().reshape(-1)
    sample = flat[:: max(1, -(-flat.numel() // SAMPLE))].float().numpy().astype("<f4")
    return hashlib.sha256(f"{name} {tuple(value.shape)}\n".encode() + sample.tobytes()).hexdigest()


def base_in_state(state: dict[str, Any], path: Path) -> Base:
    """Returns the base that the state.json of the checkpoint `path` records."""
    base = state.get("base")
    if not (
        isinstance(base, dict)
        and isinstance(base.get("init_from"), str)
        and isinstance(base.get("parameters"), dict)
        and Base(base["init_from"], base["parameters"]).to_json()["sha256"] == base.get("sha256")
    ):
        raise UserError(f"{path / 'state.json'}: the name of the base model is missing or invalid; the file is damaged")
    return Base(base["init_from"], base["parameters"])


def recorded_base(output_dir: Path, resume: str) -> Base | None:
    """Returns the base of the run that --output_dir and --resume continue, or None for a fresh start or no base."""
    from model.formats.checkpoint import checkpoints_at, list_checkpoints, read_state

    if resume == "never":
        return None
    paths = list_checkpoints(output_dir)
    if resume != "auto":
        paths += checkpoints_at(Path(resume))
    for path in paths:
        with suppress(UserError, StorageError, OSError):
            return base_in_state(read_state(path), path)
    return None


def check_same_base(path: Path, saved: Base, now: Base) -> None:
    """Raises UserError if a run's base is not the one from which the checkpoint `path` was trained."""
    if name := saved.difference(now):
        raise UserError(
            f"--init_from={now.init_from}: {path} was trained from other weights, {saved.init_from} ({name} differs);"
            f" give those, or use another --output_dir"
        )


def merging_reader(
    path: Path, read_own: Reader, own: Iterable[str], flags: dict[str, Any], open_base: Callable[[str], Reader]
) -> Reader:
    """Returns `read(name)` for a LoRA checkpoint: its own parameters, and those of its base with adapters merged.

    `read_own` reads the parameters `own` that the checkpoint holds. `flags` are those of its run. `open_base` opens a
    model by its name. Each parameter of the base is compared with its fingerprint.
    """
    from model.formats.checkpoint import read_state

    base = base_in_state(read_state(path), path)
    try:
        read_base = open_base(base.init_from)
    except UserError as e:
        raise type(e)(
            f"{path} holds LoRA adapters, and their base model cannot be read ({e}); put {quote(base.init_from)} back"
        ) from e
    return CheckpointMerger(path, base, read_base, read_own, frozenset(own), flags["lora_alpha"] / flags["lora_rank"])


@dataclass(frozen=True)
class CheckpointMerger:
    """`read(name)` for a LoRA checkpoint."""

    path: Path
    base: Base
    read_base: Reader
    read_own: Reader
    own: frozenset[str]  # names that the checkpoint holds
    scale: float  # of the adapters' output

    def __call__(self, name: str) -> Tensor:
        from model.lora import merge_adapter

        if name in self.own:
            return self.read_own(name)
        weight = self.read_base(name)
        if fingerprint(name, weight, self.read_base) != self.base.parameters.get(name):
            raise UserError(
                f"{self.path}: its base model {self.base.init_from} has changed since the adapters were trained"
                f" ({name} differs); put the old one back"
            )
        if not (adapter := self.adapter(name)):
            return weight
        a, b = (self.read_own(n) for n in adapter)
        return merge_adapter(weight, a, b, self.scale)

    def adapter(self, name: str) -> list[str]:
        """Returns the names of A and B of a matrix, or nothing if it has no adapter."""
        from model.lora import A, B

        names = [name.removesuffix(".weight") + end for end in (A, B)]
        return names if self.own.issuperset(names) else []

    def fingerprint(self, name: str, value: Tensor) -> str:
        """Returns the fingerprint of a parameter, if this checkpoint is the base of another run."""
        adapter = self.adapter(name)
        if not adapter:
            return fingerprint(name, value)
        parts = [self.base.parameters.get(name, ""), f"{self.scale}"]
        parts += [fingerprint(n, self.read_own(n)) for n in adapter]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
