"""Does this GPU compute the right numbers? `bash scripts/bench/gpu_check.sh [--output FILE] [--minutes N]`

Each check computes something in two ways and says how far the two may lie apart. Cheap checks come first and those
that compile last. Then evaluation, generation and a plain training loop are timed; scripts/bench/gpu_speed.py
measures training itself. It ends within --minutes. Everything goes into one JSON file, which is rewritten after each
part; a part that fails is recorded and the next one starts. Exit code 1 if any failed. It needs no data and no network.

`--device=cpu --quick` runs the checks alone, with tiny shapes and without a GPU. `--large` trains GPT-2 1558M
instead, in stages 0 and 3 and offloaded, and holds its memory against the plan; it wants 40 GB and some more minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # before all else: this folder holds a tokenize.py, as the standard library does

import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfg.config import Config, load_config
from data.documents import document_positions
from data.shards import write_shard
from eval.generate import Sampling, generate
from eval.model import in_dtype
from eval.scoring import Request, ScoringModel, gpt_forward, score_requests
from model import loss as chunked_loss
from model.loss import IGNORE_INDEX
from scripts.bench.common import Run, describe, save
from train.memory import deviation, planned_bytes
from train.metrics import peak_memory, read_records
from train.parallel import parallelize
from util.errors import CommandParser, UserError, run_command
from util.ranks import Ranks, close_ranks, init_ranks

PERIOD = 251  # the data counts modulo this, which is learned in a few steps
FULL = "--n_layer=4 --n_head=8 --n_embd=512 --sequence_length=512 --batch_size=4"
QUICK = "--n_layer=1 --n_head=4 --n_embd=64 --sequence_length=32 --batch_size=2 --vocab_size=8100"
FAMILIES = {
    "gpt2": "",
    "llama": "--positions=rotary --norm=rmsnorm --mlp=swiglu --bias=0 --tie_embeddings=0 --n_kv_head=2 --qk_norm=1"
    " --logit_softcap=2",
}
# How far apart two ways of computing the same may lie: relative difference of the loss, and of the gradients
# |a - b| / |b| in the parameter where it is largest. bfloat16 has 8 bits, and the ways round at different places.
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 1e-1)}

# Something measured: its name, its value, and the most it may be; None if it is only reported.
Figure = tuple[str, float, float | None]


@dataclass
class Bench:
    """Where and how large to check, until when, and the commands run for the part at hand."""

    device: str
    quick: bool
    folder: Path
    minutes: float  # for everything; what does not fit any more fails
    deadline: float
    commands: list[str] = field(default_factory=list)
    ranks: Ranks | None = None  # of the runs in this process

    def shape(self) -> list[str]:
        return (QUICK if self.quick else FULL).split()

    def config(self, *flags: str) -> Config:
        return load_config([*self.shape(), f"--device={self.device}", *flags], world_size=1)

    def many_rows(self) -> str:
        """A batch whose logits take several chunks of 2^27."""
        return "--batch_size=128" if self.quick else "--batch_size=32"

    def run(self, script: str, *flags: str, **env: str) -> str:
        """Standard output of one of the repository's commands. Raises RuntimeError with its last words if it fails."""
        command = [sys.executable, str(ROOT / script), *flags]
        self.commands.append(shlex.join(command))
        left = max(0.0, self.deadline - time.perf_counter())
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=os.environ | env)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{script} cut short: the {self.minutes:g} minutes are over") from None
        if done.returncode:
            raise RuntimeError(f"{script} exited with {done.returncode}: {done.stderr[-1000:].strip()}")
        return done.stdout

    def train(self, name: str, *flags: str, script: str = "train_gpt.py", **env: str) -> list[dict[str, Any]]:
        """What metrics.jsonl says after `train_gpt.py`, or a script that wraps it, with these flags."""
        output_dir = self.folder / "runs" / name
        data = f"--input_train_bin={self.folder}/count_train_*.bin"
        self.run(script, data, f"--output_dir={output_dir}", f"--device={self.device}", *flags, **env)
        return read_records(output_dir / "metrics.jsonl")


