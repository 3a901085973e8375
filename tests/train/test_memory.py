"""The plan's formulas, held against the real code: simulated on fake tensors, and what the compiler keeps."""

import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from cfg.config import load_config
from model.gpt import GPT, Block
from model.layers import rotary_table
from scripts.bench.simulate_memory import compare, parse
from train import memory
from train.memory import (
    PARTS,
    block_activations,
    choose_batch_size,
    deviation,
    fitting_batch_size,
    planned_bytes,
    possible_peaks,
    usable_bytes,
)
from train.muon import empty_state
from train.optim import make_optimizer
from train.parameter_counts import largest_partition
from util.errors import UserError
from util.ranks import Ranks

LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--tie_embeddings=0", "--n_kv_head=2"]
MODERN = ["--positions=rotary", "--norm=rmsnorm", "--mlp=relu2", "--bias=0", "--qk_norm=1", "--logit_softcap=15"]
WIDE = [*LLAMA, "--head_dim=96", "--qkv_bias=1"]
NANOCHAT = [*MODERN, "--norm_weight=0", "--embedding_norm=1", "--tie_embeddings=0"]
FAMILIES = {"gpt2": [], "nanochat": NANOCHAT, "wide": WIDE, "llama": [*LLAMA, "--mlp_hidden=1792"], "modern": MODERN}
SHAPE = ["--n_layer=3", "--n_embd=512", "--n_head=8", "--sequence_length=320", "--batch_size=3", "--dtype=bfloat16"]


def config(*flags, family="gpt2", ranks=1):
    return load_config([*SHAPE, *FAMILIES[family], *flags], ranks)


# family, ranks, micro-steps, flags: every stage, recomputation, way to reduce and dtype, each at least once.
SIMULATED = [
    ("gpt2", 8, 2, "--zero_stage=0 --activation_checkpointing=selective"),
    pytest.param("llama", 8, 1, "--zero_stage=1 --activation_checkpointing=block", marks=pytest.mark.slow),
    ("modern", 8, 2, "--zero_stage=2 --activation_checkpointing=block --sync_every_microbatch=1"),
    ("llama", 8, 2, "--zero_stage=3 --activation_checkpointing=selective"),
    pytest.param("llama", 64, 1, "--zero_stage=3 --replicas=8 --dtype=float32", marks=pytest.mark.slow),
    ("nanochat", 8, 1, "--zero_stage=3 --activation_checkpointing=block"),
    pytest.param("gpt2", 8, 1, "--zero_stage=3 --residual_dtype=bfloat16", marks=pytest.mark.slow),
    ("llama", 8, 1, "--zero_stage=3 --optimizer=muon"),
    ("gpt2", 8, 1, "--zero_stage=3 --vocab_size=500 --activation_checkpointing=block"),  # the loss is not the peak
]
LORA = [
    ("llama", 8, 2, "--zero_stage=3 --activation_checkpointing=selective --base_dtype=bfloat16"),
    ("gpt2", 8, 1, "--zero_stage=0 --lora_targets=attn --lora_embeddings=1"),
    ("gpt2", 8, 1, "--zero_stage=3 --dtype=float32 --base_dtype=bfloat16"),
    ("gpt2", 8, 2, "--zero_stage=0 --activation_checkpointing=selective"),
    ("gpt2", 1, 1, "--zero_stage=0 --dtype=float32 --base_dtype=bfloat16"),
    ("llama", 1, 1, "--zero_stage=0 --base_dtype=bfloat16"),
    ("llama", 8, 1, "--zero_stage=1 --activation_checkpointing=block"),
    ("llama", 8, 2, "--zero_stage=2 --activation_checkpointing=block --sync_every_microbatch=1"),
    ("llama", 8, 2, "--zero_stage=2"),
    ("llama", 8, 1, "--zero_stage=3 --lora_embeddings=1 --base_dtype=bfloat16"),
]
LORA = [(family, ranks, steps, f"--lora_rank=16 {flags}") for family, ranks, steps, flags in LORA]
SIMULATED += [case if i < 1 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(LORA)]


@pytest.mark.parametrize("family, ranks, steps, flags", SIMULATED)
def test_the_plan_is_what_the_real_code_holds(family, ranks, steps, flags):
    rows = compare([*SHAPE, *FAMILIES[family], *flags.split()], ranks, steps)
    assert [what.split(",")[0] for what, _, _ in rows] == ["parameters", "gradients", "optimizer", "peak"]
    for what, found, planned in rows:
        assert found > 1e5 and planned == pytest.approx(found, rel=0.05), what


@pytest.mark.parametrize(
    "flags",
    ["--ranks=0", "--ranks=a,8", "--ranks=8,", "--micro_steps=0", "--zero_stage=3 --cpu_offload=1", "--dropout=0.1"],
)
def test_flags_that_are_not_simulated_are_refused(flags):
    with pytest.raises(UserError, match=flags.split()[-1].split("=")[0]):
        ranks, steps, rest = parse(flags.split())
        compare([*SHAPE, *rest], ranks[0], steps)


