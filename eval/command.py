"""What the commands of this room share before anything heavy is imported: flags, ranks, the file of results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cfg.config import launched_world_size
from cfg.errors import CommandParser, UserError
from cfg.files import write_atomically


def subject_parser(description: str | None, hf: bool = True) -> CommandParser:
    """A parser of the flags that say what is evaluated, how, and where results go; a command adds its own.

    Not `hf`, only checkpoints are.
    """
    parser = CommandParser(description=description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="an output_dir, or one checkpoint in it")
    if hf:
        what.add_argument("--hf", default="", metavar="PATH", help="a Hugging Face folder, or a name on the hub")
    parser.add_argument("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the model's own)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of computing")
    parser.add_argument(
        "--batch_tokens", type=int, default=0, help="tokens in one forward pass; 0: as the device bears"
    )
    parser.add_argument("--output", type=Path, help="a .json file for the results, with all digits")
    return parser


def check(args: Any) -> None:
    """Raises UserError for what is wrong with the flags of `subject_parser`, before anything is loaded."""
    if args.batch_tokens < 0:
        raise UserError(f"--batch_tokens={args.batch_tokens} must be at least 1, or 0 for the default")
    if args.output and args.output.exists():
        raise UserError(f"--output={args.output} exists; choose another name or remove it")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output={args.output}: there is no folder {args.output.parent}")


def my_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun says."""
    world_size = launched_world_size()
    return (int(os.environ["RANK"]) if world_size > 1 else 0), world_size


def write_output(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        write_atomically(path, (json.dumps(results) + "\n").encode())
        print(f"results: {path}")
