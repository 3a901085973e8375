"""Adapters of PEFT are merged with the logits that PEFT computes, and PEFT loads the adapters that are written."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cfg.config import load_config, model_config
from model.formats.lora_base import fingerprint
from model.formats.peft import write_adapter
from model.formats.pretrained import load_model, open_pretrained, open_weights
from model.gpt import GPT, parameter_shapes
from model.lora import add_adapters
from model.loss import IGNORE_INDEX
from tests.adapters import (
    CPU,
    FAMILIES,
    LLAMA_MODULES,
    OURS,
    assert_equal,
    logits,
    make_adapter,
    modules_of,
    our_tensors,
    randomize,
    with_adapters,
)
from util.errors import UserError


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_is_merged_with_the_same_logits(bases, tmp_path, family):
    theirs = make_adapter(bases / family, tmp_path / "adapter", target_modules=modules_of(family))
    ours, flags, path = load_model(f"peft:{tmp_path / 'adapter'}", CPU)
    assert path == tmp_path / "adapter" and flags["tokenizer"] == "none"
    assert_equal(logits(ours), logits(theirs))
    assert (logits(ours) - logits(load_model(f"hf:{bases / family}", CPU)[0])).abs().max() > 0.1


KEY, EMBED, BOTH = ["k_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"]
PATTERNS = {
    "target_modules": LLAMA_MODULES,
    "use_rslora": True,
    "rank_pattern": {"k_proj": 5, "layers.1.mlp.up_proj": 1},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11, "k_proj": 2},
}
SETTINGS = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", PATTERNS),
    ("llama", {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": r".*\.[01]\.self_attn\.(q|o)_proj"}),
    ("llama_tied", {"target_modules": KEY, "modules_to_save": EMBED}),
    ("llama_tied", {"target_modules": KEY, "modules_to_save": EMBED, "ensure_weight_tying": True}),
    ("gpt2", {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"], "modules_to_save": ["wpe", "wte"]}),
]
MORE_SETTINGS = [
    ("llama", {"target_modules": ["up_proj"], "use_rslora": True}),
    ("llama", {"target_modules": "all-linear"}),
    ("nanochat", {"target_modules": ["k_proj", "fc2"]}),
    ("qwen2", {"target_modules": KEY, "modules_to_save": BOTH}),
    ("llama", {"target_modules": KEY, "modules_to_save": EMBED}),
    ("llama", {"target_modules": KEY, "modules_to_save": ["lm_head"]}),
    ("llama_tied", {"target_modules": KEY, "modules_to_save": ["lm_head"]}),
    ("llama_tied", {"target_modules": KEY, "modules_to_save": BOTH}),
    ("gpt2", {"target_modules": ["mlp.c_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "wpe"], "ensure_weight_tying": True}),
]


@pytest.mark.parametrize(
    ("family", "options"),
    SETTINGS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_SETTINGS],
    ids=str,
)
def test_the_settings_of_an_adapter(bases, tmp_path, family, options):
    theirs = make_adapter(bases / family, tmp_path / "adapter", **options)
    ours, _, _ = load_model(f"peft:{tmp_path / 'adapter'}", CPU)
    assert_equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_an_adapter_that_is_written(bases, tmp_path, family):
    ours, _, _ = load_model(f"hf:{bases / family}", CPU)
    tensors = our_tensors(ours.config)
    write_adapter(tmp_path, ours.config, tensors, alpha=6.0, base=str(bases / family))
    base = AutoModelForCausalLM.from_pretrained(bases / family)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = logits(with_adapters(ours, tensors, 6.0 / 3))
    assert_equal(logits(theirs), expected)
    assert_equal(logits(theirs.merge_and_unload()), expected)
    assert_equal(logits(load_model(f"peft:{tmp_path}", CPU)[0]), expected)


@pytest.mark.parametrize("targets", [OURS[:1], OURS[1:2], OURS[2:3], OURS[3:], OURS[1:3], (OURS[1], OURS[3])], ids=str)
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_target_modules_names_exactly_the_adapted_modules(bases, tmp_path, family, targets):
    ours, _, _ = load_model(f"hf:{bases / family}", CPU)
    tensors = our_tensors(ours.config, targets)
    write_adapter(tmp_path, ours.config, tensors, alpha=6.0, base=str(bases / family))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / family), tmp_path)
    adapted = {name.partition(".lora_A")[0] for name, _ in theirs.named_parameters() if ".lora_A." in name}
    stored = {name.partition(".lora_A")[0] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert adapted == {name for name in stored if ".lora_B" not in name}
    assert_equal(logits(theirs), logits(with_adapters(ours, tensors, 2.0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_embeddings_are_written(bases, tmp_path, family):
    ours, _, _ = load_model(f"hf:{bases / family}", CPU)
    tensors = our_tensors(ours.config, embeddings=True)
    write_adapter(tmp_path, ours.config, tensors, alpha=6.0, base=str(bases / family))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / family), tmp_path).eval()
    expected = logits(with_adapters(ours, tensors, 2.0))
    assert_equal(logits(theirs), expected)
    back, flags, _ = load_model(f"peft:{tmp_path}", CPU)
    assert_equal(logits(back), expected)
    assert flags["tie_embeddings"] == ours.config.tie_embeddings


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_tied"])
def test_an_adapter_for_a_larger_vocabulary(bases, tmp_path, family):
    """PEFT saves the embeddings of a base model that was resized, and its users resize the base before they load it."""
    model = AutoModelForCausalLM.from_pretrained(bases / family)
    model.resize_token_embeddings(67, mean_resizing=False)
    options = {"target_modules": modules_of(family), "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, **options)).eval()
    embeddings = {id(m.weight): m.weight for m in (theirs.get_input_embeddings(), theirs.get_output_embeddings())}
    randomize([*(p for p in theirs.parameters() if p.requires_grad), *embeddings.values()], 3)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours, flags, _ = load_model(f"peft:{tmp_path / 'theirs'}", CPU)
    assert flags["vocab_size"] == 67
    assert_equal(logits(ours, vocab=67), logits(theirs, vocab=67))


def test_a_base_is_found_beside_the_adapter_or_in_the_working_directory(bases, tmp_path, monkeypatch):
    make_adapter(bases / "llama", tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("../base", "base", "./base", str(tmp_path / "base")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
        with pytest.raises(UserError, match="--init_from=peft:adapter.* no such folder"):
            open_pretrained("peft:adapter")
        os.symlink(bases / "llama", tmp_path / "base")
        assert os.path.samefile(open_pretrained("peft:adapter").base.path, bases / "llama")
        (tmp_path / "base").unlink()


def test_an_adapter_on_the_hub(bases, tmp_path, monkeypatch):
    """The files of the adapter and of its base come from the hub's cache, here from folders in its place."""
    make_adapter(bases / "gpt2", tmp_path / "adapter", target_modules=["c_attn"])
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "owner/base", "revision": "v2"}
    file.write_text(json.dumps(settings))
    asked = []

    def download(name, patterns, where):
        asked.append(name)
        return {"owner/adapter": tmp_path / "adapter", "owner/base@v2": bases / "gpt2"}[name]

    monkeypatch.setattr("util.hub.download", download)
    monkeypatch.setattr("model.formats.pretrained.download", download)
    ours, _, _ = load_model("peft:owner/adapter", CPU)
    assert set(asked) == {"owner/adapter", "owner/base@v2"}
    assert_equal(logits(ours), logits(load_model(f"peft:{with_base(tmp_path / 'adapter', bases / 'gpt2')}", CPU)[0]))