LARGE = [(8, ""), (64, ""), (1024, ""), (64, "--replicas=8")]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks, flags", LARGE)
def test_the_plan_of_the_8b_model_on_up_to_1024_ranks(ranks, flags, stage, recompute):
    choice = [f"--zero_stage={stage}", f"--activation_checkpointing={recompute}", *flags.split()]
    for what, found, planned in compare(["--cfg=llama3-8b", *choice], ranks, 1):
        assert planned == pytest.approx(found, rel=0.1), what


KINDS = [*FAMILIES, "bfloat16 residual"]
RECOMPUTE = ["none", "block", "selective"]
# By default each value once.
COMPILED = [
    pytest.param(family, recompute, marks=() if i < 3 and i == j else pytest.mark.slow)
    for i, family in enumerate(KINDS)
    for j, recompute in enumerate(RECOMPUTE)
]


@pytest.mark.parametrize("family, recompute", COMPILED)
def test_a_compiled_block_keeps_what_the_plan_says(family, recompute):
    """The compiler's own partition of forward and backward, run by plain kernels."""
    residual = "bfloat16" if family == "bfloat16 residual" else "float32"
    family = "gpt2" if family == "bfloat16 residual" else family
    c = config("--compile=1", f"--residual_dtype={residual}", family=family)
    torch._dynamo.reset()
    block = Block(c)
    block.activation_checkpointing = recompute
    forward = torch.compile(block.forward, backend="aot_eager_decomp_partition")
    kept = {}

    def keep(tensor):
        B, T = c.batch_size, c.sequence_length  # which no weight has as a dimension; rotary tables are (T, …)
        if tensor.shape[0] == B * T or (tensor.shape[0] == B and T in tensor.shape):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    stream = getattr(torch, residual)
    x = torch.randn(c.batch_size, c.sequence_length, c.n_embd, dtype=stream, requires_grad=True)
    rotary = rotary_table(torch.arange(c.sequence_length, device=x.device), c) if family != "gpt2" else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(x, rotary)
    assert out.shape == x.shape
    tokens = c.batch_size * c.sequence_length
    assert block_activations(c, recompute) * tokens == pytest.approx(sum(kept.values()), rel=0.01)


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_fullest_rank_of_stage_1_holds_the_states_of_zero_redundancy_optimizer_with_muon(ranks):
    c = config("--n_embd=64", "--optimizer=muon", family="llama")
    model = GPT(c)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        zero = make_optimizer(model, c.model_copy(update={"zero_stage": 1}), ranks)
        partition = zero._partition_parameters()
    finally:
        dist.destroy_process_group()
    sizes = [
        sum(s.numel() for g in rank for p in g["params"] for s in empty_state(p, g).values()) for rank in partition
    ]
    steps = [sum(len(g["params"]) for g in rank if not g["parts"]) for rank in partition]  # AdamW's step counters
    assert largest_partition(c, ranks) == max(4 * (size - few) for size, few in zip(sizes, steps, strict=True))


@pytest.mark.parametrize("ranks", [2, 5, 64])
def test_the_fullest_rank_of_stage_1_is_that_of_zero_redundancy_optimizer(ranks):
    c = config(family="gpt2")
    model = GPT(config("--n_embd=64"))
    groups = [[p for p in model.parameters() if (p.dim() < 2) == vectors] for vectors in (False, True)]
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        zero = ZeroRedundancyOptimizer([{"params": group} for group in groups], torch.optim.AdamW)
        partition = zero._partition_parameters()
    finally:
        dist.destroy_process_group()
    sizes = [sum(p.numel() for group in rank for p in group["params"]) for rank in partition]
    assert largest_partition(config("--n_embd=64"), ranks) == 8 * max(sizes)
    assert largest_partition(c, 1) == 8 * sum(p.numel() for p in GPT(c).parameters())


