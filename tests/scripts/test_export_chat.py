"""scripts/export.py of a model that was trained on conversations: transformers begins and ends them as in training."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from cfg.config import load_config
from data.tokenizers.chat import BUILT_IN, Chat, ChatTemplate, find_template, prepare_tokenizer
from data.tokenizers.chat_export import ends_of_text, open_chat
from data.tokenizers.load import load_tokenizer
from eval.chat_format import open_chat_format
from model.gpt import GPT, init_weights, random_values
from scripts import export as command
from train.checkpoint_writer import CheckpointWriter
from train.optim import make_optimizer
from util.ranks import Ranks

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--sequence_length=64", "--positions=rotary", "--norm=rmsnorm"]
LLAMA = [*SMALL, "--mlp=swiglu", "--bias=0", "--batch_size=1", "--total_batch_size=64", "--input_train_bin=x"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


class Write(LogitsProcessor):
    """Makes a model write these tokens."""

    def __init__(self, prompt, tokens):
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, ids, scores):
        wanted = self.tokens[ids.size(1) - self.prompt]
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0)


def exported(folder, template, *flags):
    """Exports a random model with a tokenizer that data/sft.py would write. Returns its folder and tokenizer."""
    base = load_tokenizer("bytes")
    if template not in ("chatml", "llama3"):
        (folder / "template.jinja").write_text(template)
        template = str(folder / "template.jinja")
    tokenizer, files = prepare_tokenizer(base, find_template(template, base), folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name, content in files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    where = [f"--output_dir={folder}/run", f"--tokenizer={folder}/tokenizer", f"--vocab_size={tokenizer.vocab_size}"]
    config = load_config([*LLAMA, *where, *flags], world_size=1)
    model = GPT(config)
    init_weights(model, random_values(config, 0))
    state = {"step": 1, "record": {}, "data": {}, "scaler": {}, "tokenizer": tokenizer.fingerprint}
    writer = CheckpointWriter(config, Ranks(0, 0, 1, torch.device("cpu")))
    writer.save(1, model, make_optimizer(model, config, 1), state, tokenizer.files)
    words = ["--checkpoint", str(folder / "run"), "--to=hf", "--output", str(folder / "out")]
    command.main(command.parser().parse_args(words))
    return folder / "out", tokenizer


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_transformers_stops_at_the_end_of_a_turn_and_of_a_text(tmp_path, template, end):
    folder, own = exported(tmp_path, template)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    for last in (own.special[end], own.end_of_text):
        writes = Write(len(ids), [65, 66, last, 67, 68, 69])
        out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, logits_processor=[writes])
        assert out[0, len(ids) :].tolist() == [65, 66, last]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [own.end_of_text, own.special[end]]


def test_a_template_that_ends_turns_with_the_end_of_text_has_one_end(tmp_path):
    folder, own = exported(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == own.end_of_text


# The second one begins with spaces that lstrip_blocks removes. The third writes the token itself.
TEMPLATES = [
    "chatml",
    "  {% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}",
    "llama3",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("doc_mask", [0, 1])
def test_the_exported_template_begins_as_in_training(tmp_path, template, doc_mask):
    folder, own = exported(tmp_path, template, f"--doc_mask={doc_mask}")
    chat = Chat(own, find_template("tokenizer", own))
    trained = chat.encode_prompt(MESSAGES)
    if doc_mask and trained[0] != own.end_of_text:
        trained = [own.end_of_text, *trained]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"] == trained
    # Reading the export gives the same conversations, and the tokenizer is still that of the shards.
    again = load_tokenizer(str(folder))
    assert again.fingerprint["sha256"] == own.fingerprint["sha256"]
    assert open_chat_format("", None, again, {"doc_mask": False}, folder).encode(MESSAGES) == trained


def test_a_template_that_fails_is_reported_and_exported(tmp_path, capsys):
    own, files = prepare_tokenizer(load_tokenizer("bytes"), ChatTemplate("chatml", BUILT_IN["chatml"]), tmp_path)
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": "{{ raise_exception('no') }}"}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    chat = open_chat(replace(own, files=files))
    assert chat is None and ends_of_text(own, chat) == own.end_of_text
    assert capsys.readouterr().out.count("\n") == 1