def with_base(folder, base):
    """Changes the base model that an adapter names."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


def test_the_fingerprint_of_a_matrix_is_that_of_what_is_merged(bases, tmp_path):
    """A run with LoRA on a merged adapter recognises its base by it."""

    def fingerprints(folder):
        read = open_weights(open_pretrained(f"peft:{folder}"))
        return {name: fingerprint(name, read(name), read) for name in names}

    names = list(parameter_shapes(model_config(open_pretrained(f"hf:{bases / 'llama'}").flags, "base")))
    make_adapter(bases / "llama", tmp_path / "a", target_modules=["q_proj"])
    before = fingerprints(tmp_path / "a")
    assert fingerprints(tmp_path / "a") == before
    base = open_weights(open_pretrained(f"hf:{bases / 'llama'}"))
    assert {n for n in names if before[n] != fingerprint(n, base(n))} == {f"h.{i}.attn.c_attn.weight" for i in (0, 1)}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    assert {n for n, f in fingerprints(tmp_path / "a").items() if f != before[n]} == {"h.1.attn.c_attn.weight"}


# --- the acceptance test: training ---------------------------------------------------------------


def tie_parts(model):
    """Gives query, key and value, and gate and up, one Parameter A, as our matrices have."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(f".{first}"):
                for other in others:
                    modules[name.replace(first, other)].lora_A["default"].weight = module.lora_A["default"].weight


@pytest.mark.parametrize("embeddings", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ten_steps_of_training_are_those_of_peft(bases, tmp_path, family, embeddings):
    """Losses are equal for equal base, A, B, batch and mask."""
    ours = GPT(model_config(open_pretrained(f"hf:{bases / family}").flags, "base"))
    config = load_config([f"--init_from=hf:{bases / family}", "--lora_rank=3", "--lora_alpha=6", "--sequence_length=24",
                          f"--lora_embeddings={int(embeddings)}"], 1, open_pretrained)  # fmt: skip
    add_adapters(ours, config)
    tensors = our_tensors(ours.config, embeddings=embeddings)
    base = open_weights(open_pretrained(config.init_from))
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, p in values.items():
            value = tensors[name] if name in tensors else base(name)
            p.zero_()[: len(value)] = value
    write_adapter(tmp_path, ours.config, tensors, 6.0, str(bases / family))
    model = AutoModelForCausalLM.from_pretrained(bases / family)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    tie_parts(theirs)

    trained = [[p for p in m.parameters() if p.requires_grad] for m in (ours, theirs)]
    optimizers = [torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1) for p in trained]
    generator = torch.Generator().manual_seed(2)
    idx = torch.randint(61, (4, 25), generator=generator)
    mask = torch.rand(4, 24, generator=generator) < 0.6
    targets = torch.where(mask, idx[:, 1:], -100)
    losses = []
    for _ in range(11):
        total, count = ours(idx[:, :-1], targets.masked_fill(~mask, IGNORE_INDEX))
        reference = torch.nn.functional.cross_entropy(theirs(idx[:, :-1]).logits.flatten(0, 1), targets.flatten())
        losses.append(((total / count).item(), reference.item()))
        for loss, optimizer in zip((total / count, reference), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0][0] - losses[-1][0] > 0.02
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], abs=1e-5)
