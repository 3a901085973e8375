"""The command line and the presets of train_gpt.py, read into one checked `Config`.

torch is not imported here, so that --help and errors in flags are printed at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cfg.checks import PATH_FLAGS, check_model, check_rates, check_run, largest_divisor
from cfg.flags import DEFAULT_OUTPUT_DIR, GROUPS, Config, ModelConfig, shown_default, training_only_flags, type_name
from cfg.other_trainers import OTHER_NAMES
from util.errors import CommandParser, UserError, closest, quote
from util.files import read_yaml
from util.launcher import launched_rank, launched_world_size

__all__ = ["Config", "ModelConfig", "load_config", "model_config", "resolve", "to_yaml"]

PRESETS = Path(__file__).resolve().parent
# Model flags that may differ from the pretrained model of --init_from: training-only flags, the padding of the
# vocabulary (rows are padded again when the weights are loaded), and the flags that extend the context.
MAY_DIFFER = training_only_flags() | {"vocab_pad", "rope_base", "rope_scaling", "sliding_window"}


def _help_line(field: FieldInfo) -> str:
    return f"{field.description} (default {shown_default(field)})".replace("%", "%%")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="train_gpt.py",
        usage="train_gpt.py [--flag=value ...]",
        description="Train a GPT. Flags take --flag=value or --flag value; booleans take 0/1/true/false,"
        " integers also 1e4, 10_000 or 0.5M (K, M, B, T).",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--cfg", metavar="NAME", help=_help_line(Config.model_fields["cfg"]))
    for group in GROUPS:
        section = parser.add_argument_group((group.__doc__ or "").strip())
        for name, field in group.model_fields.items():
            options: dict[str, Any] = {"metavar": type_name(field), "help": _help_line(field)}
            if isinstance(field.default, bool):
                options |= {"nargs": "?", "const": "1"}
            section.add_argument(f"--{name}", **options)
    return parser


def _presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _find_preset(name: str) -> Path:
    """Returns the path of cfg/NAME.yaml, or of NAME itself if it is a file."""
    for path in (PRESETS / f"{name}.yaml", Path(name)):
        if os.path.isfile(path):
            return path
    near = closest(name, _presets())
    hint = f"did you mean {near}?" if near else f"presets are {', '.join(_presets())}"
    if os.path.isfile(config := os.path.join(name, "config.yaml")):
        hint = f"did you mean --cfg={config}?"
    raise UserError(f"--cfg={quote(name)}: no such preset or file; {hint}")


def _read_preset(name: str) -> dict[str, Any]:
    """Reads a preset, given by its name or path."""
    name = os.path.expanduser(name)
    path = _find_preset(name)
    try:
        values = read_yaml(path)
    except (ValueError, OSError) as e:
        what = getattr(e, "strerror", None) or e
        raise UserError(f"--cfg={name}: {path}: {what}; a preset is lines of `flag: value`") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--cfg={name}: {path} is not a preset in YAML, which is lines of `flag: value`")
    for key in values:
        if key not in Config.model_fields:
            raise UserError(f"--cfg={name}: unknown flag {quote(key)!r} in {path}{_did_you_mean(quote(key))}")
    return values


def _did_you_mean(name: str) -> str:
    name = name.replace("-", "_")
    if name in OTHER_NAMES:
        return f"; rawgpt's flag is {OTHER_NAMES[name]}"
    near = closest(name, Config.model_fields)
    return f"; did you mean {near}?" if near else "; see --help for all flags"


def _unknown(word: str) -> UserError:
    """Returns the error about a word that the parser of the command line did not use."""
    name, equals, _ = word.partition("=")
    if name.startswith("-"):
        return UserError(f"unknown flag {quote(name)}{_did_you_mean(name.lstrip('-'))}")
    if near := closest(name, Config.model_fields) if equals else None:
        return UserError(f"unknown argument {quote(word)}; did you mean --{near}?")
    is_file = name.endswith((".yaml", ".yml")) and os.path.isfile(name)
    preset = name if is_file else closest(Path(name).stem, _presets())
    hint = f"did you mean --cfg={preset}?" if preset else "flags begin with --; see --help"
    return UserError(f"unknown argument {quote(word)}; {hint}")


def _validate(values: dict[str, Any]) -> Config:
    try:
        return Config(**values)
    except ValidationError as e:
        raise UserError("; ".join(f"--{line}" for line in _messages(e))) from e


def _epochs(values: dict[str, Any]) -> float:
    return _validate({"num_epochs": values.get("num_epochs", 0)}).num_epochs


def _messages(error: ValidationError) -> list[str]:
    """Returns one line for each wrong value, beginning with the name of its flag."""
    return [
        f"{e['loc'][0]}={quote(e['input'])}: {e['msg'][0].lower()}{e['msg'][1:]}" if e["loc"] else e["msg"]
        for e in error.errors()
    ]


def model_config(flags: dict[str, Any], where: str) -> ModelConfig:
    """Returns the model that the flags read from a file describe; other flags among them are ignored.

    Checks each value and how they fit together, since the file may be damaged. Errors begin with `where`.
    """
    try:
        config = ModelConfig(**{name: flags[name] for name in ModelConfig.model_fields if name in flags})
        check_model(config)
    except ValidationError as e:
        raise UserError(f"{where}: not a model that rawgpt can build: {_messages(e)[0]}") from e
    except UserError as e:
        raise UserError(f"{where}: not a model that rawgpt can build: {e}") from e
    return config


def default_output_dir(config: Config) -> str:
    """Returns outdir/run-NAME. NAME is the preset or LAYERSxWIDTH, and after -from- the model of --init_from."""
    file = Path(config.cfg)  # a preset's name may contain a dot
    name = (file.stem if file.suffix in (".yaml", ".yml") else file.name) or f"{config.n_layer}x{config.n_embd}"
    if config.init_from != "scratch":
        name += "-from-" + re.split("[:/]", config.init_from.rstrip("/"))[-1]
    return DEFAULT_OUTPUT_DIR.replace("NAME", name)


def resolve(config: Config, world_size: int) -> Config:
    """Replaces the zeros that mean "derive it" and checks how the flags fit together."""
    c = config
    hidden = 64 * -(-8 * c.n_embd // (3 * 64)) if c.mlp == "swiglu" else 4 * c.n_embd
    c = c.model_copy(
        update={
            "n_kv_head": c.n_kv_head or c.n_head,
            "n_positions": c.n_positions or c.sequence_length,
            "mlp_hidden": c.mlp_hidden or hidden,
            **{name: os.path.expanduser(getattr(c, name)) for name in PATH_FLAGS},
            "total_batch_size": c.total_batch_size or c.batch_size * c.sequence_length * world_size,
        }
    )
    check_model(c)
    check_run(c, world_size)
    return c


def keep_batch(config: Config, saved: dict[str, Any], world_size: int) -> Config:
    """Keeps the total batch size of the run that is resumed, even on another number of ranks.

    `saved` are the flags of its checkpoint. If --batch_size does not divide a rank's share, it is lowered, and a line
    says so.
    """
    total, length = saved.get("total_batch_size"), config.sequence_length
    if not isinstance(total, int) or total < length or saved.get("sequence_length") != length:
        return config
    if config.total_batch_size not in (0, total):
        return config
    rows, rest = divmod(total // length, world_size)
    if rest:
        fewer = largest_divisor(total // length, world_size)
        raise UserError(
            f"--output_dir={config.output_dir}: the run to resume has --total_batch_size={total}, which is"
            f" {total // length} sequences; {world_size} ranks cannot share them equally, but {fewer} can"
        )
    size = config.batch_size
    if size and rows % size:
        size = largest_divisor(rows, config.batch_size)
        if launched_rank() == 0:
            why = f"the resumed run has {rows} sequences per step and rank"
            print(f"--batch_size={config.batch_size}: lowered to {size}; {why}")
    return config.model_copy(update={"total_batch_size": total, "batch_size": size})


def load_config(
    argv: list[str] | None = None,
    world_size: int | None = None,
    describe: Callable[[str], Any] | None = None,
    tokenizer_size: Callable[[str], int] | None = None,
    saved_flags: Callable[[Config], dict[str, Any]] | None = None,
) -> Config:
    """Parses a command line (default: sys.argv) into a checked Config. Flags win over the preset of --cfg.

    `world_size` defaults to what torchrun put into the environment. `describe` turns the value of --init_from into a
    `PretrainedModel`: callers that accept --init_from pass model.formats.pretrained.open_pretrained, which cfg/ may
    not import (docs/architecture.md, layers). Callers that accept --tokenizer pass data.tokenizers.load.tokenizer_size:
    it is the --vocab_size if none is given. `saved_flags` returns the flags in the checkpoint that a run resumes from,
    or {}; a resumed run keeps its total batch size.
    """
    argv = sys.argv[1:] if argv is None else argv
    known, rest = _parser().parse_known_args(argv)
    if rest:
        raise _unknown(rest[0])
    flags = vars(known)
    preset = _read_preset(flags["cfg"]) if flags.get("cfg") else {}
    if "num_iterations" in flags:  # replaces a preset's --num_epochs, and the other way round
        preset.pop("num_epochs", None)
    if _epochs(flags):
        preset.pop("num_iterations", None)
    values = preset | flags
    if _epochs(values) and "num_iterations" in values:
        raise UserError(f"--num_epochs={values['num_epochs']}: --num_iterations is given too; leave one of them out")
    world_size = launched_world_size() if world_size is None else world_size
    pretrained = None
    if (source := str(values.get("init_from", "scratch"))) == "scratch":
        config = _with_tokenizer_size(_validate(values), values, tokenizer_size)
    else:
        if describe is None:
            raise RuntimeError("this caller of load_config accepts --init_from: pass describe=open_pretrained")
        pretrained = describe(source)
        if "tokenizer" not in flags and values.get("tokenizer", "none") == "none":
            values["tokenizer"] = pretrained.tokenizer
        config = _with_pretrained_flags(pretrained, values)
        if config.resize_embeddings:
            config = _with_tokenizer_size(config, values, tokenizer_size)

    if config.output_dir == DEFAULT_OUTPUT_DIR:
        config = config.model_copy(update={"output_dir": default_output_dir(config)})
    if saved_flags is not None:
        config = keep_batch(config, saved_flags(config), world_size)
    config = resolve(config, world_size)
    check_rates(config, flags)
    if pretrained is not None:
        _check_against_pretrained(config, pretrained, values)
    return config


def _with_tokenizer_size(config: Config, values: dict[str, Any], tokenizer_size: Callable[[str], int] | None) -> Config:
    """Returns the config with the tokenizer's size as --vocab_size, unless `values` give one."""
    if "vocab_size" in values or config.tokenizer == "none" or tokenizer_size is None:
        return config
    return config.model_copy(update={"vocab_size": tokenizer_size(config.tokenizer)})


