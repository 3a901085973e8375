"""Export of a sharded checkpoint, and of every architecture that transformers has a class for."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cfg.config import load_config
from data.tokenizers.export import tokenizer_files
from data.tokenizers.load import load_tokenizer
from eval import generate as generating
from eval.generate import Sampling, generate
from model.formats.pretrained import (
    PretrainedModel,
    initial_values,
    load_model,
    model_config,
    open_pretrained,
    open_weights,
)
from model.gpt import GPT, init_weights
from scripts import export as command
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sharded(trainer, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("sharded") / "run"
    trainer.run(output_dir, "--zero_stage=3", "--num_iterations=3", ranks=2)
    return output_dir


def run_command(*words, code=0):
    command = [sys.executable, str(ROOT / "scripts/export.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def export(*words, code=0):
    """Runs the command in this process. Returns its error message, or ""."""
    args = command.parser().parse_args([str(word) for word in words])
    try:
        command.main(args)
    except UserError as error:
        assert code == 2, error
        return str(error)
    assert code == 0
    return ""


@pytest.mark.slow
def test_consolidated_has_the_weights_of_all_ranks(sharded, parameters_of, trainer, tmp_path):
    run_command("--checkpoint", sharded, "--to", "consolidated", "--output", tmp_path / "whole")
    tensors, expected = load_file(tmp_path / "whole/model/model.safetensors"), parameters_of(sharded)
    assert tensors.keys() == expected.keys() and all((tensors[n] == t).all() for n, t in expected.items())
    assert all((parameters_of(tmp_path / "whole")[n] == t).all() for n, t in expected.items())
    refused = trainer.run(tmp_path / "new", f"--resume={tmp_path / 'whole'}", code=2)
    assert "a model without its optimizer" in refused.stderr


def test_user_errors(sharded, tmp_path):
    assert "exists; choose another name" in run_command("--checkpoint", sharded, "--output", tmp_path, code=2)
    assert "no such run or checkpoint" in export(
        "--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "x", code=2
    )
    assert "contains no checkpoint" in export("--checkpoint", tmp_path, "--output", tmp_path / "x", code=2)
    assert not list(tmp_path.iterdir())
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to("nowhere")
    assert "cannot create the folder above it" in export("--checkpoint", sharded, "--output", file / "x", code=2)
    assert f"{link} is a link to nowhere, which does not exist" in export(
        "--checkpoint", sharded, "--output", link, code=2
    )


FAMILIES = {
    "gpt2": [],
    "nanogpt": ["--bias=0", "--mlp=gelu_exact"],
    "llama": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0"],
    "llama_bias": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu"],
    "mistral": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--sliding_window=7"],
    "qwen2": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--qkv_bias=1"],
    "qwen3": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--qk_norm=1", "--head_dim=6"],
    "nanochat": "--positions=rotary --norm=rmsnorm --norm_weight=0 --embedding_norm=1 --mlp=relu2 --bias=0 --qk_norm=1"
    " --logit_softcap=15".split(),
    "norms_without_weights": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--norm_weight=0"],
    "gpt2_without_weights_of_norms": ["--norm_weight=0"],
}
ROPES = ["", "linear:2.5", "llama3:8,1,4,16"]


@st.composite
def flags(draw):
    family = draw(st.sampled_from(list(FAMILIES)))
    kv = draw(st.sampled_from([1, 2, 3]))
    heads = kv * (draw(st.integers(1, 3)) if "--positions=rotary" in FAMILIES[family] else 1)
    found = [*FAMILIES[family], f"--n_head={heads}", f"--n_kv_head={kv}", f"--n_embd={heads * 8}"]
    found += [f"--vocab_size={draw(st.integers(2, 300))}", f"--n_layer={draw(st.integers(1, 3))}"]
    found += [f"--tie_embeddings={draw(st.integers(0, 1))}", f"--mlp_hidden={draw(st.sampled_from([0, 50]))}"]
    if "--positions=rotary" in found:
        found.append(f"--rope_scaling={draw(st.sampled_from(ROPES))}")
    return found


def source_of(config, seed=0):
    """Returns a model as a `Source`, with weights far from their initial values, and the model."""
    model = GPT(model_config(config.model_dump(), "here")).eval()
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, lambda name, shape: torch.randn(shape, generator=generator) * 0.2)
    weights = {n: p.detach()[: config.vocab_size] if n in ("wte.weight", "lm_head.weight") else p.detach()
               for n, p in model.named_parameters()}  # fmt: skip
    pretrained = PretrainedModel("hf", Path("somewhere"), "", config.model_dump(), "none")
    return command.Source(pretrained, Path("somewhere"), model.config, weights.__getitem__), model


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(flags=flags(), limit=st.sampled_from([5e9, 1e4]))
def test_transformers_loads_the_export_and_computes_the_same_logits(tmp_path_factory, flags, limit):
    folder = tmp_path_factory.mktemp("export")
    config = load_config(["--sequence_length=40", *flags], 1)
    source, ours = source_of(config)
    command.export_hf(source, folder, torch.float32, limit, "")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = theirs(idx).logits, ours(idx)
    assert got.shape == expected.shape  # without padding
    assert (got - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    back, _, _ = load_model(f"hf:{folder}", torch.device("cpu"))
    named = dict(back.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.equal(named[name][: config.vocab_size], p[: config.vocab_size]), name
    added = {name: p for name, p in named.items() if name not in dict(ours.named_parameters())}  # biases and norms
    assert all((p == (0 if name.endswith(".bias") else 1)).all() for name, p in added.items())
    tensors = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert len(tensors) == len(set(tensors)) and ("lm_head.weight" in tensors) == (not config.tie_embeddings)


@pytest.mark.parametrize(
    "flags, switch",
    [
        (["--mlp=relu2"], "--mlp=relu2: .* only --mlp=gelu"),
        (["--norm=rmsnorm"], "--norm=rmsnorm: .* only --norm=layernorm"),
        (["--logit_softcap=15"], "--logit_softcap=15.0: .* only --logit_softcap=0.0"),
        (["--n_kv_head=1"], "--n_kv_head=1: .* only --n_kv_head=2"),
        ([*FAMILIES["llama"], "--norm=layernorm"], "--norm=layernorm: .* only --norm=rmsnorm"),
        ([*FAMILIES["llama"], "--mlp=gelu"], "--mlp=gelu: .* only --mlp=swiglu"),
        ([*FAMILIES["qwen3"], "--sliding_window=4"], "--sliding_window=4: .*--qk_norm.* only --sliding_window=0"),
        ([*FAMILIES["qwen2"], "--bias=1"], "--bias=1: .*--qkv_bias.* only --bias=0"),
        ([*FAMILIES["llama"], "--embedding_norm=1"], "--embedding_norm=1: .*Llama.* only --embedding_norm=0"),
        (["--embedding_norm=1"], "--embedding_norm=1: .*GPT2.* only --embedding_norm=0"),
        ([*FAMILIES["nanochat"], "--norm=layernorm"], "--norm=layernorm: .*NanoChat.* only --norm=rmsnorm"),
        ([*FAMILIES["nanochat"], "--norm_weight=1"], "--norm_weight=1: .*NanoChat.* only --norm_weight=0"),
        ([*FAMILIES["nanochat"], "--embedding_norm=0"], "--embedding_norm=0: .* only --embedding_norm=1"),
        ([*FAMILIES["nanochat"], "--qk_norm=0"], "--qk_norm=0: .*--mlp=relu2.* only --qk_norm=1"),
        ([*FAMILIES["nanochat"], "--bias=1"], "--bias=1: .* only --bias=0"),
        ([*FAMILIES["nanochat"], "--qkv_bias=1"], "--qkv_bias=1: .* only --qkv_bias=0"),
        ([*FAMILIES["nanochat"], "--sliding_window=4"], "--sliding_window=4: .* only --sliding_window=0"),
    ],
)
def test_an_architecture_that_transformers_lacks_is_refused_and_the_flag_is_named(tmp_path, flags, switch):
    config = load_config(["--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=61", *flags], 1)
    with pytest.raises(UserError, match=switch):
        command.export_hf(source_of(config)[0], tmp_path, torch.float32, 5e9, "")
    assert not list(tmp_path.iterdir())


def test_nanochat_is_trained_sharded_exported_and_continued(trainer, metrics, tmp_path):
    """Its norms have no parameters to shard. With a head of zeros the first loss is that of a uniform guess."""
    start = ["--tie_embeddings=0", "--embedding_std=1", "--head_init=zero", "--zero_init=1"]
    shape = [*FAMILIES["nanochat"], *start, "--n_kv_head=1", "--num_iterations=3", "--optimizer=muon"]
    batch = "--total_batch_size=128"
    trainer.run(tmp_path / "run", *shape, batch, "--zero_stage=3", ranks=2)
    trainer.run(tmp_path / "alone", *shape, batch)
    sharded, alone = (metrics(tmp_path / name) for name in ("run", "alone"))
    flags = open_pretrained(str(tmp_path / "run")).flags
    assert alone[0]["loss"] == pytest.approx(math.log(flags["vocab_size"]), abs=1e-5)
    assert alone[-1]["loss"] < alone[0]["loss"]
    assert [r["loss"] for r in sharded] == pytest.approx([r["loss"] for r in alone], abs=5e-6)

    export("--checkpoint", tmp_path / "run", "--to=hf", "--output", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| matrix_lr | `0.02` |" in card and "| learning_rate |" not in card
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.config.pad_token_id is None
    ours, _, _ = load_model(tmp_path / "run", torch.device("cpu"))
    idx = torch.randint(flags["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = theirs(idx).logits, ours(idx)
    assert (got - expected).abs().max() < 1e-4 * (expected.max() - expected.min())

    again = [f"--init_from=hf:{tmp_path / 'out'}", "--num_iterations=1", "--learning_rate=1e-30"]
    trainer.run(tmp_path / "more", *again, batch)
    assert metrics(tmp_path / "more")[-1]["val_loss"] == pytest.approx(sharded[-1]["val_loss"], abs=1e-6)


@pytest.fixture(scope="module")
def text_run(trainer, tmp_path_factory):
    """A sharded checkpoint of a model with GPT-2's vocabulary, and its export."""
    folder = tmp_path_factory.mktemp("text")
    flags = ["--vocab_size=50257", "--num_iterations=2", "--total_batch_size=128", "--hellaswag_limit=1"]
    trainer.run(folder / "run", "--zero_stage=3", "--n_layer=1", *flags, ranks=2)
    export("--checkpoint", folder / "run", "--to", "hf", "--output", folder / "out")
    return folder / "run", folder / "out"


