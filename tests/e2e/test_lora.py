"""LoRA with the real commands: the numbers of a plain trainer, resume, every strategy, reading, and mistakes."""

import json
import math
import shutil
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from data.shards import write_shard
from data.tokenizers.load import load_tokenizer
from tests import reference
from tests.checkpoints import cut_back

VOCAB = 251  # of the tiny shards
SHAPE = ["--n_kv_head=1", "--mlp=swiglu", "--positions=rotary", "--norm=rmsnorm", "--bias=0", "--tie_embeddings=0"]
MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LORA = ["--lora_rank=4", "--lora_alpha=8", "--learning_rate=0.01"]
STAGES = {"stage1": ["--zero_stage=1"], "stage2": ["--zero_stage=2"], "stage3": ["--zero_stage=3"]}
OTHERS = {
    "hsdp": ["--zero_stage=3", "--replicas=2"],
    "offload": ["--zero_stage=3", "--cpu_offload=1", "--sync_every_microbatch=1"],
    "recompute": ["--zero_stage=2", "--activation_checkpointing=selective"],
}


@pytest.fixture(scope="module")
def base(trainer, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("base") / "run"
    trainer.run(output_dir, *SHAPE, "--num_iterations=10", "--val_loss_every=0")
    return output_dir


@pytest.fixture(scope="module")
def lora(trainer, base):
    """Flags of a run, and the run."""
    flags = [f"--init_from={base}", *LORA, "--val_loss_every=10"]
    trainer.run(base.parent / "lora", *flags, "--keep_last=9")
    return flags, base.parent / "lora"


class PlainLoRA(nn.Module):
    """Hu et al. 2021, section 4.1: W₀x + (alpha/r) B A x."""

    def __init__(self, linear, a, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / len(a)
        self.a, self.b = nn.Parameter(a), nn.Parameter(a.new_zeros(linear.out_features, len(a)))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)

    def merged(self):
        return self.linear.weight + self.scale * self.b @ self.a


def train_plainly(c, weights, shards):
    """Trains adapters with the parts of tests/reference.py; returns losses, norms, and merged weights by name."""
    model = reference.GPT(c).double()
    model.load_state_dict(weights)
    model.requires_grad_(False)
    adapters = {}
    for i, block in enumerate(model.h):
        for layers, name in (
            (block.attn, "c_attn"),
            (block.attn, "c_proj"),
            (block.mlp, "c_fc"),
            (block.mlp, "c_proj"),
        ):
            full = f"h.{i}.{'attn' if layers is block.attn else 'mlp'}.{name}"
            digest = sha256(f"{c.seed}:{full}.lora_a".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)
            bound = 1 / math.sqrt(layers[name].in_features)
            a = torch.empty(c.lora_rank, layers[name].in_features, dtype=torch.float32)
            a = a.uniform_(-bound, bound, generator=generator).double()
            layers[name] = adapters[f"{full}.weight"] = PlainLoRA(layers[name], a, c.lora_alpha)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1, betas=(0.9, 0.95))
    (data, _), records = reference.windows(shards, c.sequence_length), []
    n = c.total_batch_size // c.sequence_length
    for step in range(1, c.num_iterations + 1):
        places = range((step - 1) * n, step * n)
        rows = data[[reference.permuted(k % len(data), len(data), f"{c.seed}:{k // len(data)}") for k in places]]
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, c.grad_clip).item()
        optimizer.param_groups[0]["lr"] = reference.learning_rate(step, c)
        optimizer.step()
        optimizer.zero_grad()
        records.append((loss.item(), norm))
    return records, {name: adapter.merged().detach() for name, adapter in adapters.items()}


