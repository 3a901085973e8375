"""Compares the modern recipe with GPT-2's: `python scripts/bench/tokens_to_loss.py FILES --folder DIR`.

Trains small models on the CPU: with GPT-2's recipe on 3M tokens, and with that of --cfg=modern-124m on a half and on a
third of them. A factor scales all learning rates of a recipe. Each recipe runs once at two factors. While the best is
the lowest or the highest, half or twice of it is tried too, up to five in all. Three other seeds run at the best. The
modern recipe also runs on a third of the tokens with one part replaced by GPT-2's, and GPT-2's with an untied head. All
runs have the same depth, width, shards and validation tokens.

The vocabulary (4,096 tokens), the shards and the runs are in DIR, and the results in --output. Repeat the command to
resume: runs in --output are skipped, interrupted runs resume. Prints the results as tables in Markdown; with --show it
does nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # before all else: this folder holds a tokenize.py
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import math
import os
import statistics
import subprocess
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from typing import Any

from util.errors import CommandParser, UserError, run_command
from util.files import read_json, write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "tokens_to_loss.json"
TOKENS = 3_000_000
BATCH = 6144
SIZE = f"""--n_layer=3 --n_embd=128 --n_head=2 --sequence_length=256 --batch_size=8 --total_batch_size={BATCH}
    --vocab_size=4096 --device=cpu --dtype=float32 --compile=0 --tensorcores=0 --val_loss_every=0 --val_max_steps=30
    --save_every_niter=100 --keep_last=1 --log_every=20""".split()
# The learning rates of each recipe; a run multiplies them by its factor. Those of the embedding and the head are the
# rates of modern-124m times sqrt(768 / width), nanochat's rule.
RATES = {
    "gpt2": {"learning_rate": 4e-3},
    "gpt2-untied": {"learning_rate": 4e-3},
    "modern": {"matrix_lr": 0.025, "embedding_lr": 0.73, "head_lr": 0.0098},
}
FLAGS = {
    "gpt2": ["--schedule=cosine", "--learning_rate_decay_frac=0.1"],
    "gpt2-untied": ["--schedule=cosine", "--learning_rate_decay_frac=0.1", "--tie_embeddings=0"],
    "modern": ["--cfg=modern-124m"],
}
RECIPES = (("gpt2", 1.0), ("modern", 1 / 2), ("modern", 1 / 3), ("gpt2-untied", 1.0))  # with the part of TOKENS
FACTORS = (0.5, 1.0)  # those tried first
MAX_FACTORS = 5
SEEDS = (2, 3, 4)  # seed 1 chooses the learning rate
# Each replaces one part of the modern recipe by GPT-2's, with the settings that this part needs.
ABLATIONS = {
    "AdamW instead of Muon": "--optimizer=adamw --beta1=0.9 --adam_eps=1e-8 --weight_decay=0.1 --embedding_std=0.02",
    "cosine to 0.1 of the peak": "--schedule=cosine --learning_rate_decay_frac=0.1",
    "learned positions": "--positions=learned",
    "LayerNorm with weights": "--norm=layernorm --norm_weight=1",
    "no norm of the embedding": "--embedding_norm=0 --embedding_std=0.02",
    "GELU": "--mlp=gelu",
    "no QK-norm": "--qk_norm=0",
    "no soft cap": "--logit_softcap=0",
    "tied head": "--tie_embeddings=1 --head_init=normal --embedding_std=0.02",
    "GPT-2's initial projections and head": "--zero_init=0 --head_init=normal",
}


@dataclass(frozen=True)
class Setting:
    """A run: recipe, part of TOKENS, factor of the learning rates, seed, and the part replaced by GPT-2's, if any."""

    recipe: str
    part: float
    factor: float
    seed: int = 1
    without: str = ""

    @property
    def name(self) -> str:
        name = f"{self.recipe}-{self.part:.2f}-{self.factor:g}-{self.seed}"
        return f"{name}-without-{list(ABLATIONS).index(self.without)}" if self.without else name

    @property
    def steps(self) -> int:
        return round(self.part * TOKENS / BATCH)

    @property
    def tokens(self) -> int:
        return self.steps * BATCH

    def flags(self) -> list[str]:
        """Returns the flags for train_gpt.py, without paths."""
        rates = dict(RATES[self.recipe])
        if self.without == "AdamW instead of Muon":
            rates = RATES["gpt2"]
        if self.without == "LayerNorm with weights":
            rates["scalar_lr"] = 0.015
        if self.without == "tied head":
            del rates["head_lr"]
        warmup = [] if self.recipe == "modern" else [f"--warmup_iters={self.steps // 20}"]
        return [
            *FLAGS[self.recipe],
            *SIZE,
            f"--num_iterations={self.steps}",
            *warmup,
            *(f"--{flag}={rate * self.factor:g}" for flag, rate in rates.items()),
            *ABLATIONS.get(self.without, "").split(),
            f"--seed={self.seed}",
        ]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="*", metavar="FILE", help="text, as for data/text.py; at least 4M tokens")
    parser.add_argument("--folder", type=Path, help="where vocabulary, shards and runs are written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread (default: 2)")
    parser.add_argument("--show", action="store_true", help="print the results only")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: must be at least 1")
    results = read_results(args.output)
    if args.show and not results:
        raise UserError(f"--output={args.output}: no results yet; run the command without --show")
    if not args.show:
        if args.folder is None or not args.input:
            raise UserError("--folder: missing; give FILE, the text, and a folder for vocabulary, shards and runs")
        prepare(args.input, args.folder)
        train_all(results, args)
    print(tables(results))