def test_the_export_of_a_run_generates_the_same_text(text_run):
    run, folder = text_run
    model, flags, _ = load_model(run, torch.device("cpu"))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == 50257
    ids = tokenizer("<|endoftext|>Hello, world", return_tensors="pt").input_ids
    own = load_tokenizer("gpt2")
    assert ids[0].tolist() == [own.end_of_text, *own.encode("Hello, world")]
    written = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.size(1) :].tolist()
    steps = generate(model, [ids[0].tolist()], 20, Sampling(temperature=0))
    assert written == [token for (token,) in steps][: len(written)]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5
    card = (folder / "README.md").read_text()
    expected = [
        "for 2 steps on 256 tokens",
        "validation perplexity",
        "total_batch_size | `128`",
        "_bin | `*_train_*.bin`",
    ]
    assert not [words for words in expected if words not in card]


@pytest.fixture
def with_begin_of_text(tmp_path):
    """A tokenizer that puts a BOS token before each text, like Llama's."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    files = tokenizer_files(load_tokenizer("gpt2"))
    data = json.loads(files["tokenizer.json"])
    begin = {"id": 50257, "content": "<s>", "special": True}
    data["added_tokens"].append({**data["added_tokens"][0], **begin})
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<s>": {"id": "<s>", "ids": [50257], "tokens": ["<s>"]}}
    data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])
    return folder


@pytest.mark.slow
def test_a_bos_token_is_added_by_rawgpt_and_by_transformers(trainer, with_begin_of_text, tmp_path, capsys):
    """The run, its export in rawgpt and its export in transformers generate the same text."""
    flags = [f"--tokenizer={with_begin_of_text}", "--vocab_size=50258", "--n_layer=1", "--num_iterations=2"]
    trainer.run(tmp_path / "run", *flags, "--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0")
    export("--checkpoint", tmp_path / "run", "--to=hf", "--output", tmp_path / "out")
    texts = []
    for checkpoint in (tmp_path / "run", f"hf:{tmp_path / 'out'}"):
        words = [f"--checkpoint={checkpoint}", "--prompt=Hello, world", "--temperature=0", "--max_new_tokens=9"]
        capsys.readouterr()
        generating.main(generating.parser().parse_args([*words, "--device=cpu", "--ignore_eot"]))
        texts.append(capsys.readouterr().out)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.bos_token_id == theirs.config.bos_token_id == theirs.generation_config.bos_token_id == 50257
    ids = tokenizer("Hello, world", return_tensors="pt").input_ids
    assert ids[0, 0] == 50257
    written = theirs.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert texts[0] == texts[1] and texts[0].startswith(tokenizer.decode(written[0, 1:]))


def test_an_export_is_imported_bit_for_bit(text_run, parameters_of):
    run, folder = text_run
    config = load_config([f"--init_from=hf:{folder}"], 1, open_pretrained)
    assert config.tokenizer == str(folder)
    model = GPT(config)
    init_weights(
        model, initial_values(open_weights(PretrainedModel("hf", folder, "", config.model_dump(), "none")), config)
    )
    named = dict(model.named_parameters())
    for name, value in parameters_of(run).items():
        assert torch.equal(named[name][:50257], value[:50257])


def test_an_export_can_be_trained_with_another_vocabulary(text_run, trainer, parameters_of, tmp_path):
    """gpt2-fim has three additional tokens. Their embeddings start as the mean of the others."""
    flags = ["--n_layer=1", "--tokenizer=gpt2-fim", "--vocab_size=50260", "--num_iterations=1", "--learning_rate=1e-30"]
    trainer.run(tmp_path / "run", f"--init_from=hf:{text_run[1]}", *flags, "--resize_embeddings=1")
    old, new = (parameters_of(run)["wte.weight"] for run in (text_run[0], tmp_path / "run"))
    assert torch.equal(new[:50257], old[:50257])
    assert torch.allclose(new[50257:50260], old[:50257].mean(0).expand(3, -1), atol=1e-7)


def test_lm_eval_loads_the_export(text_run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "one two", "good": " three", "bad": " 東京"}\n' * 3)
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {{train: {tmp_path / 'rows.jsonl'}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: 0\ndoc_to_choice: "{{[good, bad]}}"\n'
    )
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = {"model": "hf", "model_args": f"pretrained={text_run[1]}", "device": "cpu"}
    results = lm_eval.simple_evaluate(**model, tasks=["tiny"], task_manager=tasks)
    assert results["results"]["tiny"]["acc,none"] in (0.0, 1.0)


def test_an_export_without_a_tokenizer_prints_the_reason(sharded, tmp_path, capsys):
    export("--checkpoint", sharded, "--to=hf", "--output", tmp_path / "out")
    assert "exporting without a tokenizer: --tokenizer=gpt2 has 50,257 tokens" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id is None


def test_bfloat16_in_several_files_and_user_errors(text_run, sharded, tmp_path):
    run, _ = text_run
    export("--checkpoint", run, "--to=hf", "--dtype=bfloat16", "--max_file_gb=1e-3", "--output", tmp_path / "small")
    files = list((tmp_path / "small").glob("model-*.safetensors"))
    assert len(files) > 1 and all(t.dtype == torch.bfloat16 for f in files for t in load_file(f).values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16
    message = export("--checkpoint", sharded, "--to=hf", "--tokenizer=cl100k_base", "--output", tmp_path / "x", code=2)
    assert "--tokenizer=cl100k_base" in message
    assert "--max_file_gb=0.0" in export("--checkpoint", run, "--max_file_gb=0", "--output", tmp_path / "x", code=2)
    message = export("--checkpoint", f"hf:{tmp_path / 'small'}", "--output", tmp_path / "x", code=2)
    assert "--to=consolidated needs a rawgpt checkpoint" in message and not (tmp_path / "x").exists()
    export("--checkpoint", run, "--to=llmc", "--output", tmp_path / "model.bin")
    ours, back = (
        load_model(run, torch.device("cpu"))[0],
        load_model(f"llmc:{tmp_path / 'model.bin'}", torch.device("cpu"))[0],
    )
    assert all(torch.equal(a[:50257], b[:50257]) for a, b in zip(ours.parameters(), back.parameters(), strict=True))
