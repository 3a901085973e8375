"""`python data/text.py FILE_OR_GLOB... --output_dir DIR`: token shards from any text.

A document is a .txt or .md file, or its part between <|endoftext|> markers; a line of .jsonl, .ndjson or .json, or an
item of a JSON list; or a row of .parquet (the field --text_key). All but .parquet may be compressed (.gz, .zst, .bz2,
.xz). A folder stands for all text files below it, and hf:OWNER/NAME[/CONFIG][:SPLIT] for a data set of the Hugging Face
hub. `--mixture FILE` draws from several sources by weight instead (data/prepare/mixture.py describes the file). The
first tokens become DIR/NAME_val_000000.bin, the rest DIR/NAME_train_%06d.bin. After an interruption, repeat the command
to resume.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from util.ctrl_c import exit_on_ctrl_c

    exit_on_ctrl_c()

from data.prepare.cli import add_flags, check, check_flags, run
from data.prepare.inputs import input_files
from util.errors import CommandParser, UserError, run_command


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("inputs", nargs="*", metavar="FILE_OR_GLOB")
    parser.add_argument("--mixture", type=Path, metavar="FILE", help="a YAML file of sources, weights and tokens")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--name", default="", help="first part of the shards' names (default: the folder's name)")
    parser.add_argument(
        "--val_tokens",
        type=int,
        default=10**7,
        help="validation tokens, at most a tenth of all tokens (default: 10,000,000)",
    )
    add_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    if args.check:
        return check(args.output_dir, args.tokenizer)
    if not 0 <= args.val_tokens < 2**31:
        raise UserError(
            f"--val_tokens={args.val_tokens} must be from 0 to 2,147,483,647, the limit of a shard's header"
        )
    name = args.name or args.output_dir.resolve().name
    if Path(name).name != name or "_val_" in name or "_train_" in name:
        raise UserError(f"--name={name} must be a name, not a path, and must not contain _val_ or _train_")
    if bool(args.inputs) == bool(args.mixture):
        raise UserError("give either files or a --mixture")
    recipe = {"val_tokens": args.val_tokens}
    run(args, name, input_files(args.inputs, args.format), recipe, val_tokens=args.val_tokens, val_tenth=True)


if __name__ == "__main__":
    run_command(main)
