"""Checks of parallel training. test_parallel.py runs them by torchrun: on_ranks.py REPORT FOLDER CHECK ...

Each check asserts on every rank. Rank 0 writes the errors to REPORT. Checkpoints are saved in FOLDER, so that another
launch loads them on another number of ranks.
"""

import json
import math
import sys
import traceback
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from cfg.config import load_config
from model.formats.checkpoint import list_checkpoints
from model.formats.pretrained import initial_values, open_pretrained, open_weights
from model.gpt import GPT, initial_value
from train.checkpoint import load_checkpoint
from train.checkpoint_writer import CheckpointWriter
from train.memory import possible_peaks
from train.optim import make_optimizer, named_states
from train.parallel import local, make_mesh, norm_squared, parallelize, reshard
from util.errors import run_command
from util.ranks import Ranks, close_ranks, init_ranks

LAYERS, MICRO_STEPS = 3, 2
# A padded vocabulary (251 → 256), and rows that the number of ranks does not divide.
SHAPE = [f"--n_layer={LAYERS}", "--n_head=2", "--n_embd=28", "--vocab_size=251", "--sequence_length=16"]
FAMILIES = {"gpt2": [], "llama": ["--norm=rmsnorm", "--mlp=swiglu", "--positions=rotary", "--tie_embeddings=0"]}


def settings(world_size):
    found = {f"stage{stage}": [f"--zero_stage={stage}"] for stage in range(4)}
    if world_size == 4:
        found |= {f"hsdp{stage}": [f"--zero_stage={stage}", "--replicas=2"] for stage in (2, 3)}
    return found


