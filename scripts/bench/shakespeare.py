"""Tiny Shakespeare on a CPU, compared with nanoGPT: `python scripts/bench/shakespeare.py --nanogpt DIR`.

Runs nanoGPT's own train.py with the recipe for a CPU in its README, then train_gpt.py with --cfg=shakespeare-bytes and
with --cfg=modern-shakespeare, one after the other on --threads threads. The time of a run is that of its whole command.
Then eval/perplexity.py scores the validation split, the last tenth of the text, with each model, at the context length
of its training. nanoGPT predicts characters. All of them are ASCII, so bits per character are bits per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cfg.config import load_config
from data import assets
from util.errors import CommandParser, UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
NANOGPT = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --block_size=64
    --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0""".split()
PRESETS = ("shakespeare-bytes", "modern-shakespeare")


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="DIR", help="a copy of nanoGPT")
    parser.add_argument("--threads", type=int, default=1)
    args, flags = parser.parse_known_args()  # other flags are for train_gpt.py
    if not (args.nanogpt / "train.py").is_file():
        raise UserError(f"--nanogpt={args.nanogpt}: has no train.py; name the folder of a copy of nanoGPT")
    for preset in PRESETS:
        load_config([f"--cfg={preset}", *flags], 1)  # finds a mistake before nanoGPT trains
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results = {"nanoGPT": run_nanogpt(args.nanogpt, folder, args.threads)}
        for preset in PRESETS:
            print(json.dumps(results), flush=True)
            results[preset] = run_rawgpt(preset, folder, args.threads, flags)
    print(json.dumps(results | {"threads": args.threads, "flags": flags}))


def run_nanogpt(source: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Trains nanoGPT in a copy of its folder, because it writes there, and returns times and bits per byte."""
    copy = folder / "nanogpt"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", "out*"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(assets.fetch("tinyshakespeare.txt"), data / "input.txt")
    run([str(data / "prepare.py")], copy, threads)
    times = run(NANOGPT, copy, threads)
    return times | score(f"nanogpt:{copy}/out-shakespeare-char/ckpt.pt", data / "val.bin", threads)


def run_rawgpt(preset: str, folder: Path, threads: int, flags: list[str]) -> dict[str, Any]:
    """Trains a preset and returns times and bits per byte."""
    data, output = folder / "shards", folder / preset
    run(["data/tiny_shakespeare.py", "--tokenizer=bytes", f"--output_dir={data}"], ROOT, threads)
    where = [f"--input_train_bin={data}", f"--input_val_bin={data}", f"--output_dir={output}", "--device=cpu"]
    times = run(["train_gpt.py", f"--cfg={preset}", *where, *flags], ROOT, threads)
    return times | score(str(output), data / "tiny_shakespeare_val.bin", threads)


def run(words: list[str], folder: Path, threads: int) -> dict[str, float]:
    """Runs a Python script in `folder` and returns the seconds and the CPU seconds that it took."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *words], cwd=folder, env=env, check=True, stdout=sys.stderr)
    now = os.times()
    cpu = now.children_user + now.children_system - before.children_user - before.children_system
    return {"wall_s": time.perf_counter() - started, "cpu_s": cpu}


def score(checkpoint: str, shard: Path, threads: int) -> dict[str, float]:
    """Returns the bits per byte of a validation shard in which every token is a byte."""
    output = shard.with_suffix(".json")
    run(
        ["eval/perplexity.py", "--checkpoint", checkpoint, "--input", str(shard), f"--output={output}"]
        + ["--device=cpu"],
        ROOT,
        threads,
    )
    return {"bits_per_byte": json.loads(output.read_text())["loss"] / math.log(2)}


if __name__ == "__main__":
    run_command(main)