def _with_pretrained_flags(pretrained: Any, values: dict[str, Any]) -> Config:
    """Returns the pretrained model's flags, overridden by `values`. The context of a rotary model grows as needed."""
    left_out = training_only_flags() - {"embedding_std"}  # which Muon's rate of the embedding depends on
    shape = {k: v for k, v in pretrained.flags.items() if k in ModelConfig.model_fields and k not in left_out}
    config = _validate(shape | values)
    length = config.sequence_length if "sequence_length" in values else min(config.sequence_length, config.n_positions)
    rotary = config.positions == "rotary" and "n_positions" not in values
    positions = max(config.n_positions, length) if rotary else config.n_positions
    return config.model_copy(update={"sequence_length": length, "n_positions": positions})


def _check_against_pretrained(config: Config, pretrained: Any, values: dict[str, Any]) -> None:
    """Raises UserError if the given `values` describe another model than the pretrained weights belong to."""
    may_differ = MAY_DIFFER | ({"n_positions"} if config.positions == "rotary" else set())
    may_differ |= {"vocab_size"} if config.resize_embeddings else set()
    if pretrained.kind == "nanogpt" and config.mlp in ("gelu", "gelu_exact"):
        may_differ |= {"mlp"}  # the file does not tell which of the two
    given = pretrained.flags.keys() & values.keys() & ModelConfig.model_fields.keys()
    for name in sorted(given - may_differ):
        if (value := getattr(config, name)) != pretrained.flags[name]:
            preset = f", or --cfg={values['cfg']} if it sets it" if values.get("cfg") else ""
            resize = "; or resize it with --resize_embeddings=1"
            way_out = resize if name == "vocab_size" else f"; leave the flag out{preset}"
            raise UserError(f"--{name}={value}, but the model of --init_from has {pretrained.flags[name]}{way_out}")
    if config.resize_embeddings and "none" in (pretrained.tokenizer, config.tokenizer):
        unknown = "--tokenizer=none; give --tokenizer"
        if pretrained.tokenizer == "none":
            export = f"scripts/export.py --checkpoint={values['init_from']} --to=hf --tokenizer=ITS_TOKENIZER"
            unknown = f"the model of --init_from has no tokenizer; convert the model together with it by {export}"
        raise UserError(f"--resize_embeddings=1 needs both tokenizers, but {unknown}")


def to_yaml(config: Config) -> str:
    """Returns the resolved flags as a preset that `--cfg=PATH` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
