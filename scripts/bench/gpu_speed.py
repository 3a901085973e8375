"""Training speed on one GPU, measured part by part: `bash scripts/bench/gpu_speed.sh --output FILE`

Everything runs in one process with one CUDA context. It needs no data and no network, and writes no checkpoints. Parts
run in the order of --only, by default the most informative first. Each result is printed and saved immediately, so an
interrupted run keeps its results. A part starts only if at least 60 % of its estimated time is left of --seconds. If a
part fails, the failure is recorded and the next part starts. The exit code is 1 if any part failed.

`--nanogpt DIR` also measures nanoGPT's model.py, compiled. `--device=cpu --tiny` rehearses every part without a GPU and
without compiling. `python scripts/bench/gpu_table.py FILE` writes the results into docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # before all else: this folder holds a tokenize.py

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cfg.config import Config, load_config
from model import loss as chunked_loss
from scripts.bench.common import Run
from scripts.bench.gpu_bench import Bench, LeftOut
from scripts.bench.nanogpt import load_nanogpt
from train.memory import planned_bytes
from util.device import device_name, peak_memory
from util.errors import CommandParser, UserError, run_command
from util.gpus import peak_flops
from util.ranks import close_ranks

TINY = "--n_layer=2 --n_embd=64 --n_head=4 --vocab_size=500 --sequence_length=32 --batch_size=2 --compile=0"


# --- hardware ---


def measure_ceilings(bench: Bench) -> None:
    """Measures copy bandwidth, and matrix products with the shapes of GPT-2 124M and 65,536 tokens in bfloat16."""
    tokens = 64 if bench.tiny else 65536
    x = torch.ones(2**10 if bench.tiny else 2**30, dtype=torch.bfloat16, device=bench.device)
    y = torch.empty_like(x)
    bench.note("copy, TB/s", 2 * x.numel() * x.element_size() / bench.time_of(partial(y.copy_, x)) / 1e12)
    del x, y
    shapes = {
        "8192³": (8192, 8192, 8192),
        "query, key, value": (tokens, 2304, 768),
        "attention's projection": (tokens, 768, 768),
        "MLP, first": (tokens, 3072, 768),
        "MLP, second": (tokens, 768, 3072),
        "head, 16,384 tokens": (16384, 50304, 768),
        "MLP, weight gradient": (3072, 768, tokens),
        "head, weight gradient, 2,048 tokens": (50304, 768, 2048),
        "head, weight gradient, 16,384 tokens": (50304, 768, 16384),
    }
    for name, shape in shapes.items():
        m, n, k = (min(size, 64) for size in shape) if bench.tiny else shape
        a = torch.randn(m, k, device=bench.device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=bench.device, dtype=torch.bfloat16)
        seconds = bench.time_of(partial(torch.mm, a, b))
        bench.note(f"product, {name}, TFLOP/s", 2 * m * n * k / seconds / 1e12)


def measure_attention(bench: Bench) -> None:
    """Measures the fast backends of scaled_dot_product_attention for 64 × 1,024 tokens, and records the default one.

    A causal mask halves the FLOPs. The backward pass has 2.5 times the FLOPs of the forward pass.
    """
    batch, length = (2, 32) if bench.tiny else (64, 1024)
    backends = [SDPBackend.FLASH_ATTENTION] + [SDPBackend.CUDNN_ATTENTION] * (bench.device == "cuda")
    for heads, size in ((12, 64), (6, 128)):
        # (batch, heads, length, size), in the memory layout of the model: all heads of a token side by side.
        q, k, v = (
            torch.randn(batch, length, heads, size, device=bench.device, dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for _ in range(3)
        )
        if bench.device == "cuda":
            chosen = torch._fused_sdp_choice(q, k, v, None, 0.0, True)
            bench.note(f"heads of {size}: chosen", SDPBackend(chosen).name)
        attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        for backend in backends:
            with sdpa_kernel(backend):
                out = attend()
                backward = partial(torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True)
                flops = 2 * batch * heads * length**2 * size
                forward_s, backward_s = bench.time_of(attend), bench.time_of(backward)
            bench.note(f"heads of {size}: {backend.name}, forward, TFLOP/s", flops / forward_s / 1e12)
            bench.note(f"heads of {size}: {backend.name}, backward, TFLOP/s", 2.5 * flops / backward_s / 1e12)


# --- the loss ---


@contextmanager
def loss_variant(bench: Bench, scatter: bool, elements: int) -> Iterator[chunked_loss.ChunkLoss]:
    """Sets the size of a chunk of logits and yields the compiled loss of a chunk, with or without scatter."""
    chunk: Any = chunked_loss.chunk_loss_and_grad if scatter else chunked_loss.fused_chunk_loss_and_grad
    with ExitStack() as stack:
        sizes = {bench.device: 2**13 if bench.tiny else elements}
        stack.enter_context(mock.patch.dict(chunked_loss.CHUNK_ELEMENTS, sizes))
        if scatter:  # the earlier version also rounded the weight gradient of each chunk
            stack.enter_context(mock.patch.object(chunked_loss, "accumulates_in_fp32", lambda *_: False))
        yield chunk if bench.tiny else torch.compile(chunk, dynamic=False)


def measure_loss(bench: Bench) -> None:
    """Measures head and loss of 16,384 tokens, forward and backward, in all versions, and compares their gradients."""
    tokens, width, vocabulary = (64, 32, 512) if bench.tiny else (16384, 768, 50304)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=bench.device) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary - 47, (tokens,), device=bench.device)

    def forward_and_backward(softcap: float, chunk_loss: chunked_loss.ChunkLoss) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(bench.device, torch.bfloat16):
            arguments = hidden, weight, targets, vocabulary - 47, softcap
            total, _ = chunked_loss.linear_cross_entropy(*arguments, chunk_loss=chunk_loss)
        (total / tokens).backward()

    for softcap in (0.0, 15.0):
        first: list[Tensor] = []
        for scatter, power in ((True, 27), (False, 27), (False, 28), (False, 30)):
            name = f"{'with' if scatter else 'without'} scatter, chunks of 2^{power}" + f", softcap {softcap:g}" * (
                softcap > 0
            )
            with loss_variant(bench, scatter, 2**power) as chunk_loss:
                bench.note(f"{name}, ms", 1e3 * bench.time_of(partial(forward_and_backward, softcap, chunk_loss)))
            gradients = [g for g in (hidden.grad, weight.grad) if g is not None]
            first = first or gradients
            apart = [
                ((g.float() - f.float()).norm() / f.float().norm()).item()
                for g, f in zip(gradients, first, strict=True)
            ]
            bench.note(f"{name}, relative difference of the gradients from the first form", max(apart))


# --- whole training steps ---


@dataclass(frozen=True)
class Setting:
    """One training run: flags, micro-steps per step, and the version of the loss. `profile` also saves its kernels."""

    flags: str
    micro_steps: int
    scatter: bool = False
    chunk: int = 2**30
    profile: bool = False


def training_config(bench: Bench, setting: Setting) -> Config:
    """Returns the config of a setting."""
    flags = [*setting.flags.split(), f"--device={bench.device}", "--tokenizer=none", "--input_val_bin="]
    if bench.tiny:
        flags += TINY.split() + (["--n_kv_head=2", "--mlp_hidden=96"] if "llama" in setting.flags else [])
    c = load_config([*flags, "--total_batch_size=0"], world_size=1)
    total = c.batch_size * c.sequence_length * (2 if bench.tiny else setting.micro_steps)
    return c.model_copy(update={"total_batch_size": total})


def time_steps(bench: Bench, step: Callable[[int], Any], micro_steps: int, tokens: int, flops: int = 0) -> None:
    """Measures the seconds of the first step, then tokens per second of three steps, peak memory and MFU.

    `step(n)` makes an optimizer step of n micro-steps of `tokens` tokens each. `flops` are the FLOPs per token; without
    them the MFU is left out.
    """
    begin, device = time.perf_counter(), torch.device(bench.device)
    step(2)  # two micro-steps, because the second one accumulates gradients
    bench.wait()
    bench.note("first step with compiling, s", time.perf_counter() - begin)
    step(micro_steps)
    bench.wait()
    begin = time.perf_counter()
    for _ in range(3):
        step(micro_steps)
    bench.wait()
    speed = 3 * micro_steps * tokens / (time.perf_counter() - begin)
    bench.note("tok/s", speed)
    bench.note("GiB", peak_memory(device) / 2**30)
    if flops and (peak := peak_flops(device_name(device))):
        bench.note("MFU", speed * flops / peak)


def measure_training(bench: Bench, setting: Setting) -> None:
    """Measures `train_gpt.train_step`, including the optimizer and the wait for the device."""
    config = training_config(bench, setting)
    if config.tensorcores:
        torch.set_float32_matmul_precision("high")

    # Drawn on the device, because the CPU needs a minute for 2 billion values.
    def value(name: str, shape: torch.Size) -> Tensor:
        if len(shape) > 1:
            return torch.randn(shape, device=bench.device) * 0.02
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)

    with loss_variant(bench, setting.scatter, setting.chunk) as chunk_loss:
        run = Run(config, bench.rank(), value)
        run.model.gpt.chunk_loss = chunk_loss
        tokens = config.batch_size * config.sequence_length
        micro_steps = config.total_batch_size // tokens
        shape = micro_steps * config.batch_size, config.sequence_length + 1
        batch = torch.randint(config.vocab_size, shape, device=bench.device)
        numbers = count(1)

        def step(n: int) -> None:
            run.step(next(numbers), batch[: n * config.batch_size])

        time_steps(bench, step, micro_steps, tokens, run.model.gpt.flops_per_token(config.sequence_length))
        if not setting.scatter:  # train/memory.py does not know the earlier loss
            planned = planned_bytes(config, 1, chunked_loss.memory_of(bench.rank().device)).peak
            bench.note("planned GiB", planned / 2**30)
        if run.guard.skipped:
            raise RuntimeError(f"{run.guard.skipped} steps were skipped, so the optimizer was not measured")
        if setting.profile:
            profile(bench, lambda: step(2))


def profile(bench: Bench, step: Callable[[], Any]) -> None:
    """Saves the kernels of two micro-steps and an optimizer step: name, calls, share of the device time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA, *kinds]
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        bench.wait()

    def spent(event: Any) -> float:
        return event.self_device_time_total if bench.device == "cuda" else event.self_cpu_time_total

    events = sorted((e for e in profiler.key_averages() if spent(e)), key=spent, reverse=True)
    total = sum(map(spent, events))
    rows = [(event.key[:100], event.count, round(spent(event) / total, 4)) for event in events[:40]]
    bench.report["profiles"][bench.part] = rows
    bench.save()


def measure_nanogpt(bench: Bench, batch_size: int, bias: bool, micro_steps: int) -> None:
    """Measures nanoGPT's compiled model.py, with optimizer, clipping and accumulation as in its train.py."""
    if bench.nanogpt is None:
        raise LeftOut("--nanogpt was not given")
    nanogpt = load_nanogpt(bench.nanogpt)
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
    if bench.tiny:
        shape, batch_size, micro_steps = (
            {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 500},
            2,
            2,
        )
    torch.set_float32_matmul_precision("high")
    model = nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0, bias=bias, **shape)).to(bench.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), bench.device)
    compiled = model if bench.tiny else torch.compile(model)
    x, y = torch.randint(shape["vocab_size"], (2, batch_size, shape["block_size"]), device=bench.device)

    def step(n: int) -> None:
        for _ in range(n):
            with torch.autocast(bench.device, torch.bfloat16):
                loss = compiled(x, y)[1] / n
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    time_steps(bench, step, micro_steps, x.numel())


# --- parts ---


scatter_loss = partial(Setting, scatter=True, chunk=2**27)  # the earlier version of the loss
GPT2 = "--cfg=gpt2-124m --batch_size=64"
GPT2_16 = "--cfg=gpt2-124m --batch_size=16"
ALL = "--compile=model --residual_dtype=bfloat16"
XL = "--cfg=gpt2-1558m --batch_size=8 --zero_stage=0"
LLAMA = "--cfg=llama3-8b --n_layer=8 --vocab_size=32000 --batch_size=2 --activation_checkpointing=none"

TRAINING = {  # name: estimated seconds with an empty compile cache, setting
    "gpt2-124m": (45, Setting(GPT2, 8, profile=True)),
    "gpt2-124m, all changes": (75, Setting(f"{GPT2} {ALL}", 8, profile=True)),
    "gpt2-124m, before": (45, scatter_loss(GPT2_16, 32)),
    "llama3-8b, 8 layers, stage 3": (60, Setting(LLAMA, 2)),
    "modern-124m": (45, Setting("--cfg=modern-124m --batch_size=64", 8)),
    "gpt2-1558m": (60, Setting(XL, 8)),
    "modern-124m, all changes": (75, Setting(f"--cfg=modern-124m --batch_size=64 {ALL}", 8)),
    "gpt2-124m, before, micro-batch 64": (45, scatter_loss(GPT2, 8)),
    "gpt2-124m, before, no scatter": (45, Setting(GPT2_16, 32, chunk=2**27)),
    "gpt2-124m, before, no scatter, chunks of 2^30": (45, Setting(GPT2_16, 32)),
    "gpt2-124m, before, whole model": (75, scatter_loss(f"{GPT2_16} --compile=model", 32)),
    "gpt2-124m, before, bfloat16 residual": (45, scatter_loss(f"{GPT2_16} --residual_dtype=bfloat16", 32)),
    "gpt2-124m, whole model": (75, Setting(f"{GPT2} --compile=model", 8)),
    "gpt2-124m, bfloat16 residual": (45, Setting(f"{GPT2} --residual_dtype=bfloat16", 8)),
}
PARTS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "ceilings": (8, measure_ceilings),
    "attention": (8, measure_attention),
    "nanoGPT": (60, partial(measure_nanogpt, batch_size=12, bias=False, micro_steps=40)),
    **{name: (seconds, partial(measure_training, setting=setting)) for name, (seconds, setting) in TRAINING.items()},
    "nanoGPT, micro-batch 64": (60, partial(measure_nanogpt, batch_size=64, bias=True, micro_steps=8)),
    "loss": (60, measure_loss),
}


