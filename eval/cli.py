"""What the commands of this room share before anything heavy is imported: flags, ranks, the file of results."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from util.errors import CommandParser, UserError
from util.files import write_atomically
from util.launcher import launched_world_size


def subject_parser(description: str | None, hf: bool = True) -> CommandParser:
    """A parser of the flags that say what is evaluated, how, and where results go; a command adds its own.

    Not `hf`, only checkpoints are.
    """
    parser = CommandParser(description=description)
    what = parser.add_mutually_exclusive_group(required=True)
    ours = "an output_dir, one checkpoint in it, or another's model, as --init_from names it: hf:FOLDER, llmc:FILE, ..."
    what.add_argument("--checkpoint", type=Path, help=ours)
    if hf:
        what.add_argument("--hf", default="", metavar="PATH", help="a Hugging Face folder or name, run by transformers")
    parser.add_argument("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the model's own)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of computing")
    parser.add_argument(
        "--batch_tokens", type=int, default=0, help="tokens in one forward pass; 0: as the device bears"
    )
    parser.add_argument("--output", type=Path, help="a .json file for the results, with all digits")
    return parser


def check(args: Any) -> None:
    """Raises UserError for what is wrong with the flags that commands share, before anything is loaded."""
    if args.batch_tokens < 0:
        raise UserError(f"--batch_tokens={args.batch_tokens} must be at least 1, or 0 for the default")
    if getattr(args, "limit", 0) < 0:
        raise UserError(f"--limit={args.limit} must be at least 1, or 0 for all")
    if args.output and my_rank()[0] == 0:
        try:
            with open(args.output, "x"):
                args.output.unlink()  # results come much later, and must then have a place
        except FileExistsError:
            raise UserError(f"--output={args.output} exists; choose another name or remove it") from None
        except OSError as e:
            raise UserError(f"--output={args.output} cannot be written: {e.strerror}") from e


def my_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun says."""
    world_size = launched_world_size()
    return (int(os.environ["RANK"]) if world_size > 1 else 0), world_size


def finish(path: Path | None, results: dict[str, Any], shown: str) -> None:
    """Writes the results, if asked, then shows them: who reads the terminal may have left. Rank 0 alone does either.

    A file that has appeared at `path` meanwhile is kept, and the results go beside it. NaN and infinity become null,
    since JSON has no number for them.
    """
    if my_rank()[0]:
        return
    if path:
        while path.exists():
            path = path.with_stem(path.stem + "_")
        write_atomically(path, (json.dumps(plain(results), allow_nan=False) + "\n").encode())
        shown += f"\nresults: {path}"
    print(shown)


def plain(value: Any) -> Any:
    """Results with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def standard_error(mean: float, n: int) -> float:
    """Of the mean of n zeros and ones, by their sample variance; NaN of one."""
    return math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan
