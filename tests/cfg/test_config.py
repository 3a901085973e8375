"""Flags, presets, error messages and the imports of --help."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cfg.config import GROUPS, PRESETS, Config, load_config, to_yaml
from cfg.other_trainers import OTHER_NAMES
from model.formats.pretrained import PretrainedModel
from scripts.flags_table import flags_markdown
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = [name for name, field in Config.model_fields.items() if field.annotation in (int, float)]
BOOLEANS = [name for name, field in Config.model_fields.items() if isinstance(field.default, bool)]
CHOICES = [name for name, field in Config.model_fields.items() if get_args(field.annotation) and name not in BOOLEANS]
# In all other flags zero means "derive it" or "off".
NOT_ZERO = """n_layer n_head n_embd vocab_size vocab_pad rope_base norm_eps num_iterations sequence_length
    learning_rate cooldown_frac adam_eps replicas val_max_steps sample_tokens keep_last log_every
    wandb_log_iters embedding_std"""
CONTRACT = """input_train_bin input_val_bin output_dir num_iterations sequence_length batch_size total_batch_size
    learning_rate warmup_iters learning_rate_decay_frac weight_decay grad_clip dtype compile flash tensorcores
    overfit_single_batch val_loss_every val_max_steps sample_every save_every_niter zero_stage wandb_log_iters
    wandb_project_id cfg device seed resume max_minutes shuffle n_layer n_head n_kv_head n_embd vocab_size dropout
    positions norm mlp bias tie_embeddings qk_norm logit_softcap schedule optimizer replicas cpu_offload
    activation_checkpointing async_save hellaswag_every doc_mask init_from tokenizer tensorboard"""


def load(*argv, world_size=1):
    return load_config(list(argv), world_size)


def refusal(*argv, world_size=1):
    with pytest.raises(UserError) as caught:
        load(*argv, world_size=world_size)
    return str(caught.value)


def preset(tmp_path, text):
    path = tmp_path / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    return f"--cfg={path}"


def train(*flags):
    return subprocess.run([sys.executable, "train_gpt.py", *flags], cwd=ROOT, capture_output=True, text=True)


# Values


@pytest.mark.parametrize("text, value", [("0", False), ("1", True), ("true", True), ("false", False), ("True", True)])
def test_booleans_take_numbers_and_words(text, value):
    assert load(f"--compile={text}").compile is value
    assert load("--compile", text).compile is value


def test_compile_takes_model_too(tmp_path):
    config = load("--compile=model")
    assert config.compile == "model"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(f"--cfg={tmp_path / 'again.yaml'}").compile == "model"
    assert load("--compile=MODEL").compile == "model" and load("--compile=yes").compile is True
    assert refusal("--compile=modl") == "--compile=modl: input should be 0, 1 or model"
    assert "--compile=model" in refusal("--compile=model", "--zero_stage=3")


def test_a_bfloat16_residual_stream_needs_dtype_bfloat16():
    assert "--dtype=bfloat16" in refusal("--residual_dtype=bfloat16")
    assert load("--residual_dtype=bfloat16", "--dtype=bfloat16").residual_dtype == "bfloat16"


def test_batch_size_0_needs_total_batch_size():
    assert "--total_batch_size" in refusal("--batch_size=0")
    assert "--flash=0" in refusal("--batch_size=0", "--total_batch_size=4096", "--flash=0")
    assert load("--batch_size=0", "--total_batch_size=4096").batch_size == 0
    assert "1 × 1024 × 1 = 1024" in refusal("--batch_size=0", "--total_batch_size=1000")


NEED_OTHERS = ("resize_embeddings", "lora_embeddings")  # --init_from and --lora_rank


@pytest.mark.parametrize("name", [n for n in BOOLEANS if n not in NEED_OTHERS])
def test_a_bare_flag_is_true(name):
    stage = "--zero_stage=3"  # --cpu_offload needs it
    assert getattr(load(stage, f"--{name}"), name) is True
    assert getattr(load(f"--{name}", stage), name) is True
    assert getattr(load(f"--{name}=0"), name) is False


def test_both_ways_of_giving_a_value():
    assert load("--batch_size=3") == load("--batch_size", "3")
    assert load("--sample_prompt=a=b c").sample_prompt == "a=b c"


def test_the_last_of_a_repeated_flag_counts():
    assert load("--batch_size=3", "--batch_size=5").batch_size == 5


def test_without_flags_it_is_gpt2_124m():
    c = load()
    assert (c.n_layer, c.n_head, c.n_embd, c.vocab_size, c.sequence_length) == (12, 12, 768, 50257, 1024)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf", "1e999", "many", "", "1,5"])
def test_a_wrong_number_is_an_error_that_names_the_flag(name, value):
    message = refusal(f"--{name}={value}")
    assert f"--{name}={value}" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", NOT_ZERO.split())
def test_zero_is_an_error_where_it_means_nothing(name):
    assert f"--{name}=0" in refusal(f"--{name}=0")


@pytest.mark.parametrize("name", [name for name in NUMBERS if Config.model_fields[name].annotation is int])
def test_a_fraction_is_not_a_count(name):
    assert f"--{name}=1.5" in refusal(f"--{name}=1.5")


@pytest.mark.parametrize(
    "text, value",
    [("10_000", 10_000), ("1e4", 10_000), ("1.5E3", 1500), ("0.5M", 500_000), ("2k", 2000), ("1B", 10**9), ("7.0", 7)],
)
def test_counts_take_exponents_and_units(text, value):
    assert load(f"--num_iterations={text}").num_iterations == value


@pytest.mark.parametrize("text", ["1.5", "1e-1", "0.5", "1.2.3", "1e999", "1e99999", "5Q", "M", "_", "0x10", "1,000"])
def test_what_is_not_a_whole_number_is_refused(text):
    assert f"--num_iterations={text}: input should be a valid integer" in refusal(f"--num_iterations={text}")


@pytest.mark.parametrize("flag", ["dropout=1", "beta1=1", "beta2=1.5", "learning_rate_decay_frac=2", "seed=1e300"])
def test_upper_limits(flag):
    assert f"--{flag}" in refusal(f"--{flag}")


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", ["2", "-1", "", "maybe", "nan"])
def test_a_wrong_boolean_is_an_error_that_names_the_flag(name, value):
    assert f"--{name}={value}" in refusal(f"--{name}={value}")


@pytest.mark.parametrize("name", CHOICES)
def test_a_wrong_choice_is_an_error_that_lists_the_choices(name):
    message = refusal(f"--{name}=nonsense")
    assert f"--{name}=nonsense" in message
    assert all(repr(choice) in message for choice in get_args(Config.model_fields[name].annotation))


@pytest.mark.parametrize("name", ["output_dir", "resume"])
def test_an_empty_path_is_an_error(name):
    assert f"--{name}=" in refusal(f"--{name}=")


def test_negative_values_after_a_space_name_their_flag():
    assert "--batch_size" in refusal("--batch_size", "-4")
    assert "--learning_rate" in refusal("--learning_rate", "-1e-3")


def test_all_wrong_flags_are_named_at_once():
    message = refusal("--batch_size=-1", "--learning_rate=nan")
    assert "--batch_size" in message and "--learning_rate" in message


@pytest.mark.parametrize(
    "flags, world_size, message",
    [
        (["--replicas=2"], 4, "--replicas=2 needs --zero_stage=2 or 3"),
        (["--resize_embeddings=1"], 1, "--resize_embeddings=1 needs a pretrained model; give --init_from"),
        (["--head_dim=5", "--positions=rotary"], 1, "--head_dim=5 must be even"),
        (["--rope_scaling=linear:2"], 1, "--rope_scaling=linear:2 needs --positions=rotary"),
        (["--rope_scaling=yarn:2"], 1, "--rope_scaling=yarn:2: give linear:FACTOR or llama3:"),
        (["--rope_scaling=linear:0"], 1, "--rope_scaling=linear:0: give linear:FACTOR"),
        (["--rope_scaling=llama3:8,4,1,8192"], 1, "--rope_scaling=llama3:8,4,1,8192: LOW must be below HIGH"),
        (["--replicas=3", "--zero_stage=3"], 4, "--replicas=3 must divide the number of ranks, 4"),
        (["--cpu_offload=1", "--zero_stage=1"], 2, "--cpu_offload=1 needs --zero_stage=2 or 3"),
        (["--zero_stage=4"], 1, "--zero_stage=4"),
        (["--activation_checkpointing=all"], 1, "--activation_checkpointing=all"),
        (["--async_save=yes"], 1, "--async_save=yes"),
        (["--step_timeout_minutes=0"], 1, "--step_timeout_minutes=0"),
    ],
)
def test_flags_that_do_not_fit_together_are_an_error(flags, world_size, message):
    with pytest.raises(UserError) as refused:
        load_config(flags, world_size)
    assert message in str(refused.value)


# Names


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("--bacth_size=4", "batch_size"),
        ("--batch-size=4", "batch_size"),
        ("--learning_rat", "learning_rate"),
        ("--total_batch=4", "total_batch_size"),  # no abbreviations: a later flag could make them ambiguous
        ("--wandb_projekt", "wandb_project_id"),
    ],
)
def test_an_unknown_flag_suggests_the_closest(typed, meant):
    assert f"unknown flag {typed.split('=')[0]}; did you mean {meant}?" in refusal(typed)


def test_an_unknown_flag_without_a_close_one_points_to_help():
    assert "--help" in refusal("--xyzzyx=1")


def test_an_argument_without_a_flag_and_a_flag_without_a_value():
    assert "unknown argument shards; flags begin with --" in refusal("shards")
    assert "--batch_size" in refusal("--batch_size")
    assert "did you mean --batch_size?" in refusal("batch_size=4")


@pytest.mark.parametrize(
    "typed, ours",
    [
        ("--max_iters=5", "--num_iterations"),
        ("--block_size=64", "--sequence_length"),
        ("--lr", "--learning_rate"),
        ("--gradient_accumulation_steps=40", "--total_batch_size (tokens per optimizer step over all ranks)"),
        ("--n_epochs=1", "--num_epochs"),
        ("--device-batch-size=32", "--batch_size"),
        ("--depth=20", "--n_layer (the width, --n_embd, does not follow from it)"),
    ],
)
def test_a_flag_of_another_trainer_names_ours(typed, ours, tmp_path):
    assert refusal(typed) == f"unknown flag {typed.split('=')[0]}; rawgpt's flag is {ours}"
    key = typed.lstrip("-").split("=")[0]
    assert f"unknown flag {key!r} in" in (message := refusal(preset(tmp_path, f"{key}: 1\n"))) and ours in message


def test_docs_migrating_shows_the_flags_of_other_trainers():
    shown = {}
    for theirs, ours in re.findall(r"^\| (.*?) \| (.*?) \|", (ROOT / "docs/migrating.md").read_text(), re.MULTILINE):
        for name in re.findall(r"`-*([\w-]+)", theirs):
            shown.setdefault(name.replace("-", "_"), set()).update(re.findall(r"--\w+", ours))
    for theirs, ours in OTHER_NAMES.items():
        assert theirs not in Config.model_fields, f"--{theirs} is a flag now: take it out of the table"
        flags = re.findall(r"--\w+", ours)
        assert {flag.removeprefix("--") for flag in flags} <= Config.model_fields.keys()
        assert set(flags) & shown.get(theirs, set()), f"docs/migrating.md does not say that {theirs} is {ours}"


def test_a_preset_without_cfg_is_recognised(tmp_path):
    assert "unknown argument shakespeare; did you mean --cfg=shakespeare?" in refusal("shakespeare")
    assert "did you mean --cfg=shakespeare?" in refusal("shakespear.yaml", "--batch_size=4")
    path = preset(tmp_path, "n_layer: 3\n").removeprefix("--cfg=")
    assert f"did you mean --cfg={path}?" in refusal(path)


@pytest.mark.parametrize("name", CONTRACT.split())
def test_every_documented_flag_exists(name):
    assert name in Config.model_fields


def test_every_flag_is_in_one_group_and_has_a_description():
    names = [name for group in GROUPS for name in group.model_fields]
    assert sorted(names) == sorted(set(Config.model_fields) - {"cfg"})
    assert all(field.description for field in Config.model_fields.values())


# How flags fit together


@few
@given(batch=st.integers(1, 8), length=st.integers(1, 64), ranks=st.integers(1, 8), total=st.integers(1, 20_000))
def test_suggested_total_batch_sizes_are_accepted(batch, length, ranks, total):
    flags = [f"--batch_size={batch}", f"--sequence_length={length}"]
    micro = batch * length * ranks
    if total % micro == 0:
        assert load(*flags, f"--total_batch_size={total}", world_size=ranks).total_batch_size == total
        return
    message = refusal(*flags, f"--total_batch_size={total}", world_size=ranks)
    assert message.startswith(f"--total_batch_size={total}")
    suggested = [int(n) for n in re.findall(r"\d+", message.split("nearest: ")[1])]
    assert suggested and all(abs(n - total) < micro for n in suggested)
    for n in suggested:
        assert load(*flags, f"--total_batch_size={n}", world_size=ranks).total_batch_size == n


def test_the_total_batch_size_follows_from_the_ranks():
    flags = ["--batch_size=2", "--sequence_length=8"]
    assert [load(*flags, world_size=w).total_batch_size for w in (1, 2, 4)] == [16, 32, 64]


def test_the_number_of_ranks_comes_from_torchrun(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert load_config(["--batch_size=2", "--sequence_length=8"]).total_batch_size == 64
    monkeypatch.delenv("RANK")  # a scheduler's WORLD_SIZE alone is not torchrun's
    assert load_config(["--batch_size=2", "--sequence_length=8"]).total_batch_size == 16


@few
@given(embd=st.integers(1, 300), head=st.integers(1, 24), positions=st.sampled_from(["learned", "rotary"]))
@example(embd=100, head=12, positions="rotary")
def test_suggested_widths_are_accepted(embd, head, positions):
    flags = [f"--n_head={head}", f"--positions={positions}"]
    fits = embd % head == 0 and (positions == "learned" or embd // head % 2 == 0)
    if fits:
        assert load(*flags, f"--n_embd={embd}").n_embd == embd
        return
    message = refusal(*flags, f"--n_embd={embd}")
    assert "n_embd" in message
    for n in re.findall(r"\d+", message.split("nearest")[1]):
        assert load(*flags, f"--n_embd={n}").n_embd == int(n)


@few
@given(head=st.integers(1, 24), kv=st.integers(1, 30))
def test_suggested_key_value_heads_are_accepted(head, kv):
    flags = [f"--n_head={head}", f"--n_embd={head * 4}"]
    if head % kv == 0:
        assert load(*flags, f"--n_kv_head={kv}").n_kv_head == kv
        return
    message = refusal(*flags, f"--n_kv_head={kv}")
    assert message.startswith(f"--n_kv_head={kv} must divide --n_head={head}")
    assert load(*flags, f"--n_kv_head={message.split('nearest: ')[1]}")


def test_doc_mask_needs_a_tokenizer():
    assert load("--doc_mask=1").doc_mask
    assert "--tokenizer" in refusal("--doc_mask=1", "--tokenizer=none")


def test_rotary_positions_need_an_even_head_size():
    flags = ["--n_head=4", "--n_embd=20"]
    assert load(*flags).n_embd == 20
    message = refusal(*flags, "--positions=rotary")
    assert "rotary" in message and "16 or 24" in message


def test_a_sequence_longer_than_the_context_is_an_error():
    flags = ["--sequence_length=128", "--n_positions=64"]
    message = refusal(*flags)
    assert "--sequence_length=128" in message and "--n_positions=64" in message
    assert "raise --n_positions" in refusal(*flags, "--positions=rotary")  # the context of evaluation
    assert load("--sequence_length=64", "--n_positions=128").n_positions == 128


def test_zeros_that_mean_derive_it_are_filled_in():
    c = load("--n_head=6", "--n_embd=96", "--sequence_length=32", "--batch_size=2")
    assert (c.n_kv_head, c.n_positions, c.mlp_hidden, c.total_batch_size) == (6, 32, 384, 64)
    c = load("--n_embd=96", "--mlp=swiglu")
    assert c.mlp_hidden == 256  # 8/3 × 96, and already a multiple of 64


# Presets


def test_flags_win_over_a_preset_and_the_preset_over_defaults(tmp_path):
    given_preset = preset(tmp_path, "n_layer: 3\nbatch_size: 7\nlearning_rate: 3e-4\nbias: 0\n")
    c = load(given_preset, "--batch_size=5")
    assert (c.n_layer, c.batch_size, c.learning_rate, c.bias) == (3, 5, 3e-4, False)
    assert c.n_head == Config.model_fields["n_head"].default
    assert load("--batch_size=5", given_preset) == c


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_valid(path):
    assert load(f"--cfg={path.stem}").cfg == path.stem


def test_an_empty_preset_changes_nothing(tmp_path):
    named = {"cfg", "output_dir"}
    assert load(preset(tmp_path, "# nothing\n")).model_dump(exclude=named) == load().model_dump(exclude=named)


def test_an_unknown_key_in_a_preset_names_the_closest(tmp_path):
    message = refusal(preset(tmp_path, "n_layers: 3\n"))
    assert "'n_layers'" in message and "did you mean n_layer?" in message and "preset.yaml" in message


@pytest.mark.parametrize("text", ["n_layer: [1\n", "a: b: c\n", "\tn_layer: 3\n", "? n_layer\n? [1, 2]\n", "a: =\n"])
def test_a_broken_preset_is_an_error_that_names_it(tmp_path, text):
    assert "preset.yaml" in refusal(preset(tmp_path, text))


@pytest.mark.parametrize("text", ["sample_prompt: 2020-13-45\n", "n_layer: 0x_\n", "seed: 0b_\n"])
def test_a_preset_that_breaks_the_yaml_library_is_an_error_that_names_it(tmp_path, text):
    assert "--cfg=" in refusal(preset(tmp_path, text))


@few
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_as_a_preset_is_read_or_an_error(tmp_path, text):
    try:
        load(preset(tmp_path, text))
    except UserError as e:
        assert "--cfg=" in str(e) or str(e).startswith("--")


def test_a_preset_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00n_layer: 3")
    assert "bytes.yaml" in refusal(f"--cfg={tmp_path / 'bytes.yaml'}")


@pytest.mark.parametrize("text", ["- n_layer\n", "3\n", "n_layer\n"])
def test_a_preset_that_is_not_a_mapping_is_an_error(tmp_path, text):
    assert "flag: value" in refusal(preset(tmp_path, text))


def test_a_wrong_value_in_a_preset_names_its_flag(tmp_path):
    assert "--n_layer=-3" in refusal(preset(tmp_path, "n_layer: -3\n"))
    assert "--n_layer=None" in refusal(preset(tmp_path, "n_layer:\n"))
    assert "--learning_rate" in refusal(preset(tmp_path, "learning_rate: .nan\n"))


def test_a_file_that_is_no_preset_is_an_error_that_says_so(tmp_path):
    assert "--cfg=README.md: README.md" in (message := refusal("--cfg=README.md")) and "YAML" in message
    assert "no such preset" not in message
    (tmp_path / "words").write_text("Some words\n")
    assert "words is not a preset in YAML" in refusal(f"--cfg={tmp_path}/words")
    (tmp_path / "config.yaml").write_text("n_layer: 3\n")
    assert f"did you mean --cfg={tmp_path}/config.yaml?" in refusal(f"--cfg={tmp_path}")


def test_a_key_given_twice_in_a_preset_is_an_error(tmp_path):
    message = refusal(preset(tmp_path, "n_layer: 3\nn_head: 4\n'n_layer': 5\n"))
    assert "lines 1 and 3 both set n_layer; remove one" in message


def test_numbers_in_a_preset_are_decimal(tmp_path):
    c = load(preset(tmp_path, "batch_size: 010\nseed: 0x10\nnum_iterations: 1e4\nsample_prompt: 1:30\n"))
    assert (c.batch_size, c.seed, c.num_iterations, c.sample_prompt) == (10, 16, 10_000, "1:30")
    assert load(preset(tmp_path, "learning_rate: 010.5\nnum_iterations: 0.5K\n")).num_iterations == 500
    assert "--num_iterations=1:30" in refusal(preset(tmp_path, "num_iterations: 1:30\n"))
    assert "--learning_rate=1:30.5" in refusal(preset(tmp_path, "learning_rate: 1:30.5\n"))


def test_a_missing_preset_suggests_the_closest_or_lists_all():
    assert "did you mean gpt2-124m?" in refusal("--cfg=gpt2-124")
    assert "shakespeare" in refusal("--cfg=xyzzyx")
    assert "no such preset or file" in refusal("--cfg=nowhere/preset.yaml")


def test_resolved_flags_can_be_read_back(tmp_path):
    flags = ["--mlp=swiglu", "--n_kv_head=4", "--compile", "--learning_rate=1e-5", "--wandb_project_id=123", "--seed=7"]
    c = load(*flags, world_size=2)
    again = load(preset(tmp_path, to_yaml(c)), world_size=2)
    assert again.model_dump(exclude={"cfg"}) == c.model_dump(exclude={"cfg"})


@few
@given(prompt=st.text(st.characters(codec="utf-8")), rate=st.floats(1e-300, 1e300))
@example(prompt="1e-5", rate=1e-8)
@example(prompt="yes", rate=1e22)
@example(prompt="2020-01-01", rate=1.0)
@example(prompt="\x00\x85\u2028\r\n ", rate=0.1)
def test_any_text_and_number_can_be_read_back(tmp_path, prompt, rate):
    c = load(f"--sample_prompt={prompt}", f"--learning_rate={rate!r}")
    again = load(preset(tmp_path, to_yaml(c)))
    assert (again.sample_prompt, again.learning_rate) == (prompt, rate)


# The default output directory


def test_runs_of_different_presets_and_shapes_have_different_folders(tmp_path):
    mine = preset(tmp_path, "n_layer: 3\n")
    expected = {
        (): "outdir/run-12x768",
        ("--n_layer=3",): "outdir/run-3x768",
        ("--cfg=gpt2-124m",): "outdir/run-gpt2-124m",
        ("--cfg=modern-1.5b",): "outdir/run-modern-1.5b",
        ("--cfg=gpt2-124m", "--output_dir=x"): "x",
        (mine,): "outdir/run-preset",
        ("--cfg=shakespeare",): "outdir/shakespeare",
    }
    assert {flags: load(*flags).output_dir for flags in expected} == expected
    folders = [load(f"--cfg={path.stem}").output_dir for path in PRESETS.glob("*.yaml")]
    assert len(set(folders)) == len(folders) and "outdir/run-12x768" not in folders


def test_a_pretrained_model_has_its_own_folder():
    def open_nothing(text):
        return PretrainedModel("hf", Path(), "", {"n_positions": 1024}, "none")

    for source, name in (("hf:owner/gpt2", "gpt2"), ("outdir/own/", "own"), ("llmc:a/b.bin", "b.bin")):
        config = load_config([f"--init_from={source}"], 1, open_nothing)
        assert config.output_dir == f"outdir/run-12x768-from-{name}"


def test_of_the_initial_values_of_a_pretrained_model_only_embedding_std_is_kept():
    """Muon's rate of the embedding is a multiple of it."""
    flags = {"n_positions": 1024, "embedding_std": 1.0, "zero_init": True}
    config = load_config(["--init_from=own/run"], 1, lambda text: PretrainedModel("", Path(), "", flags, "none"))
    assert config.embedding_std == 1 and not config.zero_init


