"""Speed of the data loader: `taskset -c 0 python scripts/bench/loader.py`.

Writes shards of random tokens to a temporary folder, reads them once so that they are in the page cache, and measures
`Loader.batch` over shuffled windows, including the check of the ids. GB/s counts the bytes of the tokens in the file
(uint16). Prints one JSON line per sequence length: the median of the rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import json
import platform
import statistics
import tempfile
import time

import numpy as np
import torch

from data.loader import Loader
from data.shards import open_shard, write_shard
from util.errors import CommandParser, run_command

VOCAB_SIZE = 50257


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--sequence_length", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens_per_batch", type=int, default=2**19)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="batches per round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        paths = [Path(folder) / f"bench_train_{i:06d}.bin" for i in range(4)]
        for path in paths:
            write_shard(path, rng.integers(0, VOCAB_SIZE, 25_000_000, dtype=np.uint16), VOCAB_SIZE)
        shards = [open_shard(path, VOCAB_SIZE, check_all=True) for path in paths]  # reads the whole file
        for length in args.sequence_length:
            loader = Loader(shards, length, args.tokens_per_batch // length, 1337, True, "input_train_bin")
            tok_per_s = []
            for first in range(1, args.rounds * args.steps + 1, args.steps):
                start = time.perf_counter()
                for step in range(first, first + args.steps):
                    loader.batch(step)
                tok_per_s.append(args.steps * args.tokens_per_batch / (time.perf_counter() - start))
            figures = {
                "sequence_length": length,
                "gb_per_s": round(statistics.median(tok_per_s) * 2 / 1e9, 3),
                "tok_per_s": round(statistics.median(tok_per_s)),
                "lowest_to_highest": [round(f(tok_per_s) * 2 / 1e9, 3) for f in (min, max)],
            }
            versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
            print(json.dumps(figures | versions))


if __name__ == "__main__":
    run_command(main)
