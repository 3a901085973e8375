"""`python data/fineweb_edu.py`: FineWeb-Edu as token shards, by default its sample of 10 billion tokens.

FineWeb-Edu (Penedo et al. 2024, huggingface.co/datasets/HuggingFaceFW/fineweb-edu) consists of parquet files. They are
read over the network while the text is encoded, downloaded first with --download, or read from disk with --input. The
first shard is for validation. After an interruption, repeat the command to resume.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from util.ctrl_c import exit_on_ctrl_c

    exit_on_ctrl_c()

from data.prepare.cli import add_flags, check, check_flags, run
from data.prepare.inputs import input_files
from data.prepare.job import MANIFEST, PARTIAL
from data.prepare.journal import RECIPE, read_object
from util.errors import CommandParser, UserError, closest, run_command

REPOSITORY = "HuggingFaceFW/fineweb-edu"
DATA = Path(__file__).resolve().parent


def files_of_earlier_command(output_dir: Path, name: str) -> list[str]:
    """Returns the addresses that an earlier command or another part used for this configuration, or [].

    The hub's newest revision may have changed since, and a complete data set needs no network.
    """
    for place in (output_dir, *sorted(output_dir.glob("part_*_of_*"))):
        for path in (place / MANIFEST, place / PARTIAL / RECIPE):
            content = read_object(path)
            recipe = content.get("recipe", content)
            if recipe.get("configuration") == name:
                return [row["name"] for row in recipe["source"]]
    return []


def hub_files(repository: str, name: str, revision: str | None, download: bool) -> list[str]:
    """Returns the addresses of a configuration's parquet files at a fixed revision, or with `download` local paths."""
    try:
        import datasets
    except ImportError as e:
        raise UserError(
            "FineWeb-Edu is downloaded through the package datasets: pip install datasets, or give --input"
        ) from e
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    print(f"asking huggingface.co for the files of {repository} {name} ...", file=sys.stderr, flush=True)
    try:
        known = datasets.get_dataset_config_names(repository, revision=revision)
        if name not in known:
            near = closest(name, known)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(known[:6])}, …"
            raise UserError(f"--name={name}: {repository} has no such configuration; {hint}")
        builder = datasets.load_dataset_builder(repository, name, revision=revision)
        files = [str(path) for path in builder.config.data_files["train"]]
        if download:
            files = datasets.DownloadManager().download(files)
    except (OSError, ValueError, KeyError) as e:  # network errors are subclasses of OSError
        raise UserError(
            f"--name={name}: {repository} cannot be downloaded from huggingface.co ({type(e).__name__}); check the"
            f" network, or download the parquet files elsewhere and give --input 'FOLDER/*.parquet'"
        ) from e
    return files


def default_output(name: str) -> Path:
    """Returns data/edu_fineweb10B for sample-10BT, data/edu_fineweb_CC-MAIN-2024-10 for CC-MAIN-2024-10."""
    size = re.fullmatch(r"sample-(\d+B)T", name)
    return DATA / (f"edu_fineweb{size[1]}" if size else f"edu_fineweb_{name}")


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--name",
        default="sample-10BT",
        help="configuration: sample-10BT, sample-100BT, sample-350BT, CC-MAIN-2024-10, … (default: sample-10BT)",
    )
    parser.add_argument("--input", nargs="+", default=[], metavar="GLOB", help="local parquet files")
    parser.add_argument(
        "--revision", help="commit of the data set on the hub (default: the newest, then always the first used)"
    )
    parser.add_argument("--download", action="store_true", help="download all files before reading them")
    parser.add_argument("--output_dir", type=Path, help="default: data/edu_fineweb10B for sample-10BT")
    add_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    if not re.fullmatch(r"\w[\w.-]*", args.name):  # it names the output folder
        raise UserError(f"--name={args.name} must be the name of a configuration, such as sample-10BT")
    args.output_dir = args.output_dir or default_output(args.name)
    if args.check:
        return check(args.output_dir, args.tokenizer)
    if args.input:
        files, recipe = input_files(args.input, args.format), {}
    else:
        files = [] if args.revision or args.download else files_of_earlier_command(args.output_dir, args.name)
        files = files or hub_files(REPOSITORY, args.name, args.revision, args.download)
        recipe = {} if args.download else {"configuration": args.name}
    run(args, "edufineweb", files, recipe, val_tokens=args.shard_size)


if __name__ == "__main__":
    run_command(main)
