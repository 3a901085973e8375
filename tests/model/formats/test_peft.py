"""Adapters of PEFT are merged with the logits that PEFT computes, and PEFT loads the adapters that are written."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
)

from cfg.config import load_config, model_config
from model.formats.base import fingerprint
from model.formats.peft import OUR_A, read_adapter, write_adapter
from model.formats.pretrained import load_model, open_pretrained, open_weights
from model.gpt import GPT, parameter_shapes
from model.lora import add_adapters
from model.loss import IGNORE_INDEX
from util.errors import UserError

CPU = torch.device("cpu")
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 40, "bos_token_id": None}
CONFIGS = {
    "gpt2": lambda: GPT2Config(**GPT2, eos_token_id=None),
    "gpt2_untied": lambda: GPT2Config(**GPT2, eos_token_id=None, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=7, head_dim=6),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=6),
    "nanochat": lambda: NanoChatConfig(**SIZES),
}
# The others are slow tests: their classes differ from Llama's in nothing that an adapter sees.
FAST = ("gpt2", "llama", "llama_tied", "nanochat")
FAMILIES = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in CONFIGS]
LLAMA_MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
MODULES = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "nanochat": "q_proj k_proj v_proj o_proj fc1 fc2".split(),
}
OURS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def modules_of(family):
    return MODULES.get(family.partition("_")[0], LLAMA_MODULES)


def embedding_of(family):
    return "wte" if family.startswith("gpt2") else "embed_tokens"


def randomize(parameters, seed, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of small random models of transformers, by family."""
    root = tmp_path_factory.mktemp("bases")
    for family, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config())
        randomize(model.parameters(), 0, 0.1)
        model.save_pretrained(root / family)
    return root


def logits(model, length=30, vocab=61):
    idx = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(idx)
    return getattr(found, "logits", found)


def assert_equal(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def make_adapter(base, folder, **options):
    """Saves a random adapter that PEFT has made, and returns PEFT's model. Every module has its own A and B."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options)).eval()
    randomize([p for p in model.parameters() if p.requires_grad], 3)
    model.save_pretrained(folder)
    return model


def our_tensors(config, targets=OURS, rank=3, embeddings=False):
    """Returns random A and B of our model, and its embeddings and head if wanted."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in parameter_shapes(config).items():
        if any(name.endswith(f"{module}.weight") for module in targets):
            stem = name.removesuffix(".weight")
            found[f"{stem}.lora_a"] = torch.randn(rank, shape[1], generator=generator) * 0.3
            found[f"{stem}.lora_b"] = torch.randn(shape[0], rank, generator=generator) * 0.3
        elif embeddings and name in ("wte.weight", "wpe.weight", "lm_head.weight"):
            found[name] = torch.randn(shape, generator=generator) * 0.3
    return found


def with_adapters(model, tensors, scale):
    """Adds the product of A and B to the weights of our model: the definition, written out."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            stem = name.removesuffix(".weight")
            if stem + OUR_A in tensors:
                p += scale * tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
            elif name in tensors:
                p[: len(tensors[name])] = tensors[name]
    return model


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


# --- broken and unsupported adapters ---------------------------------------------------------------


@pytest.fixture
def adapter(bases, tmp_path):
    """The folder of an adapter of all matrices of a small Llama."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = model_config(open_pretrained(f"hf:{bases / 'llama'}").flags, "base")
    write_adapter(folder, config, our_tensors(config), 6.0, str(bases / "llama"))
    return folder


def refused(folder, said):
    with pytest.raises(UserError, match=said) as caught:
        load_model(f"peft:{folder}", CPU)
    assert "\n" not in str(caught.value) and (str(folder) in str(caught.value))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3 is not supported; only LORA"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias=all is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_new_setting": {"a": 1}}, "some_new_setting"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base model"),
        ({"modules_to_save": ["model.norm"]}, "modules_to_save has model.norm; only the embeddings"),
        ({"modules_to_save": ["embed_tokens"]}, "no weights of embed_tokens, which modules_to_save names"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has lm_head; only adapters of matrices in blocks"),
        ({"rank_pattern": {r".*\.q_proj": 4}}, "rank_pattern has .*, a regular expression"),
        ({"alpha_pattern": {"(a+)+": 4}}, "alpha_pattern has .*, a regular expression"),
        ({"r": 4}, r"shape \(.*\), but adapter_config.json and the base model need \(4, "),
        ({"r": True}, "damaged"),
        ({"r": 0}, "damaged"),
        ({"lora_alpha": "x"}, "damaged"),
        ({"use_rslora": "yes"}, "damaged"),
        ({"target_modules": [1]}, "damaged"),
        ({"layers_to_transform": ["x"]}, "damaged"),
        ({"target_modules": ["q_proj"]}, "has an adapter of .*, which adapter_config.json does not name"),
        ({"layers_to_transform": [0]}, "has an adapter of .*layers.1.*, which adapter_config.json does not name"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"base_model_name_or_path": "/no/where"}, "base_model_name_or_path=/no/where: no such folder"),
        ({"base_model_name_or_path": "/"}, "the base model in adapter_config.json: /config.json"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_read_is_an_error_that_names_it(adapter, setting, said):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    refused(adapter, said)


@pytest.mark.parametrize("missing", ["peft_type", "r"])
def test_a_missing_setting_is_an_error(adapter, missing):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != missing}))
    refused(adapter, f"{missing}. is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_an_error(adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    refused(adapter, "adapter_config.json is damaged")


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"has no tensor {NAME}"),
        (lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], "has no tensor .*layers.1.*; truncated"),
        (lambda t: t.clear(), "has no tensor"),
        (lambda t: t.update({NAME: torch.zeros(3, 15)}), r"up_proj.lora_A.weight has shape \(3, 15\), .* \(3, 16\)"),
        (lambda t: t.update({NAME: torch.zeros(3 * 16)}), "shape"),
        (lambda t: t.update({NAME: torch.zeros(3, 16, dtype=torch.int64)}), "dtype I64"),
        (lambda t: t.update({NAME.replace("layers.1", "layers.2"): t[NAME].clone()}), "layers.2.* is not read"),
        (lambda t: t.update({NAME.removeprefix("base_model.model."): t.pop(NAME)}), "is not read"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(16)}), "model.norm.weight is not read"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(62, 16)}), "has 62 rows, the base model 61"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(61, 15)}), "shape"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(())}), "has 0 rows"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_an_error(adapter, change, said):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, said)