def gradients(config: Config, full_logits: bool = False) -> dict[str, Tensor]:
    """Mean loss and the gradient of every parameter, float64 on the CPU, at the initial weights on a random batch.

    Every seventh target is ignored. With --doc_mask documents are a quarter of a row long on average. With
    `full_logits` the loss is the plain F.cross_entropy.
    """
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    model = parallelize(config, Ranks(0, 0, 1, device)).gpt
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, config.sequence_length + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:, ::7] = IGNORE_INDEX
    # One id in a quarter row's tokens stands for the end of a text.
    positions = document_positions(idx % (config.sequence_length // 4), 0) if config.doc_mask else None
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        if full_logits:
            logits = model(idx, positions=positions).float().flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
        else:
            loss_sum, count = model(idx, targets, positions=positions)
            loss = loss_sum / count
    loss.backward()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.cpu().double() for name, tensor in found.items()}


EVERY_CASE = list(itertools.product(FAMILIES, LIMITS))  # every family in every dtype
# For what compiles, each family and each dtype once, as one compilation takes longer than all eager checks.
COMPILED = [("gpt2", "bfloat16"), ("llama", "float32")]


def two_ways(
    bench: Bench, cases: list[tuple[str, str]], ours: str, theirs: str = "", full_logits: bool = False
) -> Iterator[Figure]:
    """Compares loss and gradients under the flags `ours` with those under `theirs`, for each (family, dtype)."""
    for family, dtype in cases:
        flags = [*FAMILIES[family].split(), f"--dtype={dtype}"]
        one = gradients(bench.config(*flags, *ours.split()))
        other = gradients(bench.config(*flags, *(theirs or ours).split()), full_logits)
        if one.keys() != other.keys():
            raise ValueError(f"gradients of {sorted(one.keys() ^ other.keys())} on one side only")
        apart = {name: (one[name] - b).norm() / b.norm() for name, b in other.items()}
        loss_limit, gradient_limit = LIMITS[dtype]
        yield f"{family} {dtype} loss", apart.pop("loss").item(), loss_limit
        yield f"{family} {dtype} gradients", torch.stack(list(apart.values())).max().item(), gradient_limit


def check_memory(bench: Bench) -> Iterator[Figure]:
    """Peak memory of one pass with the loss in chunks and over full logits.

    On the CPU this is the peak of the process, which never falls: the smaller side goes first, and so does this check.
    """
    config, device = bench.config(bench.many_rows(), "--n_layer=1", "--dtype=bfloat16"), torch.device(bench.device)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    peaks = [peak_memory(device)]
    with mock.patch.dict(chunked_loss.CHUNK_ELEMENTS, cuda=2**27):  # several chunks on a large GPU too
        for full_logits in (False, True):
            gradients(config, full_logits)
            peaks.append(peak_memory(device))
    chunked, full = peaks[1] - peaks[0], peaks[2] - peaks[0]
    yield "in chunks, MiB", chunked / 2**20, None
    yield "full logits, MiB", full / 2**20, None
    yield "in chunks / full logits", chunked / full, 0.6


def check_device(bench: Bench) -> Iterator[Figure]:
    cases = [(family, "float32") for family in FAMILIES]
    return two_ways(bench, cases, f"--device={bench.device}", "--device=cpu")


def check_flash(bench: Bench) -> Iterator[Figure]:
    return two_ways(bench, EVERY_CASE, "--flash=1", "--flash=0")


def check_document_mask(bench: Bench) -> Iterator[Figure]:
    cases = [("llama", dtype) for dtype in LIMITS]  # the mask does not depend on the family
    return two_ways(bench, cases, "--doc_mask=1 --flash=1", "--doc_mask=1 --flash=0")


def check_loss(bench: Bench) -> Iterator[Figure]:
    with mock.patch.dict(chunked_loss.CHUNK_ELEMENTS, cuda=2**27):  # several chunks on a large GPU too
        yield from two_ways(bench, EVERY_CASE, bench.many_rows(), full_logits=True)


def check_compile(bench: Bench) -> Iterator[Figure]:
    with mock.patch.dict(chunked_loss.CHUNK_ELEMENTS, cuda=2**27):  # several chunks on a large GPU too
        rows = bench.many_rows()
        cases = COMPILED[1:] if bench.quick else COMPILED
        yield from two_ways(bench, cases, f"--compile=1 {rows}", f"--compile=0 {rows}", full_logits=True)


def check_compile_model(bench: Bench) -> Iterator[Figure]:
    return two_ways(bench, COMPILED[1:] if bench.quick else COMPILED, "--compile=model", "--compile=0")


def check_flex(bench: Bench) -> Iterator[Figure]:
    """Compiled, documents are kept apart by FlexAttention on CUDA, and by the mask elsewhere."""
    cases = [("llama", "float32" if bench.quick else "bfloat16")]
    return two_ways(bench, cases, "--doc_mask=1 --compile=1", "--doc_mask=1 --flash=0")


def check_window(bench: Bench) -> Iterator[Figure]:
    """Compiled, a sliding window is FlexAttention's on CUDA, and a mask elsewhere."""
    cases = [("llama", "float32" if bench.quick else "bfloat16")]
    return two_ways(bench, cases, "--sliding_window=20 --compile=1", "--sliding_window=20 --flash=0")


def check_import(bench: Bench) -> Iterator[Figure]:
    """The fifth loss on one batch: of a run, and of one that begins with its fourth step's weights, exported."""
    for family, choice in FAMILIES.items():
        # What transformers has a class for.
        flags = [*bench.shape(), *choice.replace("--logit_softcap=2", "").split(), "--overfit_single_batch=1"]
        expected = bench.train(f"to export {family}", *flags, "--num_iterations=5", "--save_every_niter=4")[4]["loss"]
        checkpoint = bench.folder / "runs" / f"to export {family}" / "checkpoints" / "step_00000004"
        folder = bench.folder / f"hf {family}"
        bench.run("scripts/export.py", f"--checkpoint={checkpoint}", "--to=hf", f"--output={folder}")
        flags += [f"--init_from=hf:{folder}", "--num_iterations=1", "--zero_stage=3"]
        (record,) = bench.train(f"imported {family}", *flags)
        yield family, abs(record["loss"] / expected - 1), 1e-5


def check_resume(bench: Bench) -> Iterator[Figure]:
    """Takes the second half of a run again from the checkpoint at its middle: with --deterministic bit for bit.

    Without it, flash attention may add up gradients in any order: then a second undisturbed run shows how much
    of a difference is the kernels' own doing, and the resumed run may not stray further than twice that.
    """
    config = bench.config()
    flags = [*bench.shape(), f"--total_batch_size={2 * config.batch_size * config.sequence_length}"]
    flags += ["--num_iterations=20", "--save_every_niter=10", "--dropout=0.1"]

    def second_half(name: str, dtype: str, deterministic: int) -> np.ndarray:
        records = bench.train(name, *flags, f"--dtype={dtype}", f"--deterministic={deterministic}")
        return np.array([(r["step"], r["loss"], r["grad_norm"]) for r in records if r["step"] > 10])

    cases = [("bfloat16", 1)] if bench.quick else [("bfloat16", 1), ("float32", 1), ("bfloat16", 0)]
    for dtype, deterministic in cases:  # the two dtypes have attention kernels of their own
        name = f"{dtype} deterministic={deterministic}"
        undisturbed, run_dir = second_half(name, dtype, deterministic), bench.folder / "runs" / name
        shutil.rmtree(run_dir / "checkpoints" / "step_00000020")
        (run_dir / "metrics.jsonl").unlink()
        difference, spread = float(np.abs(second_half(name, dtype, deterministic) - undisturbed).max()), 0.0
        if difference and not deterministic:
            spread = float(np.abs(second_half(f"{name}-again", dtype, deterministic) - undisturbed).max())
            yield f"{name}: undisturbed, twice", spread, None
        yield f"{name}: undisturbed and resumed", difference, 2 * spread


def train_steps(bench: Bench, flags: list[str], steps: int) -> list[tuple[float, float]]:
    """Returns loss and gradient norm of each of the first steps, taken in this process."""
    config = bench.config(*flags)
    bench.ranks = bench.ranks or init_ranks(bench.device, sharded=True)
    run, rows, length = Run(config, bench.ranks), config.batch_size, config.sequence_length + 1
    found = []
    for k in range(1, steps + 1):
        start = torch.arange(rows)[:, None] * 31 + k * 17
        batch = ((start + torch.arange(length)) % PERIOD).to(bench.device)
        result = run.step(k, batch)
        found.append((result.loss, result.grad_norm))
    return found


STRATEGIES = {
    "stage 3": "--zero_stage=3",
    "stage 2, offloaded": "--zero_stage=2 --cpu_offload=1 --activation_checkpointing=selective",
    "recompute block": "--activation_checkpointing=block",
    "recompute selective": "--activation_checkpointing=selective",
}
COMPILED_STRATEGIES = {"stage 3, compiled": "--zero_stage=3 --compile=1 --activation_checkpointing=block"}


def check_strategies(bench: Bench, cases: dict[str, str]) -> Iterator[Figure]:
    """Compares losses and gradient norms of ten steps under the flags of each of `cases` with those of a plain run.

    In bfloat16 sharded weights are rounded once more, where they are gathered.
    """
    torch.use_deterministic_algorithms(True)
    try:
        for dtype, limit in (("float32", 1e-4), ("bfloat16", 3e-2)):
            plain = train_steps(bench, [f"--dtype={dtype}"], 10)
            for name, flags in list(cases.items())[: 2 if bench.quick else None]:
                steps = train_steps(bench, [f"--dtype={dtype}", *flags.split()], 10)
                apart = [abs(a / b - 1) for a, b in zip(itertools.chain(*steps), itertools.chain(*plain), strict=True)]
                yield f"{name} {dtype}", max(apart), limit
    finally:
        torch.use_deterministic_algorithms(False)


def check_half(bench: Bench) -> Iterator[Figure]:
    """Twenty steps in float16 with its loss scale; the CPU has bfloat16 instead."""
    dtype = "float16" if bench.device == "cuda" else "bfloat16"
    steps = train_steps(bench, ["--learning_rate=3e-3", f"--dtype={dtype}"], 20)
    yield f"{dtype} last loss / first", steps[-1][0] / steps[0][0], 0.9


def check_faults(bench: Bench) -> Iterator[Figure]:
    """A NaN in the loss is left out, poisoned weights send the run back; out of memory leaves a snapshot."""
    flags = [*bench.shape(), "--num_iterations=12", "--save_every_niter=4"]
    wrapped = partial(bench.train, script="tests/e2e/failing_training.py")
    records = wrapped("nan", *flags, FAIL="loss@6-6")
    yield "steps not taken, beside 1", abs(sum("skipped" in r for r in records) - 1.0), 0
    records = wrapped("poisoned", *flags, "--async_save=1", FAIL="weights@8-8")
    superseded = read_records(bench.folder / "runs" / "poisoned" / "logs" / "metrics_superseded.jsonl")
    yield "steps repeated, beside 4", abs(len(superseded) - 4.0), 0
    yield "steps missing", 12.0 - len(records), 0
    if bench.device == "cuda":
        huge = ["--batch_size=65536", "--sequence_length=1024", "--record_memory=1"]
        try:
            bench.train("oom", *bench.shape(), *huge)
        except RuntimeError as error:
            if "exited with 2" not in str(error) or "out of memory" not in str(error):
                raise
        snapshot = bench.folder / "runs" / "oom" / "logs" / "oom_rank_0.pickle"
        yield "memory snapshots missing", float(not (snapshot.is_file() and snapshot.stat().st_size)), 0


def check_scoring(bench: Bench) -> Iterator[Figure]:
    """Losses of endings that share their context in a masked row, and of each alone with all its logits, per token."""
    generator = torch.Generator().manual_seed(0)

    def ids(longest: int, vocab_size: int) -> list[int]:
        n = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(vocab_size, (n,), generator=generator).tolist()

    for family, dtype in itertools.product(FAMILIES, LIMITS):
        config, device = bench.config(*FAMILIES[family].split(), f"--dtype={dtype}"), torch.device(bench.device)
        model = parallelize(config, Ranks(0, 0, 1, device)).gpt.eval()
        longest = config.n_positions // 2
        requests = [
            Request(ids(longest, config.vocab_size), [ids(longest, config.vocab_size) for _ in range(4)])
            for _ in range(20)
        ]
        kind = getattr(torch, dtype)
        forward = in_dtype(gpt_forward(model), device, kind)
        scored = score_requests(ScoringModel(forward, Ranks(0, 0, 1, device), config.n_positions, 4096), requests)
        apart = 0.0
        for request, scores in zip(requests, scored, strict=True):
            for ending, found in zip(request.continuations, scores, strict=True):
                text = torch.tensor([request.context + ending], device=device)
                with torch.no_grad(), torch.autocast(device.type, dtype=kind, enabled=dtype != "float32"):
                    logits = model(text[:, :-1])[0, -len(ending) :].float()
                loss = F.cross_entropy(logits, text[0, -len(ending) :], reduction="sum").item()
                apart = max(apart, abs(found.loss / loss - 1))
        yield f"{family} {dtype}", apart, LIMITS[dtype][0] * 10


def check_generation(bench: Bench) -> Iterator[Figure]:
    """Greedy tokens with the key-value cache, beyond the model's window too, and by a forward of all for each token."""
    for family in FAMILIES:
        config, device = bench.config(*FAMILIES[family].split()), torch.device(bench.device)
        model = parallelize(config, Ranks(0, 0, 1, device)).gpt.eval()
        limit = config.n_positions
        prompts = [[7], list(range(limit // 2)), list(range(limit - 4))]
        found = [list(row) for row in zip(*generate(model, prompts, 12, Sampling(temperature=0)), strict=True)]
        differing = 0
        for prompt, tokens in zip(prompts, found, strict=True):
            for i, token in enumerate(tokens):
                seen = torch.tensor([(prompt + tokens[:i])[-limit:]], device=device)
                with torch.no_grad():
                    differing += int(model(seen)[0, -1].argmax()) != token
        yield f"{family}: tokens that differ", float(differing), 0


CHECKS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "memory: loss in chunks and over full logits": check_memory,  # first, as the peak of a process never falls
    "numbers: this device and the CPU": check_device,
    "numbers: flash attention and plain": check_flash,
    "numbers: document mask, flash attention and plain": check_document_mask,
    "numbers: loss in chunks and over full logits": check_loss,
    "training: every strategy on one device": partial(check_strategies, cases=STRATEGIES),
    "training: half precision learns": check_half,
    "evaluation: endings together and alone": check_scoring,
    "generation: with a cache and without": check_generation,
    "training: resumed and undisturbed": check_resume,
    "training: faults": check_faults,
    "training: exported and imported": check_import,
    "numbers: compiled and eager": check_compile,
    "numbers: compiled as a whole and eager": check_compile_model,
    "numbers: document mask, compiled and plain": check_flex,
    "numbers: sliding window, compiled and plain": check_window,
    "training: compiled and sharded": partial(check_strategies, cases=COMPILED_STRATEGIES),
}


def measure_beside_plain_loop(bench: Bench) -> Iterator[Figure]:
    """scripts/bench/train.py at GPT-2 124M, both sides eager: above 1 is faster, or needs more memory."""
    flags = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--sequence_length=1024", "--batch_size=8"]
    output = bench.run("scripts/bench/train.py", "--steps=30", "--rounds=2", *flags, "--dtype=bfloat16")
    result = json.loads(output.splitlines()[-1])
    for side in ("ours", "reference"):
        yield f"{side} tok/s", result[side]["tok_per_s"], None
        yield f"{side} peak memory, GiB", result[side]["peak_mib"] / 2**10, None
    yield "tok/s ratio", result["ratio"]["tok_per_s"], None
    yield "memory ratio", result["ratio"]["peak_mib"], None


def measure_documents(bench: Bench) -> Iterator[Figure]:
    """Forward and backward of GPT-2 124M on rows that are one document, and on rows of documents of 500 tokens.

    Not through train_gpt.py, which would ask for a tokenizer and so perhaps for a network. After 5 passes to warm
    up, the median of 20.
    """
    flags = ["--sequence_length=1024", "--batch_size=16", "--dtype=bfloat16", "--compile=1"]
    config, device = load_config(flags, world_size=1), torch.device(bench.device)
    model = parallelize(config, Ranks(0, 0, 1, device)).gpt
    shape = (config.batch_size, config.sequence_length)
    idx = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    rates = []
    for doc_mask in (0, 1):
        seconds = []
        for _ in range(25):
            start = time.perf_counter()
            positions = document_positions(idx % 500, 0) if doc_mask else None
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss, _ = model(idx, idx, positions=positions)
            loss.backward()
            model.zero_grad()
            loss.item()  # waits for all of it
            seconds.append(time.perf_counter() - start)
        rates.append(idx.numel() / statistics.median(seconds[5:]))
        yield f"doc_mask={doc_mask} tok/s", rates[-1], None
    yield "tok/s ratio", rates[1] / rates[0], None


def measure_hellaswag(bench: Bench, dtype: str) -> Iterator[Figure]:
    """scripts/bench/hellaswag.py on random ids: examples a second, and all 10,042."""
    flags = ["--random", "--examples=500", "--rounds=2", "--whole", f"--dtype={dtype}", f"--device={bench.device}"]
    result = json.loads(bench.run("scripts/bench/hellaswag.py", *flags).splitlines()[-1])
    for name in ("ours_per_s", "usual_per_s", "ratio", "whole_set_s", "differing_choices"):
        yield name.replace("_", " "), result[name], None


def measure_generation(bench: Bench, flags: str) -> Iterator[Figure]:
    """scripts/bench/generate.py: tokens a second of all rows."""
    output = bench.run("scripts/bench/generate.py", f"--device={bench.device}", "--rounds=2", *flags.split())
    result = json.loads(output.splitlines()[-1])
    for side, speed in result["tok_per_s"].items():
        yield f"{side} tok/s", speed, None
    yield "ratio", result["ratio"], None


MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "GPT-2 124M beside a plain loop, eager, batch 8": measure_beside_plain_loop,
    "GPT-2 124M with --doc_mask, compiled, batch 16, without optimizer": measure_documents,
    "HellaSwag on GPT-2 124M beside the usual loop, float32": partial(measure_hellaswag, dtype="float32"),
    "HellaSwag on GPT-2 124M beside the usual loop, bfloat16": partial(measure_hellaswag, dtype="bfloat16"),
    "generation by GPT-2 124M, 256 tokens": partial(measure_generation, flags="--new_tokens=256"),
    "generation by GPT-2 124M, 256 tokens, 8 samples": partial(
        measure_generation, flags="--new_tokens=256 --samples=8"
    ),
}


def measure_large(bench: Bench, strategy: str) -> Iterator[Figure]:
    """GPT-2 1558M, 2 micro-steps of 8 × 1024: 8 steps, the median of the last 5, and its memory beside the plan."""
    flags = ["--cfg=gpt2-1558m", "--batch_size=8", "--total_batch_size=16384", "--activation_checkpointing=block"]
    flags += ["--compile=0", "--save_every_niter=0", "--num_iterations=8", "--log_every=1", *strategy.split()]
    records = bench.train("large", *flags)
    config = load_config([*flags, f"--device={bench.device}"], world_size=1)
    measured = records[-1]["memory_bytes"]
    yield "tok/s", statistics.median(r["tok_per_s"] for r in records[3:]), None
    if records[0]["mfu"] is not None:
        yield "MFU", statistics.median(r["mfu"] for r in records[3:]), None
    yield "peak memory, GB", measured / 1e9, None
    yield "planned, GB", planned_bytes(config, 1).peak / 1e9, None
    yield "plan off by", abs(deviation(config, 1, measured)), 0.1


LARGE: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    f"GPT-2 1558M, {strategy}": partial(measure_large, strategy=strategy)
    for strategy in ("--zero_stage=0", "--zero_stage=3", "--zero_stage=3 --cpu_offload=1")
}


def attempt(bench: Bench, name: str, part: Callable[[Bench], Iterator[Figure]]) -> dict[str, Any]:
    """Runs one part and says how it went. Whatever it raises is its result."""
    start, bench.commands = time.perf_counter(), []
    torch._dynamo.reset()  # of one block the compiler takes a handful of cases in a process, and then no more
    result: dict[str, Any] = {"name": name, "passed": True, "figures": {}}
    try:
        if start > bench.deadline:
            raise RuntimeError(f"left out: the {bench.minutes:g} minutes are over")
        for what, value, limit in part(bench):
            number = value if math.isfinite(value) else None  # JSON has no other
            result["figures"][what] = {"measured": number, "at_most": limit}
            result["passed"] &= limit is None or value <= limit
            bound = "" if limit is None else f" (at most {limit:g})"
            print(f"    {what}: {value:{',.0f' if value >= 1000 else '.3g'}}{bound}")
    except Exception as error:
        result |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
        print(f"    {result['error']}")
    shutil.rmtree(bench.folder / "runs", ignore_errors=True)
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    result |= {"seconds": round(time.perf_counter() - start, 1), "commands": bench.commands}
    print(f"{'ok    ' if result['passed'] else 'FAILED'}  {name}  ({result['seconds']} s)", flush=True)
    return result


def main() -> int:
    parser = CommandParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outdir/gpu_check.json"), help="default: %(default)s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=8, help="time limit for all parts (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, and no throughput")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the parts with this in their name")
    parser.add_argument("--large", action="store_true", help="only GPT-2 1558M, its memory beside the plan (40 GB)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: this machine has no CUDA device; --device=cpu --quick runs the checks without")
    if args.device == "cpu" and (not args.quick or args.large):
        raise UserError("--device=cpu: the full shapes want a GPU; use --quick alone")

    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes={args.minutes}: must be a number above 0")
    start = time.perf_counter()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic steps, before cuBLAS starts
    torch.set_float32_matmul_precision("highest")  # no TF32 in what is compared
    parts = [("checks", *item) for item in CHECKS.items()]
    parts += [("throughput", *item) for item in MEASUREMENTS.items()] if not args.quick else []
    if args.large:
        parts = [("throughput", *item) for item in LARGE.items()]
    parts = [part for part in parts if args.only in part[1]]
    if not parts:
        raise UserError(
            f"--only={args.only}: no part has this in its name; they are {', '.join([*CHECKS, *MEASUREMENTS])}"
        )
    report: dict[str, Any] = {**describe(args.device), "passed": False, "checks": [], "throughput": []}
    save(args.output, report)
    print(f"{report['hardware']}, torch {report['torch']}, CUDA {report['cuda']}, commit {report['commit']}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, args.quick, Path(folder), args.minutes, start + 60 * args.minutes)
        write_shard(Path(folder) / "count_train_000001.bin", np.arange(2_000_000) % PERIOD, 50257)
        for kind, name, part in parts:
            report[kind].append(attempt(bench, name, part))
            report["seconds"] = round(time.perf_counter() - start, 1)
            save(args.output, report)
    failed = [result["name"] for result in report["checks"] + report["throughput"] if not result["passed"]]
    report["passed"] = not failed
    save(args.output, report)
    print(f"{'all passed' if not failed else 'FAILED: ' + '; '.join(failed)}, {report['seconds']} s; {args.output}")
    close_ranks()
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