# Command lines


def test_the_known_short_command_line_is_accepted():
    c = load(
        *shlex.split(
            "--num_iterations=200 --sequence_length=1024 --batch_size=16 --total_batch_size=65536 --compile=1"
            " --tensorcores=1 --dtype=bfloat16 --flash=1 --input_train_bin='data/tinyshakespare/*_train.bin'"
            " --output_dir='./outdir'"
        ),
        world_size=2,
    )
    assert (c.n_layer, c.n_embd, c.dtype, c.compile, c.input_train_bin) == (
        *(12, 768, "bfloat16", True),
        "data/tinyshakespare/*_train.bin",
    )


def test_the_known_long_command_line_is_accepted():
    c = load(
        *shlex.split(
            "--num_iterations=38146 --sequence_length=1024 --batch_size=16 --total_batch_size=262144 --compile=1"
            " --tensorcores=1 --dtype=bfloat16 --flash=1 --input_train_bin='data/edu_fineweb10B/*_train_*.bin'"
            " --input_val_bin='data/edu_fineweb10B/*_val_*.bin' --output_dir='./outdir/edufineweb10B'"
            " --learning_rate=6e-4 --weight_decay=0.1 --learning_rate_decay_frac=0.1 --warmup_iters=700"
            " --overfit_single_batch=0 --val_loss_every=100 --sample_every=1000 --zero_stage=0"
            " --save_every_niter=2000 --wandb_log_iters=1 --wandb_project_id='gpt2-10BT'"
        ),
        world_size=2,
    )
    assert (c.total_batch_size, c.warmup_iters, c.learning_rate) == (262144, 700, 6e-4)
    assert (c.overfit_single_batch, c.wandb_project_id, c.sample_every) == (False, "gpt2-10BT", 1000)


def test_help_shows_every_flag_by_group_and_imports_little(imports_of):
    """How long --help takes depends on the machine; what it imports decides it."""
    done, imported = imports_of("train_gpt.py", "--help")
    assert done.returncode == 0
    assert not imported & {"torch", "numpy", "datasets", "transformers", "wandb", "tiktoken", "tokenizers"}
    assert len(imported) < 400
    assert all((group.__doc__ or "").strip() in done.stdout for group in GROUPS)
    assert all(f"--{name} " in done.stdout for name in Config.model_fields)


@pytest.mark.parametrize("flag", ["--batch_size=-1", "--bacth_size=4", "--total_batch_size=1000", "--batch_size"])
def test_a_wrong_flag_is_one_line_and_exit_code_2(flag):
    done = train(flag)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: .*--\w+.*\n", done.stderr)


def test_a_broken_preset_is_one_line_too(tmp_path):
    done = train(preset(tmp_path, "n_layer: [1\n"))
    assert done.returncode == 2
    assert re.fullmatch(r"error: --cfg=.*\n", done.stderr)


def test_flags_are_read_without_torch():
    code = "import sys, cfg.config; print(sorted({'torch', 'numpy', 'transformers', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_table_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text() == flags_markdown()
