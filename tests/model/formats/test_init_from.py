"""--init_from takes the flags of a pretrained model, and refuses flags that contradict them."""

import json
import re
import shutil

import pytest

from cfg.config import load_config, to_yaml
from data.tokenizers.load import tokenizer_size
from model.formats.pretrained import newest_checkpoint, open_pretrained
from util.errors import UserError

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "vocab_size": 50257}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def load(folder, *flags):
    return load_config([f"--init_from=hf:{folder}", *flags], 1, open_pretrained)


def test_a_run_has_the_flags_of_its_pretrained_model(folder):
    config = load(folder)
    expected = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "mlp_hidden": 96, "vocab_size": 1000}
    expected |= {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
    expected |= {"rope_base": 500000.0, "norm_eps": 1e-6, "n_positions": 256, "sequence_length": 256}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.tokenizer == "none"


def test_flags_and_presets_that_agree_are_accepted(folder, tmp_path):
    assert load(folder, "--n_layer=3", "--n_kv_head=2", "--mlp=swiglu") == load(folder)
    (tmp_path / "same.yaml").write_text(to_yaml(load(folder)))
    assert load(folder, f"--cfg={tmp_path / 'same.yaml'}").n_layer == 3


@pytest.mark.parametrize(
    "flag", ["n_layer=4", "n_kv_head=4", "mlp=gelu", "bias=1", "tie_embeddings=1", "norm_eps=1e-5"]
)
def test_a_flag_of_another_architecture_is_an_error(folder, flag):
    with pytest.raises(UserError, match=f"--{flag.split('=')[0]}=.*, but the model of --init_from has"):
        load(folder, f"--{flag}")


def test_training_flags_and_context_may_differ(folder):
    config = load(folder, "--dropout=0.1", "--flash=0", "--rope_base=1e6", "--rope_scaling=linear:2", "--vocab_pad=1")
    assert (config.dropout, config.rope_base, config.rope_scaling) == (0.1, 1e6, "linear:2")
    assert load(folder, "--sequence_length=64").n_positions == 256
    assert load(folder, "--sequence_length=512").n_positions == 512  # rotary positions have no table
    assert load(folder, "--n_positions=300", "--sequence_length=64").n_positions == 300
    with pytest.raises(UserError, match="--sequence_length=64 exceeds --n_positions=32; raise --n_positions$"):
        load(folder, "--n_positions=32", "--sequence_length=64")


def test_a_learned_position_table_cannot_grow(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    config = load(tmp_path)
    assert (config.sequence_length, config.n_positions, config.tokenizer) == (128, 128, "gpt2")
    with pytest.raises(
        UserError, match="--sequence_length=256 exceeds --n_positions=128; the position table .* lower it"
    ):
        load(tmp_path, "--sequence_length=256")
    with pytest.raises(UserError, match="--n_positions=256, but the model of --init_from has 128"):
        load(tmp_path, "--sequence_length=256", "--n_positions=256")


def test_another_vocabulary_needs_resize_embeddings(folder):
    with pytest.raises(UserError, match="--vocab_size=2000, but .* has 1000; or resize it with --resize_embeddings=1"):
        load(folder, "--vocab_size=2000")
    with pytest.raises(UserError, match="needs both tokenizers, but .* has no tokenizer; convert .*--tokenizer="):
        load(folder, "--vocab_size=2000", "--resize_embeddings=1", "--tokenizer=gpt2")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="needs both tokenizers, but --tokenizer=none; give --tokenizer"):
        load(folder, "--vocab_size=2000", "--resize_embeddings=1", "--tokenizer=none")
    assert load(folder, "--vocab_size=2000", "--resize_embeddings=1", "--tokenizer=gpt2").vocab_size == 2000
    flags = [f"--init_from=hf:{folder}", "--resize_embeddings=1", "--tokenizer=gpt2"]
    assert load_config(flags, 1, open_pretrained, tokenizer_size).vocab_size == 50257
    assert load_config(flags[:1], 1, open_pretrained, tokenizer_size).vocab_size == 1000


def test_the_default_tokenizer_is_that_of_the_model(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert load(folder).tokenizer == str(folder)
    assert load(folder, "--tokenizer=none").tokenizer == "none"
    assert load(folder, "--tokenizer=gpt2").tokenizer == "gpt2"


def test_a_rawgpt_run_or_checkpoint(tmp_path):
    flags = json.loads(
        json.dumps(load_config(["--n_layer=2", "--n_embd=24", "--n_head=2", "--dropout=0.1"], 1).model_dump())
    )
    for step in (1, 2):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"config": flags}))
    config = load_config([f"--init_from={tmp_path / 'run'}"], 1, open_pretrained)
    assert (config.n_layer, config.n_embd, config.dropout, config.tokenizer) == (2, 24, 0.0, "gpt2")
    assert load_config([f"--init_from={checkpoint}"], 1, open_pretrained).n_embd == 24
    (checkpoint.parent / "latest").write_text("step_00000002\n")
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    for place in (checkpoint.parent, checkpoint.parent / "latest", tmp_path / "copy", tmp_path / "copy" / "latest"):
        assert load_config([f"--init_from={place}"], 1, open_pretrained).n_embd == 24
    (tmp_path / "run/another").mkdir()
    (tmp_path / "run/another/tokenizer.json").write_text("{}")
    assert load_config([f"--init_from={tmp_path / 'run'}"], 1, open_pretrained).tokenizer == "gpt2"
    (checkpoint / "tokenizer.json").write_text("{}")
    for path in (checkpoint, checkpoint.parent, tmp_path / "run"):
        assert load_config([f"--init_from={path}"], 1, open_pretrained).tokenizer == str(checkpoint)
    for nothing in (tmp_path, tmp_path / "nowhere", "gpt2"):
        with pytest.raises(UserError, match="--init_from=.*: (contains no checkpoint|no such run or checkpoint)"):
            load_config([f"--init_from={nothing}"], 1, open_pretrained)


@pytest.mark.parametrize("file, kind", [("config.json", "hf"), ("adapter_config.json", "peft")])
def test_a_folder_of_hugging_face_without_its_prefix_is_an_error_that_names_the_prefix(tmp_path, file, kind):
    (tmp_path / file).write_text("{}")
    hint = f"contains no checkpoint; it holds a .*: give {kind}:{re.escape(str(tmp_path))}"
    with pytest.raises(UserError, match=hint):
        load_config([f"--init_from={tmp_path}"], 1, open_pretrained)
    with pytest.raises(UserError, match=hint):
        newest_checkpoint(tmp_path)
