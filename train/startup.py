"""The start of train_gpt.py: flags are checked before torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from util.ctrl_c import exit_on_ctrl_c
from util.errors import UserError, one_line_errors
from util.launcher import die_with_launcher

if TYPE_CHECKING:
    from cfg.config import Config


def read_config() -> Config:
    """Reads the command line, so that --help and mistakes are answered at once. Ties the process to torchrun first."""
    exit_on_ctrl_c()
    die_with_launcher()
    from model.formats.pretrained import flags_to_resume

    with one_line_errors():
        return check_flags(saved_flags=lambda config: flags_to_resume(config.output_dir, config.resume))


def check_flags(
    argv: list[str] | None = None,
    world_size: int | None = None,
    saved_flags: Callable[[Config], dict[str, Any]] | None = None,
) -> Config:
    """Returns the checked flags of a run. The arguments are those of `load_config`. Does not import torch."""
    from cfg.config import load_config
    from model.formats.pretrained import open_pretrained

    def tokenizer_size(name: str) -> int:
        from data.tokenizers import load  # imports numpy, which --help does not need

        return load.tokenizer_size(name)

    config = load_config(argv, world_size, open_pretrained, tokenizer_size, saved_flags)
    if not config.input_train_bin:
        raise UserError("--input_train_bin: give the training shards; this preset has none")
    # Not in cfg/checks.py, because scripts/plan.py plans LoRA for presets too, without a pretrained model.
    if config.lora_rank and config.init_from == "scratch":
        raise UserError(f"--lora_rank={config.lora_rank}: adapters need a pretrained model; give --init_from")
    return config
