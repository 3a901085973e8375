"""The start of train_gpt.py: flags are checked before torch, which takes seconds to import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from util.ctrl_c import exit_on_ctrl_c
from util.errors import UserError, one_line_errors
from util.launcher import die_with_launcher

if TYPE_CHECKING:
    from cfg.config import Config


def read_config() -> Config:
    """Reads the command line, so that --help and mistakes are answered at once. Ties the process to torchrun first."""
    exit_on_ctrl_c()
    die_with_launcher()
    from cfg.config import load_config
    from model.formats.pretrained import flags_to_resume, open_pretrained

    def tokenizer_size(name: str) -> int:
        from data.tokenizers import load  # imports numpy, which --help does not need

        return load.tokenizer_size(name)

    with one_line_errors():
        config = load_config(
            describe=open_pretrained,
            tokenizer_size=tokenizer_size,
            saved_flags=lambda config: flags_to_resume(config.output_dir, config.resume),
        )
        if not config.input_train_bin:
            raise UserError("--input_train_bin: give the training shards; this preset has none")
        if not any(word.split("=")[0] == "--output_dir" for word in sys.argv):
            refuse_earlier_default(config)
        return config


def refuse_earlier_default(config: Config) -> None:
    """Raises UserError if `outdir`, the default of --output_dir in earlier versions, holds a run like this one.

    The same command as before would otherwise start from the beginning in the new default folder.
    """
    from cfg.config import default_output_dir
    from util.files import read_yaml

    if config.output_dir != default_output_dir(config) or Path(config.output_dir).exists():
        return
    try:
        earlier = read_yaml(Path("outdir/config.yaml"))
    except (OSError, ValueError):
        return
    same = ("cfg", "init_from", "n_layer", "n_embd")
    if isinstance(earlier, dict) and all(earlier.get(name) == getattr(config, name) for name in same):
        raise UserError(
            f"--output_dir: outdir, the default of earlier versions, holds a run of this preset and size;"
            f" resume it with --output_dir=outdir, or start a new run with --output_dir={config.output_dir}"
        )
