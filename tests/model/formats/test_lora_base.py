"""LoRA checkpoints and their base: fingerprints, merging, and what is damaged, missing or changed."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest
import torch

from cfg.config import load_config
from model.formats.checkpoint import with_sha256
from model.formats.lora_base import SAMPLE, Base, base_in_state, fingerprint, recorded_base
from model.formats.pretrained import checkpoint_reader, load_model, open_pretrained
from model.gpt import GPT, init_weights, parameter_shapes
from model.lora import add_adapters, saved_names
from train.checkpoint_writer import CheckpointWriter
from train.inputs import find_base, load_pretrained
from train.optim import make_optimizer
from util.errors import UserError
from util.ranks import Ranks

RANKS = Ranks(0, 0, 1, torch.device("cpu"))
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--vocab_size=251", "--sequence_length=16", "--device=cpu"]
MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def save(output_dir, *flags, seed=1, step=1, base=None):
    """Saves a checkpoint of random weights, all adapters included, and returns its directory."""
    (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = load_config([*SHAPE, f"--output_dir={output_dir}", *flags], 1, open_pretrained)
    model = GPT(config)
    if config.lora_rank:
        add_adapters(model, config)
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, lambda name, shape: torch.randn(shape, generator=generator) / 10)
    state = {"record": {}, "data": {}, "scaler": {}, **({"base": base.to_json()} if base else {})}
    CheckpointWriter(config, RANKS).save(step, model, make_optimizer(model, config, 1), state)
    return output_dir / "checkpoints" / f"step_{step:08d}", {n: p.detach() for n, p in model.named_parameters()}


def base_of(source, *flags):
    """Returns the base that a run with these flags records."""
    config = load_config([*SHAPE, f"--init_from={source}", "--output_dir=unused", *flags], 1, open_pretrained)
    value, base = load_pretrained(config, RANKS)
    init_weights(GPT(config), value)
    return base


def tamper(checkpoint, change):
    """Changes state.json, and the manifest to match."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(with_sha256(manifest)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A full checkpoint, a LoRA checkpoint on it, and one on the LoRA checkpoint, with their parameters."""
    folder = tmp_path_factory.mktemp("base")
    full = save(folder / "full")
    lora = ["--lora_rank=2", "--lora_alpha=3"]
    once = save(folder / "once", *lora, seed=2, base=base_of(full[0], *lora))
    more = ["--lora_rank=4", "--lora_targets=attn"]
    twice = save(folder / "twice", *more, seed=3, base=base_of(once[0], *more))
    return full, once, twice


def merged(weights, adapters, scale):
    found = dict(weights)
    for name in adapters:
        if name.endswith(".lora_a"):
            weight = f"{name[:-7]}.weight"
            change = adapters[f"{name[:-1]}b"].double() @ adapters[name].double()
            found[weight] = weights[weight].double() + scale * change
    return found


def test_reading_merges_adapters_into_their_base_also_if_that_has_adapters(made):
    (_, weights), (once, adapters), (twice, more) = made
    expected = merged(weights, adapters, 3 / 2)
    for checkpoint, wanted in ((once, expected), (twice, merged(expected, more, 32 / 4))):
        model, flags, found = load_model(checkpoint, torch.device("cpu"))
        assert found == checkpoint and flags["lora_rank"] and not model.training
        for name, p in model.named_parameters():
            assert (p[:251].double() - wanted[name][:251]).abs().max() < 1e-6, name
        read = checkpoint_reader(checkpoint, model.config)
        assert all(read(name).shape == shape for name, shape in parameter_shapes(model.config).items())


def test_converted_and_trained_embeddings_are_those_of_the_checkpoint(made, tmp_path):
    (full, weights), _, _ = made
    flags = ["--lora_rank=2", "--lora_embeddings=1"]
    checkpoint, own = save(tmp_path, *flags, seed=5, base=base_of(full, *flags))
    read = checkpoint_reader(checkpoint, load_config(SHAPE, 1))
    for name in ("wte.weight", "wpe.weight"):
        assert torch.equal(read(name)[:251], own[name][:251])
    assert torch.equal(read("h.0.ln_1.weight"), weights["h.0.ln_1.weight"])
    config = load_config([*SHAPE, *flags], 1)
    assert base_of(full, *flags).parameters.keys() == weights.keys() - saved_names(weights, config)


