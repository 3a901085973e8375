"""Flags and results that the evaluation commands share. Imports nothing heavy, so that --help is fast."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from util.errors import CommandParser, UserError
from util.files import write_atomically
from util.launcher import launched_rank, launched_world_size

TEMPERATURE, TOP_K = 0.8, 50  # the defaults of generation, and of the samples of a run


def eval_parser(description: str | None, hf: bool = True) -> CommandParser:
    """Returns a parser of the flags for the model, the device and the results. Each command adds its own flags.

    `hf=False` leaves out --hf.
    """
    parser = CommandParser(description=description)
    model = parser.add_mutually_exclusive_group(required=True)
    checkpoint = "an output_dir, one checkpoint in it, or a model as --init_from names it: hf:FOLDER, llmc:FILE, ..."
    model.add_argument("--checkpoint", type=Path, help=checkpoint)
    if hf:
        model.add_argument("--hf", default="", metavar="PATH", help="a Hugging Face folder or name, for transformers")
    parser.add_argument("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the model's own)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of matrix products"
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=0, help="tokens in one forward pass; 0: chosen for the device"
    )
    parser.add_argument("--output", type=Path, help="a .json file for the results in full precision")
    return parser


def check(args: Any) -> None:
    """Checks the flags that the commands share, before anything is loaded."""
    if args.batch_tokens < 0:
        raise UserError(f"--batch_tokens={args.batch_tokens} must be at least 1, or 0 for the default")
    if getattr(args, "limit", 0) < 0:
        raise UserError(f"--limit={args.limit} must be at least 1, or 0 for all")
    if args.output and launched_rank() == 0:
        # Create and remove the file: an evaluation of an hour must not fail when it writes its results.
        try:
            with open(args.output, "x"):
                args.output.unlink()
        except FileExistsError:
            raise UserError(f"--output={args.output} exists; choose another name or remove it") from None
        except OSError as e:
            raise UserError(f"--output={args.output} cannot be written: {e.strerror}") from e


def add_sampling_flags(parser: CommandParser, max_new_tokens: int) -> None:
    """Adds the flags for drawing tokens, the device and the dtype. `max_new_tokens` is a default."""
    add = parser.add_argument
    add("--max_new_tokens", type=int, default=max_new_tokens, help="default: %(default)s")
    add(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help="0: always the most likely token (default: %(default)s, as for the samples of a run)",
    )
    add("--top_k", type=int, default=TOP_K, help="sample from the k most likely tokens; 0: all (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="sample from the smallest set of tokens with this probability; 1: all")
    add("--stop", action="append", default=[], type=_stop_string, help="end before this string; may be repeated")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of matrix products")


def _stop_string(text: str) -> str:
    """Returns the --stop string if it is not empty."""
    if not text:
        raise UserError("--stop: an empty string would stop immediately; leave out the flag")
    return text


def add_template_flag(parser: CommandParser, where: str = "") -> None:
    """Adds --chat_template. `where` begins its help."""
    parser.add_argument(
        "--chat_template",
        default="",
        metavar="TEMPLATE",
        help=f"{where}chatml, llama3, tokenizer or a file (default: tokenizer, which is the model's own)",
    )


def check_sampling(args: Any, command: str) -> None:
    """Checks the flags for drawing tokens, and that `command` runs in one process."""
    if launched_world_size() > 1:
        raise UserError(f"{command} runs in one process; start it with python instead of torchrun")
    for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0), ("seed", 0)):
        if (value := getattr(args, name, least)) < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature={args.temperature} must be a number of at least 0")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p} must be above 0 and at most 1, which keeps all tokens")


def write_results(path: Path | None, results: dict[str, Any], summary: str) -> None:
    """Writes the results to `path`, if given, then prints the summary. Does nothing on ranks other than 0.

    The file comes first, because printing fails if the terminal is gone. If a file has appeared at `path` since
    `check`, it is kept and the results get another name. NaN and infinity become null, because JSON has no number for
    them.
    """
    if launched_rank():
        return
    if path:
        while path.exists():
            path = path.with_stem(path.stem + "_")
        write_atomically(path, (json.dumps(finite_only(results), allow_nan=False) + "\n").encode())
        summary += f"\nresults: {path}"
    print(summary)


def finite_only(value: Any) -> Any:
    """Returns `value` with None in place of every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite_only(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def standard_error(mean: float, n: int) -> float:
    """Returns the standard error of the mean of n zeros and ones, from the sample variance. NaN if n is 1."""
    return math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan
