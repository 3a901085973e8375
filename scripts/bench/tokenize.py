"""Speed of tokenization by data/prepare/job.py compared with the usual way, on the same files and cores.

    python scripts/bench/tokenize.py --input 'FOLDER/*.parquet'

The usual way is a `multiprocessing.Pool` with one process per core. `imap` with chunksize 16 passes documents to it,
tiktoken's `encode_ordinary` encodes each, and the results are copied into a uint16 buffer that is written when a shard
is full. Both include the start of processes and tokenizers and write shards. The tokens are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # also because this file has the name of a standard module

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from data.prepare.cli import cores
from data.prepare.inputs import input_files
from data.prepare.job import tokens_in
from data.shards import write_shard
from data.tokenizers.load import load_tokenizer
from util.errors import CommandParser, UserError, run_command

SHARD = 10**7  # tokens
_encoding: Any = None


def _start() -> None:
    global _encoding
    _encoding = load_tokenizer().encoding


def _encode(text: str) -> np.ndarray:
    return np.array([50256, *_encoding.encode_ordinary(text)], np.uint16)


def _texts(paths: list[str], text_key: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    for path in paths:
        for rows in pq.ParquetFile(path).iter_batches(columns=[text_key]):
            yield from rows.column(0).to_pylist()


def usual_way(paths: list[str], text_key: str, folder: Path, processes: int) -> int:
    """Tokenizes with a pool of processes. Returns the number of tokens."""
    buffer, held, total = np.empty(SHARD, np.uint16), 0, 0
    with multiprocessing.get_context("fork").Pool(processes, _start) as pool:
        for tokens in pool.imap(_encode, _texts(paths, text_key), chunksize=16):
            total += len(tokens)
            while held + len(tokens) > SHARD:
                room = SHARD - held
                buffer[held:] = tokens[:room]
                write_shard(folder / f"usual_{total:012d}.bin", buffer, 50257)
                tokens, held = tokens[room:], 0
            buffer[held : held + len(tokens)] = tokens
            held += len(tokens)
    write_shard(folder / f"usual_{total:012d}.bin", buffer[:held], 50257)
    return total


def ours(args: argparse.Namespace, folder: Path) -> tuple[int, float]:
    """Runs the command. Returns the number of tokens and the peak memory of its processes in GiB."""
    command = [sys.executable, str(ROOT / "data" / "fineweb_edu.py"), "--input", *args.input]
    command += [f"--text_key={args.text_key}", f"--workers={args.processes}"]
    command += [f"--output_dir={folder}", f"--shard_size={SHARD}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory_of_session(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise UserError("the command failed")
    total: int = json.loads((folder / "manifest.json").read_text())["tokens"]
    return total, peak


def memory_of_session(session: int) -> float:
    """Returns the resident GiB of all processes of a session, from /proc. Shared memory counts in each."""
    pages = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pages += int(fields[21]) if int(fields[3]) == session else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def same_tokens(usual: Path, our: Path) -> bool:
    """Returns whether both wrote the same tokens."""
    streams: list[np.ndarray] = []
    for folder, order in ((usual, ["usual_*"]), (our, ["*_val_*", "*_train_*"])):
        paths = [path for pattern in order for path in sorted(folder.glob(pattern))]
        streams.append(np.concatenate(list(tokens_in(paths, 50257))))
    return np.array_equal(streams[0], streams[1])


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--text_key", default="text")
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median is reported")
    args = parser.parse_args()
    paths = input_files(args.input)
    for path in paths:
        Path(path).read_bytes()  # into the page cache
    rates: dict[str, list[float]] = {"ours": [], "usual": []}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            our, usual = Path(folder) / "ours", Path(folder) / "usual"
            usual.mkdir()
            for name in rates:
                before = time.perf_counter()
                if name == "ours":
                    total, memory = ours(args, our)
                else:
                    usual_way(paths, args.text_key, usual, args.processes)
                rates[name].append(total / (time.perf_counter() - before))
            assert same_tokens(usual, our), "the tokens differ"
    try:
        splintr = f"splintr-rs {version('splintr-rs')}"
    except PackageNotFoundError:
        splintr = "no splintr-rs"
    ours_rate, usual_rate = (statistics.median(rates[name]) for name in ("ours", "usual"))
    print(
        f"{total:,} tokens, {args.processes} processes, median of {args.repeat}\n"
        f"usual way  {usual_rate / 1e6:6.2f}M tok/s\nours       {ours_rate / 1e6:6.2f}M tok/s"
        f"  {ours_rate / usual_rate:.2f}x, same tokens; {memory:.2f} GiB in all processes\n"
        f"Python {platform.python_version()}, tiktoken {version('tiktoken')}, {splintr}"
    )


if __name__ == "__main__":
    run_command(main)