def test_closed_forms_of_the_8b_model():
    """16 bytes a parameter, divided by as many as the stage divides among; a replica divides within itself."""
    state = {}
    for name, flags in {"0": "", "1": "", "2": "", "3": "", "hybrid": "--zero_stage=3 --replicas=8"}.items():
        stage = [f"--zero_stage={name}"] if not flags else flags.split()
        c = load_config(["--cfg=llama3-8b", "--total_batch_size=524288", *stage], 64)
        state[name] = possible_peaks(c, 64)["optimizer"]
    n = 8_030_261_248
    assert state["0"] == {"parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n}
    assert state["1"]["parameters"] == 4 * n and state["1"]["optimizer"] == 8 * 128256 * 4096  # one embedding
    assert state["2"] == state["3"] == {"parameters": n // 16, "gradients": n // 16, "optimizer": n // 8}
    assert state["hybrid"] == {part: 8 * size for part, size in state["3"].items()}


def test_a_measured_peak_is_compared_with_the_planned():
    c = config("--zero_stage=3", ranks=8)
    assert deviation(c, 8, planned_bytes(c, 8).peak) == 0
    assert deviation(c, 8, 2 * planned_bytes(c, 8).peak) == -0.5


@pytest.mark.slow
def test_parts_peak_and_host_fit_together():
    """Random strategies and shapes: each part <= peak <= sum of the parts. More ranks never need more memory."""
    draw = random.Random(0)
    for _ in range(100):
        flags = [f"--zero_stage={draw.choice([2, 3])}", f"--compile={draw.choice([0, 1])}"]
        flags += [f"--activation_checkpointing={draw.choice(['none', 'block', 'selective'])}"]
        flags += [f"--sync_every_microbatch={draw.choice([0, 1])}", f"--dropout={draw.choice([0, 0.1])}"]
        family, steps = draw.choice(list(FAMILIES)), draw.choice([1, 2])

        def plan(ranks, *more, flags=flags, family=family, steps=steps):
            total = f"--total_batch_size={3 * 320 * steps * ranks}"
            memory = planned_bytes(config(*flags, total, *more, family=family, ranks=ranks), ranks)
            assert set(memory.parts) == set(PARTS)
            assert max(memory.parts.values()) <= memory.peak <= sum(memory.parts.values())
            return memory

        assert plan(16).peak <= plan(8).peak < plan(8, "--n_layer=4").peak
        offloaded = plan(8, "--cpu_offload=1")
        assert offloaded.peak < plan(8).peak and offloaded.parts["parameters"] == offloaded.parts["optimizer"] == 0
        assert offloaded.host == 4 * plan(8).parts["parameters"] and plan(8).host == 0


# --batch_size=0


@pytest.mark.parametrize(
    "preset, gigabytes, size",
    [("gpt2-124m", 80, 64), ("modern-124m", 80, 64), ("gpt2-124m", 24, None), ("gpt2-124m", 15.8, None)],
)
def test_the_largest_micro_batch_that_fits_is_chosen(preset, gigabytes, size):
    """15.8 GB is what a T4 has. Twice the chosen size is more than 64, or does not fit."""
    c, capacity = load_config([f"--cfg={preset}"], 1), gigabytes * 1e9
    chosen = fitting_batch_size(c, 1, capacity)
    peaks = [planned_bytes(c.model_copy(update={"batch_size": n}), 1, capacity).peak for n in (chosen, 2 * chosen)]
    assert peaks[0] <= usable_bytes(capacity) and (chosen == 64 or usable_bytes(capacity) < peaks[1])
    assert chosen == size if size else 1 < chosen < 64


@pytest.mark.parametrize("total, ranks, size", [(48, 1, 16), (48, 3, 16), (48, 2, 8), (7, 1, 1), (512, 4, 64)])
def test_the_micro_batch_divides_the_batch_of_a_rank(total, ranks, size):
    flags = ["--n_layer=1", "--n_embd=64", "--n_head=2", "--batch_size=0", "--sequence_length=64"]
    c = load_config([*flags, f"--total_batch_size={total * 64}"], ranks)
    assert fitting_batch_size(c, ranks, 80e9) == size
    assert fitting_batch_size(c, ranks, None) == min(4, size)  # on a CPU
    assert fitting_batch_size(c, ranks, 1e6) == 1  # nothing fits


def test_the_gpu_with_the_least_free_memory_decides_for_all_ranks(monkeypatch, capsys):
    c = load_config(["--cfg=gpt2-124m"], 2)
    free = {0: 80e9, 1: 15.8e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 80e9))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [(n, 80e9) for n in free.values()])
    chosen = [choose_batch_size(c, Ranks(i, i, 2, torch.device("cuda", i))) for i in (0, 1)]
    assert chosen[0] == chosen[1] and chosen[0].batch_size == fitting_batch_size(c, 2, 80e9, 14.5e9) < 64
    line = capsys.readouterr().out
    assert (
        line.count("\n") == 1
        and f"--batch_size=0: micro-batch of {chosen[0].batch_size}, " in line
        and "14.5 GB free" in line
    )


def test_a_model_that_does_not_fit_gives_a_warning_and_one_sequence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15.8e9, 15.8e9))
    ranks = Ranks(0, 0, 1, torch.device("cuda", 0))
    assert choose_batch_size(load_config(["--cfg=gpt2-1558m", "--zero_stage=0"], 1), ranks).batch_size == 1
    assert "does not fit; scripts/plan.py" in capsys.readouterr().out


def test_small_cards_get_small_chunks_of_the_loss():
    c = load_config(["--cfg=gpt2-124m", "--batch_size=16"], 1)
    assert memory.loss_bytes(c, 16e9) < memory.loss_bytes(c, 80e9) == memory.loss_bytes(c, float("inf"))