def test_a_run_has_the_numbers_of_a_plain_trainer(lora, base, trace, parameters_of, shards):
    flags = json.loads((lora[1] / "checkpoints/step_00000020/manifest.json").read_text())["config"]
    weights = parameters_of(base)
    expected, merged = train_plainly(SimpleNamespace(**flags), weights, f"{shards}/*_train_*.bin")
    for record, wanted in zip(trace(lora[1]), expected, strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx(wanted, abs=1e-5)
    for name, value in parameters_of(lora[1]).items():
        if name in merged:
            assert (value.double() - merged[name]).abs().max() < 1e-5 < (value - weights[name]).abs().max(), name
        else:
            assert torch.equal(value[:VOCAB], weights[name][:VOCAB]), name  # the padding may differ


def test_the_first_loss_is_that_of_the_base(lora, base, trainer, trace, tmp_path):
    trainer.run(tmp_path / "full", f"--init_from={base}", "--num_iterations=1", "--val_loss_every=0")
    assert trace(tmp_path / "full")[0]["loss"] == trace(lora[1])[0]["loss"]  # ==: all digits


def test_a_checkpoint_holds_the_adapters_and_names_the_base(lora, base):
    checkpoint = lora[1] / "checkpoints/step_00000020"
    names = [name for file in checkpoint.glob("model/*.safetensors") for name in load_file(file)]
    assert sorted(names) == sorted(f"h.{i}.{m}.lora_{x}" for i in (0, 1) for m in MODULES for x in "ab")
    recorded = json.loads((checkpoint / "state.json").read_text())["base"]
    assert recorded["init_from"] == str((base / "checkpoints/step_00000010").resolve())
    assert len(recorded["parameters"]) == 2 * 6 + 3 and len(recorded["sha256"]) == 64


def test_a_run_resumes_bit_equal_from_its_base_although_that_has_newer_checkpoints(
    lora, base, trainer, trace, tmp_path
):
    flags, whole = lora
    run = cut_back(whole, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    trainer.run(tmp_path / "base", *SHAPE, "--num_iterations=12", "--val_loss_every=0")
    done = trainer.run(run, *flags, f"--init_from={tmp_path / 'base'}")
    assert "resuming from" in done.stdout and trace(run) == trace(whole)
    ours, theirs = (load_file(next((r / "checkpoints/step_00000020/model").iterdir())) for r in (run, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
def test_the_fingerprint_depends_on_neither_dtype_nor_stage_nor_ranks(lora, base, trainer, tmp_path):
    flags, whole = lora
    more = ["--base_dtype=bfloat16", "--dtype=bfloat16", "--zero_stage=3", "--num_iterations=2", "--val_loss_every=0"]
    trainer.run(tmp_path / "run", *flags, *more, "--vocab_pad=1", ranks=2)
    states = [json.loads(next(r.glob("checkpoints/step_*/state.json")).read_text()) for r in (tmp_path / "run", whole)]
    assert states[0]["base"] == states[1]["base"]


def test_the_model_is_exported_merged_and_needs_no_base_then(lora, base, command, parameters_of, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "base"
    shutil.copytree(base, copy)
    cut_back(lora[1], run, step=5)
    for file in run.glob("checkpoints/step_*/state.json"):  # another place of the base
        manifest = json.loads((file.parent / "manifest.json").read_text())
        state = file.read_text().replace(str(base.resolve()), str(copy))
        file.write_text(state)
        manifest["files"]["state.json"] = {
            "bytes": len(state),
            "sha256": sha256(state.encode()).hexdigest(),
        }
        del manifest["sha256"]
        (file.parent / "manifest.json").write_text(json.dumps(manifest))
    expected = parameters_of(run)
    command("scripts/export.py", f"--checkpoint={run}", "--to=consolidated", f"--output={tmp_path / 'one'}")
    command("scripts/export.py", f"--checkpoint={run}", "--to=hf", f"--output={tmp_path / 'hf'}")
    copy.rename(tmp_path / "moved")
    found = parameters_of(tmp_path / "one")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())
    manifest = json.loads((tmp_path / "one/manifest.json").read_text())["config"]
    assert not any(name.startswith("lora_") or name == "base_dtype" for name in manifest)
    assert "base" not in json.loads((tmp_path / "one/state.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.allclose(model.model.layers[0].mlp.down_proj.weight, expected["h.0.mlp.c_proj.weight"])
    done = command("scripts/export.py", f"--checkpoint={run}", f"--output={tmp_path / 'two'}", code=2)
    assert f"their base model cannot be read (--init_from={copy}/" in done.stderr and not (tmp_path / "two").exists()


@pytest.mark.slow
def test_training_starts_from_the_merged_model_also_with_adapters_again(lora, trainer, trace, parameters_of, tmp_path):
    more = ["--num_iterations=2", "--save_every_niter=0", "--val_loss_every=0"]
    start = f"--init_from={lora[1]}"
    trainer.run(tmp_path / "full", start, *more)
    trainer.run(tmp_path / "again", start, *LORA, *more)
    first = [trace(tmp_path / name)[0]["loss"] for name in ("full", "again")]
    assert first[0] == first[1] < trace(lora[1])[0]["loss"] - 0.05
    twice, once = parameters_of(tmp_path / "again"), parameters_of(lora[1])
    assert 0 < max((twice[n] - v).abs().max() for n, v in once.items()) < 0.1
    trainer.run(tmp_path / "again", start, *LORA, *more, "--num_iterations=3")  # the fingerprint of merged weights


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--lora_rank=2"], "--lora_rank=2 (checkpoint: 4)"),
        (["--lora_alpha=4"], "--lora_alpha=4.0 (checkpoint: 8.0)"),
        (["--lora_targets=attn"], "--lora_targets=attn (checkpoint: all)"),
        (["--lora_embeddings=1"], "--lora_embeddings=True (checkpoint: False)"),
    ],
)
def test_a_flag_that_decides_what_adapters_are_may_not_change(lora, trainer, changed, message):
    done = trainer.run(lora[1], *lora[0], *changed, code=2)
    assert message in done.stderr and "set them back, or use another --output_dir" in done.stderr


def test_an_adapter_run_is_not_resumed_as_full_training_nor_the_other_way_round(lora, base, trainer):
    done = trainer.run(lora[1], f"--init_from={base}", code=2)
    assert "--lora_rank=0: " in done.stderr and "holds LoRA adapters of rank 4; set it back" in done.stderr
    done = trainer.run(base, *SHAPE, *lora[0], code=2)
    assert "--lora_rank=4: " in done.stderr and "holds a full model; set it back" in done.stderr


def test_another_base_and_a_missing_one_are_one_line(lora, base, trainer, tmp_path):
    run = cut_back(lora[1], tmp_path / "run")
    done = trainer.run(run, *lora[0], f"--init_from={base}/checkpoints/step_00000005", code=2)
    assert f"was trained from other weights, {base}/checkpoints/step_00000010" in done.stderr
    done = trainer.run(run, *lora[0], f"--init_from={cut_back(base, tmp_path / 'older', 5)}", code=2)
    assert "began from its checkpoint step_00000010, which cannot be used (it does not exist)" in done.stderr
    done = trainer.run(run, *lora[0], f"--init_from={tmp_path / 'none'}", code=2)
    assert f"--init_from={tmp_path / 'none'}: no such run or checkpoint" in done.stderr


def test_lora_needs_a_pretrained_model(trainer, tmp_path):
    done = trainer.run(tmp_path / "run", *LORA, code=2)
    assert "--lora_rank=4: adapters need a pretrained model; give --init_from" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_adapters_start_from_those_of_a_peft_folder(command, trainer, trace, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    model = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "hf")
    flags = [f"--init_from=hf:{tmp_path / 'hf'}", *LORA, "--val_loss_every=0"]
    trainer.run(tmp_path / "run", *flags)
    command("scripts/export.py", f"--checkpoint={tmp_path / 'run'}", "--to=peft", f"--output={tmp_path / 'peft'}")
    once = ["--num_iterations=1", "--learning_rate=1e-3"]
    trainer.run(tmp_path / "merged", f"--init_from={tmp_path / 'run'}", "--val_loss_every=0", *once)
    trainer.run(tmp_path / "again", *flags, f"--lora_init={tmp_path / 'peft'}", *once)
    first, merged, again = (trace(tmp_path / name)[0]["loss"] for name in ("run", "merged", "again"))
    assert again == pytest.approx(merged, abs=1e-5) and again < first - 0.02
    shutil.rmtree(tmp_path / "peft")  # a resumed run does not need it
    more = [*flags, f"--lora_init={tmp_path / 'peft'}", "--num_iterations=2"]
    assert "resuming from" in trainer.run(tmp_path / "again", *more).stdout
    done = trainer.run(tmp_path / "new", *more, code=2)
    assert f"--lora_init={tmp_path / 'peft'}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", [0, 1])
def test_converted_embeddings_are_saved_and_trained_only_with_the_flag(
    command, trainer, trace, parameters_of, tmp_path, embeddings
):
    (tmp_path / "text.txt").write_text("".join(f"Speaker {i}: the cat's {i} hats.\n\n" for i in range(900)))
    tokenizers = {size: load_tokenizer(str(make_tokenizer(command, tmp_path, size))) for size in (290, 310)}
    for size, tokenizer in tokenizers.items():
        (tmp_path / f"{size}").mkdir()
        tokens = np.array(tokenizer.encode((tmp_path / "text.txt").read_text()))
        write_shard(tmp_path / f"{size}" / "x_train.bin", tokens, size)

    def run(name, size, *flags):
        data = [f"--input_train_bin={tmp_path}/{size}/*.bin", "--input_val_bin=", f"--tokenizer={tmp_path}/tok{size}"]
        return trainer.run(tmp_path / name, *data, f"--vocab_size={size}", *flags, "--num_iterations=4").stdout

    run("base", 290, "--tie_embeddings=0")
    run("converted", 310, f"--init_from={tmp_path}/base", "--resize_embeddings=1", "--learning_rate=1e-9")
    flags = [f"--init_from={tmp_path}/base", "--resize_embeddings=1", *LORA, f"--lora_embeddings={embeddings}"]
    flags += ["--base_dtype=bfloat16", "--save_every_niter=2"]
    assert ("add --lora_embeddings=1" in run("lora", 310, *flags)) == (not embeddings)
    expected, found = parameters_of(tmp_path / "converted"), parameters_of(tmp_path / "lora")
    for name in ("wte.weight", "lm_head.weight"):
        change = (found[name] - expected[name])[:310].abs().max()
        assert change > 1e-3 if embeddings else change < 1e-3, name  # in bfloat16 they are rounded
    cut_back(tmp_path / "lora", tmp_path / "again", step=2)
    run("again", 310, *flags)
    assert trace(tmp_path / "again") == trace(tmp_path / "lora")


def make_tokenizer(command, folder, size):
    text, output = folder / "text.txt", folder / f"tok{size}"
    command("data/train_tokenizer.py", text, "--output", output, f"--vocab_size={size}", "--pattern=gpt2")
    return output


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one_process_and_resume_its_checkpoint(lora, trainer, trace, tmp_path):
    run = cut_back(lora[1], tmp_path / "run")
    trainer.run(run, *lora[0], "--zero_stage=3", ranks=2)
    for ours, theirs in zip(trace(run), trace(lora[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*STAGES, *OTHERS])
def test_every_strategy_gives_the_numbers_of_one_process(lora, trainer, trace, tmp_path, strategy):
    ranks = 4 if strategy == "hsdp" else 2
    trainer.run(tmp_path / "run", *lora[0], *(STAGES | OTHERS)[strategy], f"--batch_size={4 // ranks}", ranks=ranks)
    for ours, theirs in zip(trace(tmp_path / "run"), trace(lora[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*STAGES, *OTHERS])
def test_a_sharded_run_with_dropout_resumes_bit_equal(lora, trainer, trace, tmp_path, strategy):
    ranks = 4 if strategy == "hsdp" else 2
    flags = [*lora[0], *(STAGES | OTHERS)[strategy], "--lora_dropout=0.1", "--base_dtype=bfloat16", "--keep_last=9"]
    flags += ["--dtype=bfloat16", "--batch_size=2"]
    trainer.run(tmp_path / "whole", *flags, ranks=ranks)
    run = cut_back(tmp_path / "whole", tmp_path / "run")
    trainer.run(run, *flags, ranks=ranks)
    assert trace(run) == trace(tmp_path / "whole")


@pytest.mark.slow
def test_every_stage_resumes_the_checkpoints_of_every_other_on_other_ranks(lora, trainer, trace, tmp_path):
    stages = [0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0]
    for i, stage in enumerate(stages):
        flags = [*lora[0], f"--zero_stage={stage}", *(["--max_minutes=1e-9"] if i < len(stages) - 1 else [])]
        trainer.run(tmp_path / "run", *flags, ranks=(1, 2, 4)[i % 3])
    for ours, theirs in zip(trace(tmp_path / "run"), trace(lora[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_16_bits_give_the_losses_of_float32_within_their_rounding(lora, trainer, trace, tmp_path, dtype, stage):
    more = [f"--dtype={dtype}", "--base_dtype=bfloat16", f"--zero_stage={stage}", "--save_every_niter=0"]
    trainer.run(tmp_path / "run", *lora[0], *more, ranks=2 if stage else 1)
    losses = [[record["loss"] for record in trace(run)] for run in (tmp_path / "run", lora[1])]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    assert np.isfinite(losses).all()