def read_results(path: Path) -> dict[Setting, dict[str, Any]]:
    """Returns the results in a file, or none if it does not exist."""
    if not path.exists():
        return {}
    try:
        return {Setting(**run.pop("setting")): run for run in read_json(path)}
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"--output={path}: not a file of this command ({e}); restore it, or name another") from e


def write_results(path: Path, results: dict[Setting, dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps({"setting": asdict(setting), **result}) for setting, result in results.items())
    write_atomically(path, f"[\n{lines}\n]\n".encode())


def prepare(files: list[str], folder: Path) -> None:
    """Trains the tokenizer and writes the shards, unless they are there."""
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        words = ["data/train_tokenizer.py", *files, f"--output={tokenizer}", "--vocab_size=4096", "--special_tokens="]
        run([*words, "--max_bytes=50M"])
    words = ["data/text.py", *files, f"--output_dir={folder / 'shards'}", f"--tokenizer={tokenizer}"]
    run([*words, "--max_tokens=4M", "--val_tokens=500_000"])


def run(words: list[str]) -> None:
    """Runs one of rawgpt's commands. If it fails, its error is printed already; exits with its exit code."""
    if code := subprocess.call([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=sys.stderr):
        sys.exit(code)


def train_all(results: dict[Setting, dict[str, Any]], args: argparse.Namespace) -> None:
    """Trains the models that are not in `results`, `--jobs` at a time, and adds each when it is done."""
    running: dict[Future[dict[str, Any]], Setting] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            todo = [s for s in next_runs(results) if s not in results and s not in running.values()]
            for setting in todo[: args.jobs - len(running)]:
                running[pool.submit(train, setting, args.folder)] = setting
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                setting = running.pop(future)
                results[setting] = future.result()
                write_results(args.output, results)
                print(f"{setting.name}: {results[setting]}", file=sys.stderr, flush=True)


def next_runs(results: dict[Setting, dict[str, Any]]) -> list[Setting]:
    """Returns the runs that can be chosen now, the most important first; the others depend on results of these."""
    compared = [s for recipe, part in RECIPES if recipe != "gpt2-untied" for s in runs_of(results, recipe, part)]
    untied = [s for recipe, part in RECIPES if recipe == "gpt2-untied" for s in runs_of(results, recipe, part)]
    if any(s not in results for s in compared):
        return [*compared, *untied]
    return [*compared, *(without(results, change) for change in ABLATIONS), *untied]


def runs_of(results: dict[Setting, dict[str, Any]], recipe: str, part: float) -> list[Setting]:
    """Returns the runs of a recipe: those that choose the learning rate, and then those with the other seeds."""
    factors = sorted({*FACTORS, *(s.factor for s in results if s == Setting(recipe, part, s.factor))})
    runs = [Setting(recipe, part, factor) for factor in factors]
    if any(s not in results for s in runs):
        return runs
    best = best_factor(results, recipe, part)
    if best in (factors[0], factors[-1]) and len(factors) < MAX_FACTORS:
        return [*runs, Setting(recipe, part, best / 2 if best == factors[0] else best * 2)]
    return runs + [Setting(recipe, part, best, seed) for seed in SEEDS]


def best_factor(results: dict[Setting, dict[str, Any]], recipe: str, part: float) -> float:
    """Returns the factor of the learning rates that gave the lowest loss, of those that have been tried."""
    losses = {
        s.factor: run.get("val_loss", math.inf) for s, run in results.items() if s == Setting(recipe, part, s.factor)
    }
    return min(losses, key=losses.__getitem__)


def without(results: dict[Setting, dict[str, Any]], change: str) -> Setting:
    """Returns the modern recipe on a third of the tokens without one part, at its own best rates or AdamW's."""
    adamw = change == "AdamW instead of Muon"
    factor = best_factor(results, "gpt2", 1.0) if adamw else best_factor(results, "modern", 1 / 3)
    return Setting("modern", 1 / 3, factor, without=change)


def train(setting: Setting, folder: Path) -> dict[str, Any]:
    """Trains one model, or resumes it, and returns its validation loss, or how it failed."""
    output = folder / "runs" / setting.name
    paths = {"input_train_bin": folder / "shards", "input_val_bin": folder / "shards", "output_dir": output}
    flags = [*setting.flags(), f"--tokenizer={folder / 'tokenizer'}", *(f"--{k}={v}" for k, v in paths.items())]
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (output / "console.log").open("a") as console:
        command = [sys.executable, str(ROOT / "train_gpt.py"), *flags]
        code = subprocess.call(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=console, stderr=console)
    seconds = time.perf_counter() - started
    status = read_json(output / "status.json")["status"] if (output / "status.json").exists() else "not started"
    if status in ("stopped", "interrupted", "out of time", "running"):  # running: it was killed
        raise UserError(f"{setting.name}: {status}; repeat the command to resume")
    if code not in (0, 3):  # such as a full disk; 3: the run diverged
        raise UserError(f"{setting.name}: exit code {code}, see {output}/console.log; repeat the command to try again")
    if code:
        return {"failed": f"exit code {code}: {(output / 'console.log').read_text().splitlines()[-1]}"}
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    return {"tokens": setting.tokens, "val_loss": losses[-1], "seconds": round(seconds)}


def tables(results: dict[Setting, dict[str, Any]]) -> str:
    """Returns the results as Markdown: the recipes compared, the learning rates, the parts replaced."""
    losses = {setting: result["val_loss"] for setting, result in results.items() if "val_loss" in result}
    text = "| recipe | tokens | learning rates | validation loss, mean of n seeds | n | difference from gpt2"
    text += " | p (one-sided Welch) |\n"
    text += "|---|---|---|---|---|---|---|\n"
    seeded = sorted((s for s in losses if s.seed != 1), key=lambda s: (s.name, s.seed))
    groups = {
        replace(s, seed=0): [losses[t] for t in seeded if replace(t, seed=0) == replace(s, seed=0)] for s in seeded
    }
    base = next((values for s, values in groups.items() if s.recipe == "gpt2"), [])
    for s, values in groups.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        mean = statistics.mean(values)
        row = f"| {s.recipe} | {s.tokens:,} | × {s.factor:g} | {mean:.4f} ± {spread:.4f} | {len(values)} |"
        compared = s.recipe != "gpt2" and min(len(values), len(base)) > 1
        difference = f" {mean - statistics.mean(base):+.4f} | {welch(values, base):.2g} |"
        text += row + (difference if compared else "  |  |") + "\n"
    factors = sorted({s.factor for s in results if not s.without})
    text += "\n| recipe | tokens |" + "".join(f" rates × {factor:g} |" for factor in factors)
    text += "\n|---|---|" + "---|" * len(factors) + "\n"
    for recipe, part in RECIPES:
        runs = [Setting(recipe, part, factor) for factor in factors]
        text += f"| {recipe} | {runs[0].tokens:,} |" + "".join(f" {outcome(results.get(s))} |" for s in runs) + "\n"
    text += f"\n| modern on {TOKENS / 3e6:g}M tokens with | validation loss, one seed | difference |\n|---|---|---|\n"
    for s in (s for s in results if s.without):
        whole = losses.get(Setting("modern", 1 / 3, best_factor(results, "modern", 1 / 3)))
        change = f"{losses[s] - whole:+.4f}" if whole is not None and s in losses else ""
        text += f"| {s.without} | {outcome(results[s])} | {change} |\n"
    return text


def outcome(result: dict[str, Any] | None) -> str:
    return "" if result is None else f"{result['val_loss']:.4f}" if "val_loss" in result else result["failed"]


def welch(lower: list[float], higher: list[float]) -> float:
    """Returns the p-value of the one-sided Welch test that the mean of `lower` is below that of `higher`."""
    from scipy.stats import ttest_ind  # installed with tests/requirements.txt

    return float(ttest_ind(lower, higher, equal_var=False, alternative="less").pvalue)


if __name__ == "__main__":
    run_command(main)