def run_part(bench: Bench, name: str) -> None:
    """Runs one part and records its outcome. An exception is an outcome too."""
    seconds, work = PARTS[name]
    bench.part, begin = name, time.perf_counter()
    left = bench.seconds - bench.elapsed()
    try:
        if left < 0.6 * seconds and not bench.tiny:
            raise LeftOut(f"{left:.0f} s left of --seconds={bench.seconds:g}")
        work(bench)
        bench.note("seconds of this part", round(time.perf_counter() - begin, 1))
    except LeftOut as error:
        bench.report["left_out"][name] = str(error)
        print(f"{bench.elapsed():6.1f} s  {name} left out: {error}", flush=True)
    except Exception as error:
        bench.report["failed"][name] = f"{type(error).__name__}: {str(error)[:600]}"
        print(f"{bench.elapsed():6.1f} s  {name} FAILED: {bench.report['failed'][name]}", flush=True)
    bench.save()
    gc.collect()
    torch._dynamo.reset()  # resets the limit on recompilations of a function
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def chosen_parts(only: str) -> list[str]:
    """Returns the parts to run, in the order of --only, or all parts if it is empty.

    Each item of `a;b` is a name or a prefix of several names.
    """
    names: list[str] = []
    for text in filter(None, (word.strip() for word in only.split(";"))):
        found = [text] if text in PARTS else [name for name in PARTS if name.startswith(text)]
        if not found:
            raise UserError(f"--only={text}: no such part; the parts are {'; '.join(PARTS)}")
        names += [name for name in found if name not in names]
    if only and not names:
        raise UserError(f"--only={only}: empty; name one or more of these parts: {'; '.join(PARTS)}")
    return names or list(PARTS)


def main() -> int:
    parser = CommandParser(prog="gpu_speed.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outdir/gpu_speed.json"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=280, help="time limit for all parts (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="A;B", help="parts to run, by name or prefix")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a copy of nanoGPT, to measure its model.py")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny shapes and without the compiler")
    args = parser.parse_args()
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds={args.seconds}: must be a number above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: this machine has no CUDA device; --device=cpu --tiny rehearses without one")
    if args.device == "cpu" and not args.tiny:
        raise UserError("--device=cpu: the full shapes need a GPU; add --tiny")
    names = chosen_parts(args.only)
    if args.nanogpt:
        load_nanogpt(args.nanogpt)  # check the path now
    bench = Bench(args.output, args.seconds, args.device, args.tiny, args.nanogpt)
    bench.save()
    print(f"{bench.report['hardware']}, torch {bench.report['torch']}, CUDA {bench.report['cuda']}", flush=True)
    for name in names:
        run_part(bench, name)
    failed = list(bench.report["failed"])
    print(f"{'FAILED: ' + '; '.join(failed) if failed else 'done'}, {bench.elapsed():.0f} s; {args.output}")
    close_ranks()
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