def test_a_fingerprint_is_of_name_shape_and_sampled_values_in_any_dtype():
    value = torch.arange(48.0).view(6, 8)
    one = fingerprint("a", value)
    assert one == fingerprint("a", value.bfloat16()) == fingerprint("a", value.clone().requires_grad_())
    assert one == sha256(b"a (6, 8)\n" + value.numpy().astype("<f4").tobytes()).hexdigest()
    changed = value.clone()
    changed[5, 7] += 1
    assert len({one, fingerprint("b", value), fingerprint("a", value.view(8, 6)), fingerprint("a", changed)}) == 4
    large = torch.zeros(SAMPLE * 2 + 1)
    assert fingerprint("a", large) == sha256(b"a (8193,)\n" + bytes(4 * (SAMPLE * 2 // 3 + 1))).hexdigest()
    large[6] = 1  # the stride is 3
    assert fingerprint("a", large) != fingerprint("a", torch.zeros_like(large))


def test_a_base_that_has_changed_is_one_line(made, tmp_path):
    (full, _), (once, _), _ = made
    shutil.copytree(full, tmp_path / "full")
    shutil.copytree(once, tmp_path / "once")
    place = str((tmp_path / "full").resolve())
    tamper(tmp_path / "once", lambda state: state["base"].update(init_from=place))
    load_model(tmp_path / "once", torch.device("cpu"))
    shutil.rmtree(tmp_path / "full")
    other, _ = save(tmp_path / "other", seed=9)
    shutil.copytree(other, tmp_path / "full")
    with pytest.raises(UserError, match=f"once: its base model {place} has changed .*differs\\); put the old one back"):
        load_model(tmp_path / "once", torch.device("cpu"))
    shutil.rmtree(tmp_path / "full")
    with pytest.raises(UserError, match=f"holds LoRA adapters, and their base model cannot be read .*{place}.*back"):
        load_model(tmp_path / "once", torch.device("cpu"))


DAMAGE = {
    "no base": lambda state: state.pop("base"),
    "not an object": lambda state: state.update(base=[]),
    "no name": lambda state: state["base"].pop("init_from"),
    "a number": lambda state: state["base"].update(init_from=3),
    "no parameters": lambda state: state["base"].update(parameters=None),
    "a parameter is missing": lambda state: state["base"]["parameters"].popitem(),
    "other hash": lambda state: state["base"].update(sha256="0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_without_a_base_is_one_line(made, tmp_path, damage):
    shutil.copytree(made[1][0], tmp_path / "step_00000001")
    tamper(tmp_path / "step_00000001", DAMAGE[damage])
    with pytest.raises(UserError, match="state.json: the name of the base model is missing or invalid"):
        load_model(tmp_path, torch.device("cpu"))


def test_a_run_that_is_resumed_keeps_the_checkpoint_that_it_began_with(made, tmp_path):
    run = tmp_path / "full"
    shutil.copytree(made[0][0].parent.parent, run)
    save(run, seed=4, step=2)
    first, second = (run / "checkpoints" / f"step_0000000{n}" for n in (1, 2))
    opened = open_pretrained(str(run))
    assert find_base(opened, None) == second
    assert find_base(opened, Base(str(first))) == first
    assert find_base(opened, Base(f"/moved/checkpoints/{first.name}")) == first  # the run has moved
    assert find_base(opened, Base("hf:/somewhere/step_00000001")) == second  # the fingerprints will tell
    assert find_base(replace(opened, path=second), Base(str(first))) == second
    assert find_base(replace(opened, path=run / "checkpoints"), Base(str(first))) == first
    (first / "state.json").write_text("{}")
    with pytest.raises(UserError, match="began from its checkpoint step_00000001, which cannot be used .state"):
        find_base(opened, Base(str(first)))


def test_the_recorded_base_is_found_for_resume_and_branches(made, tmp_path):
    (full, _), (once, _), _ = made
    run = once.parent.parent
    latest = tmp_path / "copy" / "latest"
    shutil.copytree(once.parent, latest.parent)
    latest.write_text(once.name)
    branches = [(tmp_path, str(path)) for path in (run, once, once.parent, latest.parent, latest)]
    for output_dir, resume in ((run, "auto"), (run, str(full)), *branches):
        assert recorded_base(output_dir, resume).init_from == str(full.resolve()), resume
    for output_dir, resume in ((run, "never"), (tmp_path, "auto"), (full.parent.parent, "auto")):
        assert recorded_base(output_dir, resume) is None


def test_a_recorded_base_is_read_back():
    base = Base("hf:x", {"b": "2", "a": "1"})
    assert base_in_state({"base": base.to_json()}, None) == base
    assert not base.difference(Base("other", {"a": "1", "b": "2"}))
    assert base.difference(Base("hf:x", {"a": "1", "b": "3"})) == "b" == base.difference(Base("hf:x", {"a": "1"}))