class Setting:
    def __init__(self, ranks: Ranks, *flags, output_dir="unused"):
        flags = [*SHAPE, "--batch_size=2", f"--total_batch_size={32 * 4 * MICRO_STEPS}", *flags]
        self.config = load_config([*flags, "--device=cpu", f"--output_dir={output_dir}"], ranks.world_size)
        self.ranks = ranks
        self.parallel = parallelize(self.config, ranks)
        self.model = self.parallel.gpt
        self.optimizer = make_optimizer(self.model, self.config, ranks.world_size)

    def step(self, seed, micro_steps=MICRO_STEPS):
        """Makes one update like train_gpt.py and returns the gradient norm."""
        rows = torch.arange(8 * micro_steps * 17).view(-1, 17) * (seed + 1) % 251
        mine = rows.chunk(self.ranks.world_size)[self.ranks.rank]
        for i, micro_batch in enumerate(mine.chunk(micro_steps)):
            self.parallel.set_gradient_sync(last=i == micro_steps - 1)
            loss, _ = self.parallel(micro_batch[:, :-1], micro_batch[:, 1:])
            (loss * self.ranks.world_size / rows.numel()).backward()
        [squared] = self.ranks.sum(self.parallel.squared_grad_norm_share())
        self.parallel.scale_gradients(0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return squared**0.5

    def whole(self):
        """Returns every full parameter and optimizer state, on every rank."""
        parts = {n: p.detach() for n, p in self.model.named_parameters()} | named_states(self.optimizer, self.model)
        mine = {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in parts.items()}
        return {n: t for theirs in self.ranks.gather(mine) for n, t in theirs.items()}


def assert_equal(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, value in theirs.items():
        apart = (ours[name] - value).abs().max().item()
        assert apart <= tolerance, f"{name}: {apart}"


def check_initial_weights(ranks, folder):
    """Initial weights depend on seed, name and shape only. A rank holds its part only."""
    for family in FAMILIES.values():
        for flags in settings(ranks.world_size).values():
            setting = Setting(ranks, *flags, *family)
            config, named = setting.config, dict(setting.model.named_parameters())
            expected = {n: initial_value(n, p.shape, config, config.seed) for n, p in named.items()}
            assert named.keys() == {n for n, _ in GPT(config).named_parameters()}  # names stay clean
            assert_equal({n: t for n, t in setting.whole().items() if n in expected}, expected)
            if config.zero_stage >= 2:
                shards = ranks.world_size // config.replicas
                held = sum(local(p).numel() for p in named.values())
                assert held < setting.model.num_params() / shards * 1.25


def check_imported_weights(ranks, folder):
    """Imported weights equal those in the files. A rank holds its part and one full parameter at most."""
    pretrained = open_pretrained(f"hf:{folder.parent / 'llama'}")
    shape = ["--sequence_length=16", "--batch_size=2", f"--init_from=hf:{pretrained.path}", "--device=cpu"]
    handed_out = []

    def read(name):
        assert not handed_out or handed_out.pop()() is None, f"the parameter before {name} is still held"
        value = values(name, expected[name].shape)
        handed_out.append(weakref.ref(value))
        return value

    for flags in settings(ranks.world_size).values():
        config = load_config([*shape, *flags], ranks.world_size, open_pretrained)
        values = initial_values(open_weights(pretrained), config)
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in GPT(config).named_parameters()}
        expected = {n: values(n, s).float() for n, s in shapes.items()}
        model = parallelize(config, ranks, lambda name, shape: read(name)).gpt
        named = {n: p.detach() for n, p in model.named_parameters()}
        assert_equal({n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named.items()}, expected)
        if config.zero_stage >= 2:
            shards = ranks.world_size // config.replicas
            assert sum(local(p).numel() for p in named.values()) < model.num_params() / shards * 1.25


def check_numbers(ranks, folder):
    """Norms, parameters and moments of three steps: stage 1 equals stage 0 bit for bit, other stages up to rounding.

    The settings alternate between the families, on 2 ranks the other way round than on 4. Every stage on 2 ranks is
    also in tests/e2e/test_reference.py.
    """
    variants = {"gpt2": ["--sync_every_microbatch=1"], "llama": ["--activation_checkpointing=selective"]}
    for turn, (family, more) in enumerate(variants.items()):  # check_load runs without these flags
        reference = Setting(ranks, *FAMILIES[family])
        norms = [reference.step(k) for k in range(3)]
        for k, (name, flags) in enumerate(settings(ranks.world_size).items()):
            if (k + turn + (ranks.world_size == 2)) % 2:
                continue
            setting = Setting(ranks, *flags, *more, *FAMILIES[family])
            apart = max(abs(setting.step(k) - norms[k]) for k in range(3))
            limit = 0 if name in ("stage0", "stage1") else 5e-6
            assert apart <= limit, (name, more, apart)
            assert_equal(setting.whole(), reference.whole(), limit)


LORA = {
    "gpt2": ["--lora_rank=4", "--lora_embeddings=1"],
    "llama": ["--lora_rank=4", "--base_dtype=bfloat16", "--activation_checkpointing=selective"],
}


def check_lora(ranks, folder):
    """Adapters get the same values in four steps of every strategy, and frozen parameters stay as they are.

    The strategies alternate between the families. Each is compared with stage 0.
    """
    for turn, (family, more) in enumerate(LORA.items()):
        strategies = settings(ranks.world_size)
        strategies["offload"] = ["--zero_stage=3", "--cpu_offload=1", "--sync_every_microbatch=1"]
        expected, norms = {}, []
        for k, (name, flags) in enumerate(strategies.items()):
            if k and (k + turn) % 2:
                continue
            setting = Setting(ranks, *flags, *more, *FAMILIES[family], "--learning_rate=1e-3")
            assert setting.parallel.differing_parameter() is None
            before = setting.whole()
            ours = [setting.step(seed) for seed in range(4)]
            after = setting.whole()
            trained = {n for n, p in setting.model.named_parameters() if p.requires_grad}
            for n in dict(setting.model.named_parameters()):
                assert torch.equal(before[n], after[n]) == (n not in trained), (name, n)
            assert all(n.rpartition("/")[0] in trained for n in named_states(setting.optimizer, setting.model))
            expected, norms = expected or after, norms or ours
            limit = 0 if name in ("stage0", "stage1") else 5e-6
            assert max(abs(a - b) for a, b in zip(ours, norms, strict=True)) <= limit, (name, ours, norms)
            assert_equal(after, expected, limit)


def check_lora_memory(ranks, folder):
    """With 0.4 billion frozen parameters, a rank holds the bytes that the plan has, after a step."""
    flags = ["--n_layer=24", "--n_embd=1024", "--n_head=16", "--vocab_size=50257", "--sequence_length=8"]
    for stage in (0, 3):
        lora = ["--lora_rank=16", "--base_dtype=bfloat16", "--dtype=bfloat16", f"--zero_stage={stage}"]
        config = load_config([*flags, *lora, "--batch_size=1", "--device=cpu"], ranks.world_size)
        parallel = parallelize(config, ranks, lambda name, shape: torch.full((1,), 0.01).expand(shape))
        optimizer = make_optimizer(parallel.gpt, config, ranks.world_size)
        idx = torch.arange(8)[None]
        with parallel.autocast():
            parallel(idx, idx)[0].backward()
        optimizer.step()
        parameters = list(parallel.gpt.parameters())
        states = named_states(optimizer, parallel.gpt).values()
        tensors = {"parameters": parameters, "gradients": parallel.gradients(), "optimizer": states}
        reshard(parallel.gpt)
        assert sum(p.numel() for p in parameters) > 0.35e9
        planned = possible_peaks(config, ranks.world_size)["optimizer"]
        for part, held in tensors.items():
            measured = sum(local(t).nbytes for t in held)
            assert abs(measured / planned[part] - 1) < 0.1, (stage, part, measured, planned[part])
        del parallel, optimizer, parameters, states, tensors, held


def comm_counter():
    """Returns a CommDebugMode without the module tracker, which fails on modules that run twice in a step."""
    mode = CommDebugMode()
    tracker = mode.advanced_module_tracker
    tracker.__enter__, tracker.__exit__ = (lambda: None), (lambda: None)
    tracker.module_parents_dict[tracker.name] = set()
    return mode


def check_collectives(ranks, folder):
    """A step makes the collectives that docs/parallel.md lists."""
    L, A, W = LAYERS, MICRO_STEPS, ranks.world_size
    assert W > 1, "one rank has no collectives"
    groups = L + 1  # each block, and the other parameters
    expected = {
        "stage0": {"allreduce_": 1 + 1},  # one bucket, and the loss
        "stage1": {"allreduce_": 1 + 1, "broadcast_": W},
        "stage2": {"_allgather_base_": groups, "_reduce_scatter_base_": groups, "allreduce_": 1},
        "stage3": {"_allgather_base_": A * 2 * L, "_reduce_scatter_base_": groups, "allreduce_": 1},
        "hsdp2": {"_allgather_base_": groups, "_reduce_scatter_base_": groups, "allreduce_": groups + 1},
        "hsdp3": {"_allgather_base_": A * 2 * L, "_reduce_scatter_base_": groups, "allreduce_": groups + 1},
    }
    for name, flags in settings(W).items():
        for every in (0, 1):
            setting = Setting(ranks, *flags, f"--sync_every_microbatch={every}")
            for k in range(2 if setting.config.zero_stage < 2 else 1):  # DDP lays out its buckets
                setting.step(k)
            with comm_counter() as mode:
                setting.step(2)
            counts = {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
            wanted = dict(expected[name])
            if every and setting.config.zero_stage >= 2:
                wanted["_reduce_scatter_base_"] *= A
            assert counts == wanted, (name, every, counts, wanted)


def check_replicas(ranks, folder):
    """If a rank's copy of a parameter differs, all ranks name the parameter."""
    for name, flags in settings(ranks.world_size).items():
        setting = Setting(ranks, *flags)
        assert setting.parallel.differing_parameter() is None
        if ranks.rank == ranks.world_size - 1:
            with torch.no_grad():
                local(setting.model.h[1].mlp.c_fc.weight)[-1, -1] += 1e-3
        has_copies = ranks.world_size > 1 and (setting.config.zero_stage < 2 or setting.config.replicas > 1)
        expected = "h.1.mlp.c_fc.weight" if has_copies else None
        assert setting.parallel.differing_parameter() == expected, name


def check_norm(ranks, folder):
    """The norm of a gradient as large as an embedding's is exact, whole or sharded, and a NaN reaches all ranks."""
    whole = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    mesh = make_mesh(Setting(ranks, "--zero_stage=3").config, ranks.world_size, "cpu")
    shard = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    for gradient, how in ((whole, None), (shard, mesh)):
        norm = ranks.sum(norm_squared([gradient], how, ranks.world_size))[0] ** 0.5
        assert abs(norm / whole.double().norm().item() - 1) < 1e-6, norm
    if ranks.rank == ranks.world_size - 1:
        local(shard)[-1] = float("nan")
    assert math.isnan(ranks.sum(norm_squared([shard], mesh, ranks.world_size))[0])


def check_evaluation_leaves_shards(ranks, folder):
    """After a forward pass without a backward pass each rank holds its part of the parameters again."""
    for flags in settings(ranks.world_size).values():
        setting = Setting(ranks, *flags)
        before = {n: tuple(local(p).shape) for n, p in setting.model.named_parameters()}
        with torch.no_grad():
            setting.model(torch.zeros(1, 8, dtype=torch.long), last=torch.tensor([7]))
        reshard(setting.model)
        assert {n: tuple(local(p).shape) for n, p in setting.model.named_parameters()} == before


def check_save(ranks, folder):
    """Every setting saves a checkpoint after two steps, every other one in the background, and its full tensors."""
    for i, (name, flags) in enumerate(settings(ranks.world_size).items()):
        output_dir = folder / f"{name}-{ranks.world_size}"
        setting = Setting(ranks, *flags, f"--async_save={i % 2}", output_dir=output_dir)
        for k in range(2):
            setting.step(k)
        saver = CheckpointWriter(setting.config, ranks)
        saver.save(2, setting.model, setting.optimizer, {})
        whole = setting.whole()
        setting.step(2)  # must not change the checkpoint that is being written
        saver.close()
        if ranks.is_main:
            save_file({n: t.contiguous() for n, t in whole.items()}, output_dir / "whole.safetensors")
        dist.barrier()


def check_load(ranks, folder):
    """Every setting loads checkpoints of all kinds bit for bit and continues from them.

    Each checkpoint is loaded by one setting. All combinations are in tests/e2e/test_strategies.py, marked slow.
    """
    norms = []
    for i, saved in enumerate(sorted(folder.iterdir())):
        expected = load_file(saved / "whole.safetensors")
        for k, flags in enumerate(settings(ranks.world_size).values()):
            if k == i % 6:
                setting = Setting(ranks, *flags)
                load_checkpoint(list_checkpoints(saved)[0], setting.model, setting.optimizer)
                assert_equal(setting.whole(), expected)
                norms.append(setting.step(2))
    assert max(norms) - min(norms) < 5e-6, norms


def main():
    result, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = init_ranks("cpu", sharded=True)
    report = {}
    for name in names:
        try:
            globals()[f"check_{name}"](ranks, Path(folder))
            problem = ""
        except Exception:
            problem = traceback.format_exc()
        report[name] = "\n".join(p for p in ranks.gather(problem) if p)
    if ranks.is_main:
        Path(result).write_text(json.dumps(report))
    close_ranks()
    return 0


if __name__ == "__main__":
    run_command(main, teardown=False)
