"""scripts/export.py --to=peft: PEFT and rawgpt load the adapter of a run, and continue it."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, LlamaConfig

from cfg.config import load_config
from data.tokenizers.export import extended_files
from data.tokenizers.load import load_tokenizer
from model.formats.pretrained import load_model, open_pretrained
from scripts import export as command
from train.inputs import report_other_base
from util.errors import UserError

CPU = torch.device("cpu")
VOCAB = 260
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
LORA = ["--lora_rank=4", "--lora_alpha=8", "--learning_rate=1e-2", f"--vocab_size={VOCAB}", "--num_iterations=3"]
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


def export(*words):
    """Runs the command in this process. Returns its error message, or ""."""
    try:
        command.main(command.parser().parse_args([str(word) for word in words]))
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def save_base(config, folder):
    """Writes a random model with a tokenizer of bytes and a chat template."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    names = ["<|im_start|>", "<|im_end|>"]
    for name, content in extended_files(load_tokenizer("bytes"), names, "<|im_end|>", TEMPLATE).items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def trained(trainer, tmp_path_factory):
    """A folder with a base model `base`, a LoRA run `run` and its adapter `adapter`."""
    folder = tmp_path_factory.mktemp("peft")
    kinds = {"num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
    save_base(LlamaConfig(vocab_size=VOCAB, **SHAPE, **kinds), folder / "base")
    trainer.run(folder / "run", f"--init_from=hf:{folder / 'base'}", *LORA)
    assert export("--checkpoint", folder / "run", "--to=peft", "--output", folder / "adapter") == ""
    return folder


def logits(model):
    idx = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(idx)
    return getattr(found, "logits", found)


def assert_equal(got, expected):
    assert (got - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_peft_loads_the_adapter_of_a_run_with_its_tokenizer_and_chat_template(trained):
    ours = logits(load_model(trained / "run", CPU)[0])
    assert_equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(trained / "adapter").eval()), ours)
    assert_equal(logits(load_model(f"peft:{trained / 'adapter'}", CPU)[0]), ours)
    assert (ours - logits(load_model(f"hf:{trained / 'base'}", CPU)[0])).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=True, return_dict=False)
    assert chat == [257, ord("a"), ord("b"), 258]
    assert GenerationConfig.from_pretrained(trained / "adapter").eos_token_id == 258
    card = (trained / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "lora_rank | `4`" in card and str(trained) not in card


def test_another_base_than_the_adapters_is_a_warning(trained, tmp_path):
    lines = []
    flags = ["--lora_rank=4", f"--lora_init={trained / 'adapter'}", "--output_dir=unused"]
    (tmp_path / "link").symlink_to(trained / "base")
    (tmp_path / "copy").mkdir()
    shutil.copy(trained / "base" / "config.json", tmp_path / "copy")
    for name in (trained / "base", tmp_path / "link", tmp_path / "copy"):
        config = load_config([f"--init_from=hf:{name}", *flags], 1, open_pretrained)
        report_other_base(config, open_pretrained(config.init_from), lines.append)
    assert len(lines) == 1 and f"--init_from=hf:{tmp_path / 'copy'}" in lines[0] and str(trained / "base") in lines[0]


def test_a_run_continues_the_adapter(trained, trainer, metrics, tmp_path):
    flags = [f"--init_from=hf:{trained / 'base'}", f"--lora_init={trained / 'adapter'}", *LORA, "--num_iterations=1"]
    trainer.run(tmp_path / "more", *flags, "--learning_rate=1e-30")
    last = metrics(trained / "run")[-1]["val_loss"]
    assert metrics(tmp_path / "more")[-1]["val_loss"] == pytest.approx(last, abs=1e-6)


@pytest.mark.slow
def test_a_run_starts_from_the_merged_adapter_and_evaluates_and_exports_it(
    trained, trainer, metrics, warm_python, tmp_path
):
    last = metrics(trained / "run")[-1]["val_loss"]
    flags = [f"--init_from=peft:{trained / 'adapter'}", *LORA[3:], "--num_iterations=1", "--learning_rate=1e-30"]
    trainer.run(tmp_path / "full", *flags)
    assert metrics(tmp_path / "full")[-1]["val_loss"] == pytest.approx(last, abs=1e-6)
    trainer.run(tmp_path / "again", *flags, "--lora_rank=2")  # new adapters on the merged ones
    trainer.run(tmp_path / "again", *flags, "--lora_rank=2", "--num_iterations=2", "--zero_stage=3", ranks=2)
    assert metrics(tmp_path / "again")[-1]["val_loss"] == pytest.approx(last, abs=1e-6)
    name = f"peft:{trained / 'adapter'}"
    assert export("--checkpoint", name, "--to=hf", "--output", tmp_path / "hf") == ""
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_equal(logits(theirs), logits(load_model(trained / "run", CPU)[0]))
    words = ["--prompt=ab", "--max_new_tokens=3", "--device=cpu"]
    assert warm_python.run("eval/generate.py", f"--checkpoint={name}", *words).stdout


@pytest.mark.slow
def test_trained_embeddings_and_a_base_that_is_a_run(trainer, tmp_path, capsys):
    """The base is exported first. The adapter of a sharded run, with new tokens, contains the embeddings."""
    trainer.run(tmp_path / "base", "--num_iterations=1")
    flags = [f"--init_from={tmp_path / 'base'}", *LORA[:3], "--num_iterations=2", "--lora_embeddings=1"]
    trainer.run(tmp_path / "run", *flags, "--lora_targets=attn,c_fc", "--zero_stage=3", ranks=2)
    words = ["--checkpoint", tmp_path / "run", "--to=peft", "--output", tmp_path / "adapter"]
    assert "is not in Hugging Face's format; export it with --checkpoint=" in export(*words)
    assert export("--checkpoint", tmp_path / "base", "--to=hf", "--output", tmp_path / "hf") == ""
    assert export(*words, "--base", tmp_path / "hf") == ""
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        idx = torch.arange(60).view(2, 30)
        assert_equal(theirs(idx).logits, load_model(tmp_path / "run", CPU)[0](idx))
    full = export("--checkpoint", tmp_path / "base", "--to=peft", "--output", tmp_path / "x")
    assert full == f"--to=peft: --checkpoint={tmp_path / 'base'} is no LoRA run, so it has no adapter; use --to=hf"


@pytest.mark.slow
def test_new_tokens_are_in_the_adapter(trainer, trained, tmp_path, capsys):
    """PEFT's AutoPeftModelForCausalLM resizes the base for them."""
    save_base(GPT2Config(vocab_size=257, n_embd=32, n_head=2, n_layer=2, n_positions=64), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    for name, content in extended_files(load_tokenizer("bytes"), [], "<|endoftext|>", "").items():
        (tmp_path / "base" / name).write_bytes(content)
    flags = [f"--init_from=hf:{tmp_path / 'base'}", *LORA, "--vocab_size=259", "--resize_embeddings=1"]
    flags += [f"--tokenizer={trained / 'base'}", "--lora_embeddings=1"]
    trainer.run(tmp_path / "run", *flags)
    assert export("--checkpoint", tmp_path / "run", "--to=peft", "--output", tmp_path / "adapter") == ""
    assert "the base model has 257 tokens, the adapter 259" in capsys.readouterr().out
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    idx = torch.arange(200, 259)[None]
    with torch.no_grad():
        expected = load_model(tmp_path / "run", CPU)[0](idx)
        assert_equal(theirs(idx).logits, expected)
        assert_equal(load_model(f"peft:{tmp_path / 'adapter'}", CPU)[0](idx), expected)


def test_mistakes_are_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = ["--checkpoint", trained / "run", "--output", tmp_path / "x"]
    assert "--base=nowhere: has no effect with --to=hf" in export(*run, "--to=hf", "--base=nowhere")
    for base in ("nowhere", "hf:nowhere"):
        assert "--base=hf:nowhere: no such folder" in export(*run, "--to=peft", "--base", base)
    assert "--to=peft: --checkpoint=hf:" in export(*run[2:], "--checkpoint", f"hf:{trained / 'base'}", "--to=peft")
    other = Path(tmp_path / "other")
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=257, n_embd=32, n_head=2, n_layer=2)).save_pretrained(other)
    assert "has model_type=gpt2, but the model of the run llama" in export(*run, "--to=peft", "--base", other)
    assert not (tmp_path / "x").exists()