def test_truncated_missing_and_pickled_files_are_an_error(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole + b"x"):
        file.write_bytes(content)
        refused(adapter, "not a safetensors file|claims a header")
    file.unlink()
    refused(adapter, "adapter_model.safetensors: no such file; save")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(adapter, "only adapter_model.bin, a pickle, which is not read")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, "adapter_config.json: No such file or directory; the folder of a PEFT adapter has one")


def test_a_folder_without_an_adapter_or_with_one_is_named(adapter, bases, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--init_from=peft:nowhere: no such folder"):
        open_pretrained("peft:nowhere")
    with pytest.raises(UserError, match=f"it holds a PEFT adapter; give peft:{adapter}"):
        open_pretrained(f"hf:{adapter}")


# --- initial values of our adapters --------------------------------------------------------------


def flags_for(bases, *flags, family="llama"):
    base = ["--sequence_length=24", f"--init_from=hf:{bases / family}", "--lora_rank=3", "--lora_alpha=6"]
    return load_config([*base, *flags], 1, open_pretrained)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_from_one_that_was_written(bases, tmp_path, family):
    config = flags_for(bases, "--lora_embeddings=1", family=family)
    tensors = our_tensors(config, embeddings=True)
    write_adapter(tmp_path, config, tensors, 6.0, str(bases / family))
    value, shapes = read_adapter(tmp_path, config), parameter_shapes(config)
    for name, tensor in tensors.items():
        assert torch.equal(value(name, shapes.get(name, tensor.shape)), tensor), name
    padded = value("wte.weight", torch.Size((64, 16)))
    assert torch.equal(padded[:61], tensors["wte.weight"]) and not padded[61:].any()
    with pytest.raises(KeyError):
        value("ln_f.weight", torch.Size((16,)))


def test_a_scale_of_rslora_is_an_alpha(bases, tmp_path):
    theirs = make_adapter(bases / "gpt2", tmp_path / "a", target_modules=["c_fc"], use_rslora=True)
    scale = 7 / 3**0.5
    alpha = f"--lora_alpha={3 * scale:.12g}"
    config = flags_for(bases, "--lora_targets=c_fc", alpha, family="gpt2")
    value = read_adapter(tmp_path / "a", config)
    ours, _, _ = load_model(f"hf:{bases / 'gpt2'}", CPU)
    names = [f"h.{i}.mlp.c_fc.lora_{x}" for i in range(2) for x in "ab"]
    assert_equal(logits(with_adapters(ours, {n: value(n, None) for n in names}, scale)), logits(theirs))
    with pytest.raises(UserError, match="--lora_alpha=6: the adapter of .* has 12.1243"):
        read_adapter(tmp_path / "a", flags_for(bases, "--lora_targets=c_fc", family="gpt2"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_rank=4"], "--lora_rank=4: the adapter of --lora_init=.* has rank 3 .*; give 3"),
        (["--lora_alpha=7"], "--lora_alpha=7: the adapter of --lora_init=.* has 6 .*; give 6"),
        (["--lora_targets=attn"], "--lora_targets=attn: the adapter of --lora_init=.* has one of model.layers.0.mlp"),
    ],
)
def test_a_flag_that_differs_from_the_adapter_is_an_error(bases, adapter, flags, said):
    with pytest.raises(UserError, match=said):
        read_adapter(adapter, flags_for(bases, *flags))


def test_an_adapter_that_cannot_be_continued_is_an_error_that_names_the_way_out(bases, tmp_path):
    """Different A in the parts of one matrix, fewer matrices, and trained embeddings."""
    make_adapter(bases / "llama", tmp_path / "a", target_modules=LLAMA_MODULES)
    with pytest.raises(UserError, match="its A of q_proj and k_proj and v_proj differ.*--init_from=peft:"):
        read_adapter(tmp_path / "a", flags_for(bases, "--lora_alpha=7"))
    make_adapter(bases / "llama", tmp_path / "b", target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match="--lora_targets=c_attn: the adapter of .* has none of .*.k_proj"):
        read_adapter(tmp_path / "b", flags_for(bases, "--lora_alpha=7", "--lora_targets=c_attn"))
    config = flags_for(bases)
    write_adapter(tmp_path, config, our_tensors(config, embeddings=True), 6.0, "x")
    with pytest.raises(UserError, match="--lora_embeddings=0: the adapter of .* contains trained embeddings"):
        read_adapter(tmp_path, config)


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
