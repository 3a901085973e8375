"""A checkpoint in another form: `python scripts/export.py --checkpoint RUN --to consolidated --output FOLDER`.

consolidated: the parameters that many ranks wrote, whole, in one file, FOLDER/model/model.safetensors, with what
describes them beside it; evaluation takes the folder as it takes a checkpoint. Needs memory for the model, none for
the optimizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cfg.errors import CommandParser, UserError, one_line_errors, run_command


def parser() -> CommandParser:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="an output_dir, or one checkpoint in it")
    parser.add_argument("--to", choices=["consolidated"], default="consolidated", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; must not exist")
    return parser


if __name__ == "__main__":
    with one_line_errors():
        args = parser().parse_args()  # before torch is imported, so that --help and mistakes are answered at once

import json
import os
import shutil
import tempfile

import torch
from safetensors.torch import save_file

from cfg.files import file_sha256, flush_to_disk
from model.weights import MANIFEST, find_checkpoint, load_tensors, read_manifest, tensor_shapes


def consolidate(checkpoint: Path, folder: Path) -> int:
    """Writes the model of `checkpoint`, whole, into the empty `folder`; returns the number of values in it."""
    manifest = read_manifest(checkpoint)
    for name in manifest["files"]:
        if "/" not in name:  # state, tokenizer
            shutil.copy(checkpoint / name, folder / name)
    tensors = {name: torch.empty(shape) for name, shape in tensor_shapes(checkpoint, "model").items()}
    load_tensors(checkpoint, "model", tensors)
    (folder / "model").mkdir()
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest["files"] = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST]:
        flush_to_disk(path)
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    if args.output.exists():
        raise UserError(f"--output={args.output} is already there; choose another name")
    found = find_checkpoint(args.checkpoint)
    if found is None:
        raise UserError(f"--checkpoint={args.checkpoint}: holds no checkpoint")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f".{args.output.name}.") as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        count = consolidate(found, folder)
        os.rename(folder, args.output)
    size = (args.output / "model" / "model.safetensors").stat().st_size
    print(f"{args.output}: {count:,} values of {found}, {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_command(main)
