"""Broken and hostile input: whatever a file, a flag or a name holds, it is taken, or refused in one line that names it.

Each property has a thousand cases. Nothing is written by what only reads, and nothing outside --output_dir at all.
"""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cfg.config import Config, load_config
from data import fineweb_edu
from data.hellaswag import read_hellaswag
from data.open import open_train_data
from data.prepare.inputs import ReadOptions, input_files
from data.prepare.mixture import read_mixture
from data.prepare.sources import documents, plan
from data.shards import HEADER_BYTES, write_shard
from eval.lambada import read_lambada
from model.formats.checkpoint import find_checkpoint, find_damage, read_state, with_sha256
from model.formats.hf import write_config
from model.formats.hf_tensors import split_for_export
from model.formats.peft import write_adapter
from model.formats.pretrained import open_pretrained, open_weights
from model.gpt import GPT, init_weights, parameter_shapes
from train import checkpoint
from train.checkpoint_writer import CheckpointWriter
from train.metrics import Metrics, read_records
from train.optim import make_optimizer
from train.stability import LossScaler, SpikeGuard
from util.errors import UserError
from util.files import file_sha256
from util.ranks import Ranks

CASES = 300
cases = settings(
    max_examples=CASES,
    deadline=timedelta(seconds=3),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
ROOT = Path(__file__).resolve().parents[1]
VOCAB = 50
PROMISE = "accepted, or rejected with one line that names the file or flag; nothing is written elsewhere"
broken = pytest.mark.fault  # (what is broken, PROMISE)


@pytest.fixture
def place(tmp_path):
    """An output directory beside a file of the user. Both are checked after the test."""
    (tmp_path / "beside").write_text("mine")
    (tmp_path / "out").mkdir()
    before = set(os.listdir())
    yield tmp_path / "out"
    assert sorted(os.listdir(tmp_path)) == ["beside", "out"] and (tmp_path / "beside").read_text() == "mine"
    assert set(os.listdir()) == before


@contextmanager
def refused_in_one_line(*names):
    """Allows the block to raise a UserError, which must be one line that contains one of the names."""
    try:
        yield
    except UserError as error:
        check_line(error, *names)


def check_line(error, *names):
    line = " ".join(str(error).split())  # as util.errors.exit_with prints it
    assert any(str(name) in line for name in names), line[:3000]
    assert len(line) < 3000, len(line)


@contextmanager
def refused(*names):
    """Expects a UserError of one line that contains one of the names."""
    with pytest.raises(UserError) as caught:
        yield
    check_line(caught.value, *names)


# What stands where something else should: in JSON, in YAML and on the command line.
NAMES = [
    "../x",
    "../../../etc/passwd",
    "/etc/passwd",
    "/",
    "",
    ".",
    "..",
    "~",
    "~nobody",
    "x" * 300,
    "a/" * 3000,
]
NAMES += ["-rf", "\n", "\x1b[2J", "state.json/", "model", "ｓtate", "\ud800", "*", "[", "**", "https://x.y/z", "C:\\x"]
NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**4000, 0.0, -0.0, 0.5, 2.0, 1e308, 1e-320]
ODD = [None, True, False, *NUMBERS, float("nan"), float("inf"), *NAMES, [], {}, [[]], {"": {}}, "x" * 20_000]
odd = st.sampled_from(ODD)
json_value = (
    odd | st.text(max_size=8) | st.lists(odd, max_size=3) | st.dictionaries(st.sampled_from(NAMES), odd, max_size=3)
)
DEEP = [
    opened * n + closed * n for opened, closed in ("[]", ("{'a':".replace("'", '"'), "}")) for n in (900, 990, 100_000)
]


def dumped(value):
    return json.dumps(value).encode()


raw = st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace"))
raw |= st.sampled_from([text.encode() for text in DEEP] + [b"\xff\xfe[\x00]\x00", b"9" * 5000, b"NaN", b"{"])


@st.composite
def changed(draw, whole):
    """Bytes of a real file, some of them others, cut or doubled."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["put", "cut", "double", "flip"]))
        if how == "put":
            content[at:at] = draw(st.binary(max_size=5))
        elif how == "cut":
            del content[at : at + draw(st.sampled_from([1, 3, 100, 10**6]))]
        elif how == "double":
            content += content[at:]
        elif at < len(content):
            content[at] ^= draw(st.integers(1, 255))
    return bytes(content)


@st.composite
def changed_json(draw, whole):
    """The text of a JSON object in which some entries, at any depth, are others or gone."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        inner = content
        while True:
            key = draw(st.sampled_from(sorted(inner)) if inner else st.just("x"))
            if not isinstance(inner.get(key), dict) or draw(st.integers(0, 3)) == 0:
                break
            inner = inner[key]
        how = draw(st.integers(0, 3))
        if how == 0:
            inner.pop(key, None)
        elif how == 1:
            inner[draw(st.sampled_from(NAMES))] = inner.get(key)
        else:
            inner[key] = copy.deepcopy(draw(json_value))
    return dumped(content)


# ------------------------------------------------------------------------------------------------ shards

TOKENS = np.arange(400) % VOCAB
IDENTITY = {"name": "gpt2"}


@st.composite
def shard_bytes(draw, whole):
    kind = draw(st.sampled_from(["changed", "random", "header", "header"]))
    if kind == "changed":
        return draw(changed(whole))
    if kind == "random":
        return draw(st.binary(max_size=2 * HEADER_BYTES))
    header = np.zeros(256, "<i4")
    numbers = st.sampled_from([20240520, 20240801, 20240522, 1, 7, 0, -1, 400, 200, 2**31 - 1, -(2**31)])
    header[:3] = draw(numbers), draw(numbers), draw(numbers)
    tokens = draw(st.sampled_from([TOKENS, TOKENS[:200], TOKENS[:3], TOKENS[:0], TOKENS + 2**15]))
    return header.tobytes() + tokens.astype(draw(st.sampled_from(["<u2", "<u4"]))).tobytes()


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "whole.bin"
    write_shard(path, TOKENS, VOCAB)
    return path.read_bytes()


@broken("bytes of token shards, and their manifests", PROMISE)
def test_shards(place, shard, injected):
    folder = place / "shards"
    folder.mkdir()
    flags = ["--sequence_length=16", "--batch_size=2", f"--vocab_size={VOCAB}"]
    config = load_config([*flags, f"--input_train_bin={folder}/*.bin"], world_size=1)
    beside = {"tokenizer": {"name": "gpt2", "vocab_size": VOCAB, "sha256": "0" * 64}, "files": []}

    @cases
    @given(
        name=st.sampled_from(["x_train_000001.bin", "train.bin"]),
        content=shard_bytes(shard),
        manifest=st.none() | raw | json_value.map(dumped) | changed_json(beside),
        check=st.booleans(),
    )
    def holds(name, content, manifest, check):
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(content)
        if manifest is not None:
            (folder / "manifest.json").write_bytes(manifest)
        with refused_in_one_line(folder):
            data = open_train_data(config.model_copy(update={"check_data": check}), IDENTITY)
            try:
                for step in (1, 7, 10**9):
                    batch = data.batch(step)
                    assert batch.shape == (2, 17) and int(batch.min()) >= 0 and int(batch.max()) < VOCAB
            finally:
                data.stream.close()
        assert {p.name for p in folder.iterdir()} <= {name, "manifest.json"}

    holds()
    injected(CASES)


@pytest.mark.parametrize("kind", ["folder", "loop", "nothing", "fifo"])
def test_a_path_that_is_not_a_shard_file_is_refused(tmp_path, kind):
    path = tmp_path / "x.bin"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("loop", "nothing"):
        path.symlink_to(path if kind == "loop" else tmp_path / "none")
    pattern = {"long": tmp_path / ("x" * 300), "tilde": "~nobody", "long folder": tmp_path / ("y" * 300) / "*.bin"}
    for given_as in (pattern.get(kind, path), f"a=1:{pattern.get(kind, path)}"):
        with refused("--input_train_bin"):
            open_train_data(load_config([f"--input_train_bin={given_as}"], world_size=1), IDENTITY)


# ------------------------------------------------------------------------------------------------ checkpoints

RECORD = {"step": 1, "tokens": 16, "loss": 4.0, "lr": 1e-3, "grad_norm": 1.0, "tok_per_s": 1e3, "mfu": None}
RECORD |= {"elapsed_s": 1.0, "memory_bytes": 1, "skipped": "norm 9, a spike above 3"}
SHAPE = ["--n_layer=1", "--n_head=1", "--n_embd=4", f"--vocab_size={VOCAB}", "--sequence_length=8"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with one checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    config = load_config([*SHAPE, f"--output_dir={folder}"], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    shards = [{"name": "x.bin", "tokens": 400, "ends": "00"}]
    data = {"seed": 1337, "sequence_length": 8, "total_batch_size": 32, "shuffle": True, "shards": shards}
    state = {"record": RECORD, "data": data, "scaler": {}, "wandb_id": None, "tokenizer": {"name": "none"}}
    state |= {"guard": SpikeGuard(config).state_dict() | {"norms": [1.0, 2.0]}}
    optimizer = make_optimizer(model, config, 1)
    CheckpointWriter(config, Ranks(0, 0, 1, torch.device("cpu"))).save(1, model, optimizer, state)
    return folder


def resumed(config):
    """All that a resume reads before it loads tensors, as train_gpt.py does."""
    from data.fingerprint import check_same_data, check_same_tokenizer

    said = []
    path = checkpoint.find_checkpoint_to_resume(Path(config.output_dir), config.resume, said.append)
    assert all(line and "\n" not in line and len(line) < 3000 for line in said), said
    if path is not None:
        assert find_damage(path) is None
        state = read_state(path)
        now = {"seed": 1337, "sequence_length": 8, "total_batch_size": 32, "shuffle": True}
        check_same_data(state["data"], now | {"shards": [{"name": "x.bin", "tokens": 400, "ends": "00"}]})
        check_same_tokenizer(state.get("tokenizer", {"name": "none"}), {"name": "none"})
        assert all(isinstance(line, str) for line in checkpoint.check_same_model(path, config))
        LossScaler(load_config(["--dtype=float16"], world_size=1)).load_state_dict(state["scaler"])
        steps = SpikeGuard(config)
        steps.load_state_dict(state.get("guard", {}))
        steps.reason_to_skip(1.0, 1.0, False)
        assert state["record"]["elapsed_s"] >= 0 and state["step"] >= 0


@broken("checkpoint manifests", PROMISE)
def test_manifests(place, saved, injected):
    run = shutil.copytree(saved, place / "run")
    config = load_config([*SHAPE, f"--output_dir={run}"], world_size=1)
    folder = run / "checkpoints" / "step_00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to(place.parent / "beside")
    real = manifest["files"]["state.json"]
    linked = {"bytes": 4, "sha256": file_sha256(place.parent / "beside")}
    plausible = [real, linked, {"bytes": 0}, {}, [], 4, None]
    listed = st.dictionaries(st.sampled_from([*NAMES, "state.json", "loop", "out"]), st.sampled_from(plausible))

    @cases
    @given(content=raw | json_value.map(dumped) | changed_json(manifest) | changed_json({**manifest, "files": {}})
           | listed.map(lambda files: dumped({**manifest, "files": {**manifest["files"], **files}})))  # fmt: skip
    @example(dumped({**manifest, "files": {}}))
    def holds(content):
        (folder / "manifest.json").write_bytes(content)
        for path in (run, folder, run / "checkpoints"):
            with refused_in_one_line(run):
                find_checkpoint(path, lambda line: None)
        with refused_in_one_line(run):
            resumed(config)
        for flag in ("init_from", "checkpoint"):
            with refused_in_one_line(f"--{flag}", run):
                open_pretrained(str(run), flag)
        with refused_in_one_line("--"):
            load_config([f"--init_from={run}"], world_size=1, describe=open_pretrained)

    holds()
    assert {p.name for p in place.iterdir()} == {"run"}
    injected(CASES)


def state_of(saved, tmp_path, content):
    """A copy of the checkpoint with this state.json, and a manifest that knows its hash."""
    run = shutil.copytree(saved, tmp_path / "run")
    folder = run / "checkpoints" / "step_00000001"
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": file_sha256(folder / "state.json")}
    (folder / "manifest.json").write_bytes(dumped(with_sha256(manifest)))
    return folder


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", DEEP[2].encode(), b"\xff"])
def test_a_state_that_is_not_an_object_with_the_keys_of_a_resume_is_refused(saved, tmp_path, content):
    folder = state_of(saved, tmp_path, content)
    with pytest.raises(UserError, match="state.json is damaged"):
        read_state(folder)


def test_the_record_of_a_step_may_hold_any_json_value(saved, tmp_path):
    state = json.loads((saved / "checkpoints" / "step_00000001" / "state.json").read_text())
    state["record"] |= {"clipped": True, "lr": None, "layers": [1, {"norm": 0.5}], "note": "x"}
    assert read_state(state_of(saved, tmp_path, dumped(state)))["record"] == state["record"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(saved, tmp_path, name):
    run = shutil.copytree(saved, tmp_path / "run")
    path = run / "checkpoints" / "step_00000001" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="no valid checkpoint is left"):
        find_checkpoint(run, lambda line: None)


@pytest.mark.parametrize("resume", ["x" * 300, "loop", "\n", "/dev/null", "/proc/self/mem"])
def test_resume_from_a_path_that_is_not_a_run_is_refused(tmp_path, saved, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with refused("--resume"):
        checkpoint.find_checkpoint_to_resume(tmp_path / "run", load_config([f"--resume={resume}"], world_size=1).resume)
    with suppress(UserError):  # with checkpoints of its own a run need not look there
        flag = load_config([f"--resume={resume}"], world_size=1).resume
        assert checkpoint.find_checkpoint_to_resume(saved, flag, lambda line: None).parent.parent == saved


# ------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base model in Hugging Face's format, and an adapter of PEFT beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    config = load_config([*SHAPE, "--vocab_pad=1"], world_size=1)
    tensors = [split_for_export(n, torch.zeros(shape), config) for n, shape in parameter_shapes(config).items()]
    save_file({name: t for parts in tensors for name, t in parts.items()}, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps(write_config(config.model_dump())))
    values = {f"h.0.mlp.c_fc.lora_{n}": torch.ones(shape) for n, shape in {"a": (2, 4), "b": (16, 2)}.items()}
    write_adapter(folder / "adapter", config, values | {"wte.weight": torch.ones(VOCAB, 4)}, 4.0, "../base")
    return folder


@broken("adapters in PEFT's format", PROMISE)
def test_adapters(place, adapter, monkeypatch, injected):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    whole = {path.name: path.read_bytes() for path in (adapter / "adapter").iterdir()}
    settings_file, tensors_file = "adapter_config.json", "adapter_model.safetensors"
    size = int.from_bytes(whole[tensors_file][:8], "little")
    header = json.loads(whole[tensors_file][8 : 8 + size])
    shutil.copytree(adapter / "base", place / "base")
    (place / "adapter").mkdir()

    def packed(text):
        return len(text).to_bytes(8, "little") + text + whole[tensors_file][8 + size :]

    @cases
    @given(
        settings=st.just(whole[settings_file]) | raw | changed_json(json.loads(whole[settings_file])),
        tensors=st.just(whole[tensors_file]) | changed(whole[tensors_file]) | changed_json(header).map(packed),
    )
    def holds(settings, tensors):
        (place / "adapter" / settings_file).write_bytes(settings)
        (place / "adapter" / tensors_file).write_bytes(tensors)
        with refused_in_one_line(place):
            pretrained = open_pretrained(f"peft:{place / 'adapter'}")
            read = open_weights(pretrained)
            assert read("h.0.mlp.c_fc.weight").shape == (16, 4)

    holds()
    assert {p.name for p in place.iterdir()} == {"base", "adapter"}
    injected(CASES)


# ------------------------------------------------------------------------------------------------ YAML

FLAGS = sorted(Config.model_fields.keys() - {"cfg", "init_from"})
SCALARS = ["true", "~", "2.0", "1e3", "-1", "9" * 5000, "1:60", "2020-13-45", "0x_", ".nan", "-.inf", "<<", "=", "''"]
SCALARS += [
    '"a b"',
    '"\\ud800"',
    "|\n  x\n  y",
    "no",
    "[1, 2]",
    "{a: 1}",
    "*a",
    "!x y",
    "\t",
    "- 1",
    "? 1",
    "%",
    "@",
    "`",
]
SCALARS += ["!!python/object:os.system x", "!!python/object/apply:os.system [touch hacked]", '"' + "x" * 20_000 + '"']
TAMED = st.sampled_from(SCALARS) | st.text(st.characters(codec="utf-8"), max_size=8) | st.integers().map(str)
UNREADABLE = [
    "[" * 400, "{" * 400, "- " * 400 + "x", "a: " * 50, "? " * 100,
    "'x", "---\na: 1\n---\nb: 2\n", "%YAML 9.9\n---\nx: 1", "!!set {a}", "\0",
]  # fmt: skip


@st.composite
def preset_text(draw):
    if draw(st.integers(0, 4)) == 0:
        return draw(st.text(st.characters(codec="utf-8"), max_size=60))
    keys = st.sampled_from(FLAGS) | st.sampled_from(["n_layers", "true", "1", "~", "<<", "[a]", "x" * 5000])
    return "".join(f"{draw(keys)}: {draw(TAMED)}\n" for _ in range(draw(st.integers(1, 3))))


@broken("YAML presets for --cfg", PROMISE)
def test_presets(place, injected):
    path = place / "preset.yaml"

    @cases
    @given(text=preset_text() | st.sampled_from(UNREADABLE))
    def holds(text):
        path.write_bytes(text.encode("utf-8", "replace"))
        with refused_in_one_line("--"):
            load_config([f"--cfg={path}"], world_size=1)

    holds()
    for number, text in enumerate(UNREADABLE):
        path.write_text(text)
        with refused("preset.yaml"):
            load_config([f"--cfg={path}"], world_size=1)
            pytest.fail(f"number {number} is taken")
    assert [p.name for p in place.iterdir()] == ["preset.yaml"]
    injected(CASES)


@broken("YAML files for --mixture", PROMISE)
def test_mixtures(place, injected):
    path = place / "mixture.yaml"
    keys = ["tokens", "sources", "a", "../b", "input", "weight", "text_key", "fim_rate", "fim_spm_rate", "x"]
    lines = st.tuples(st.integers(0, 3), st.sampled_from(keys), TAMED | st.just("")).map(
        lambda line: f"{'  ' * line[0]}{line[1]}: {line[2]}\n"
    )
    sources = st.lists(lines, max_size=4).map("".join)

    @cases
    @given(
        text=sources
        | sources.map("tokens: 5\nsources:\n  a: {input: x, weight: 1}\n".__add__)
        | st.sampled_from(UNREADABLE)
    )
    def holds(text):
        path.write_bytes(text.encode("utf-8", "replace"))
        with refused_in_one_line("--mixture"):
            mixture = read_mixture(path)
            assert all(Path(name).name == name for name in mixture.sources)

    holds()
    injected(CASES)


def test_a_pipe_is_not_a_preset(tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="--cfg="):
        load_config([f"--cfg={tmp_path / 'x.yaml'}"], world_size=1)
    with pytest.raises(UserError, match="--mixture="):
        read_mixture(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["n_layer", "seed", "learning_rate", "weight_decay", "dropout", "max_minutes"])
def test_2_0_is_accepted_for_2_but_true_is_not_a_number(tmp_path, name):
    """2.0 is 2, as programs write it; `true` for a count or a rate is a mistake, not 1."""
    path = tmp_path / "preset.yaml"
    for word in ("true", "false", "yes", "off"):
        path.write_text(f"{name}: {word}\n")
        with pytest.raises(UserError, match=f"--{name}=.*number"):
            load_config([f"--cfg={path}"], world_size=1)
    path.write_text("n_layer: 2.0\n")
    assert (
        load_config([f"--cfg={path}"], world_size=1).n_layer
        == load_config(["--n_layer=2.0"], world_size=1).n_layer
        == 2
    )


# ------------------------------------------------------------------------------------------------ flags

WORDS = [
    *map(str, NUMBERS),
    *NAMES,
    "nan",
    "-inf",
    "1e400",
    "2.0",
    "1_000",
    "0x10",
    "٣",
    "true",
    "None",
    "[]",
    "a=1:b",
    "hf:",
]
WORDS += [
    "a=nan:b",
    "a=1:b,a=2:c",
    "a=1e308:b,c=1e308:d",
    "linear:nan",
    "linear:1e-320",
    "llama3:1,2,3",
    "llama3:8,1,4,8192",
]
WORDS += [
    "hf:../x",
    "hf:x@..",
    "nanogpt:/etc/passwd",
    "llmc:/dev/null",
    "llama2c:/proc/self/mem",
    "none",
    "gpt2",
    "a\nb",
]
MODEL = st.sampled_from([1, 3, 2**16, 10**12, 2**70]).map(str)


@st.composite
def arguments(draw):
    names = st.sampled_from([*FLAGS, "init_from", "cfg"])
    one = st.sampled_from(["n_head", "n_kv_head", "n_embd", "head_dim", "batch_size", "total_batch_size", "replicas"])
    flags = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.integers(0, 7))
        if kind == 0:
            flags.append(draw(st.text(max_size=12) | st.sampled_from(WORDS + ["--", "-x", "--=", "--n_layer", "---"])))
        elif kind < 3:
            flags.append(f"--{draw(one)}={draw(MODEL)}")
        else:
            value = draw(st.sampled_from(WORDS) | st.text(max_size=6))
            flags += [f"--{draw(names)}={value}"] if kind < 6 else [f"--{draw(names)}", value]
    return [flag for flag in flags if flag not in ("-h",) and not "--help".startswith(flag[:6] or "x")]


@broken("flags: odd values, unknown names, stray words", PROMISE)
def test_flags(place, monkeypatch, injected):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    @cases
    @given(argv=arguments())
    @example(["--n_head=1000000000000", "--n_kv_head=7", "--head_dim=64"])
    @example(["--n_layer=" + "9" * 100_000])
    @example(["--n_embd", "\ud800"])
    @example(["--" + "x" * 100_000])
    def holds(argv):
        with refused_in_one_line("--", "unknown argument", "-", "/"):  # the flag, or the file that it names
            config = load_config(argv, world_size=1, describe=open_pretrained)
            assert isinstance(config, Config) and 1 <= config.n_head <= 2**16

    holds()
    assert not list(place.iterdir())
    injected(CASES)


# ------------------------------------------------------------------------------------------------ jsonl

ROWS = [
    {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 1, "activity_label": "", "ctx_a": "", "ctx_b": ""},
    {"text": "one two three", "context": "a", "continuation": "b"},
    {"step": 1, "tokens": 32, **RECORD},
]


@st.composite
def jsonl(draw):
    lines = [dumped(row) for row in draw(st.lists(st.sampled_from(ROWS), max_size=3))]
    for _ in range(draw(st.integers(1, 2))):
        row = draw(st.sampled_from(ROWS))
        line = draw(raw | json_value.map(dumped) | changed_json(row) | changed(dumped(row)))
        lines.insert(draw(st.integers(0, len(lines))), line)
    return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines)


def of_source(path, skip_bad):
    from collections import Counter

    options = ReadOptions(skip_bad=skip_bad)
    for unit in plan(input_files([str(path)]), options):
        for document in documents(unit, options, Counter()):
            "".join(document.text).encode()


READERS = {
    "HellaSwag": lambda path: list(read_hellaswag(path, with_parts=True)),
    "LAMBADA": read_lambada,
    "data/text.py": lambda path: of_source(path, False),
    "data/text.py --skip_bad": lambda path: of_source(path, True),
}


@broken(".jsonl files for HellaSwag, LAMBADA and data/text.py", PROMISE)
def test_jsonl(place, injected):
    path = place / "x.jsonl"

    @cases
    @given(content=jsonl())
    def holds(content):
        path.write_bytes(content)
        for read in READERS.values():
            with refused_in_one_line("x.jsonl"):
                read(path)

    holds()
    assert [p.name for p in place.iterdir()] == ["x.jsonl"]
    injected(CASES)


@broken("metrics.jsonl of a resumed run", PROMISE)
def test_metrics(place, monkeypatch, injected):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a thousand times, of what no power cut is to spare
    (place / "logs").mkdir()
    path, config = place / "metrics.jsonl", load_config([f"--output_dir={place}"], world_size=1)

    @cases
    @given(content=jsonl(), step=st.integers(0, 3))
    def holds(content, step):
        path.write_bytes(content)
        for record in read_records(path):
            assert type(record["step"]) is int and isinstance(record["loss"], int | float | None)
        metrics = Metrics(config, Ranks(0, 0, 1, torch.device("cpu")))
        metrics.start(step)
        metrics.close()
        metrics.has(step)
        again = [json.loads(line) for line in path.read_text().splitlines()]
        assert again == read_records(path) and all(record["step"] <= step for record in again)
        assert len({record["step"] for record in again}) == len(again)

    holds()
    assert {p.name for p in place.iterdir()} == {"logs", "metrics.jsonl"}
    injected(CASES)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "-x", "a b"])
def test_the_configuration_of_a_data_set_is_a_name(monkeypatch, tmp_path, name):
    monkeypatch.setattr(sys, "argv", ["fineweb_edu.py", f"--name={name}", f"--output_dir={tmp_path}/out"])
    with pytest.raises(UserError, match="--name="):
        fineweb_edu.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address", ["nope://x/y.parquet", "://", "file:///etc/passwd", "https://x.y/z.jsonl", "shell://x.parquet"]
)
def test_an_address_without_a_reader_is_refused_at_once(address):
    with refused(address):
        input_files([address])


# ------------------------------------------------------------------------------------------------ the source

ROOMS = ("util", "cfg", "model", "data", "train", "eval", "scripts")
SOURCES = sorted([ROOT / "train_gpt.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
FORBIDDEN = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
YAML = {"safe_load", "safe_dump", "YAMLError", "SafeLoader", "MappingNode", "ScalarNode"}


def runs_what_it_reads(tree):
    """What in a module turns a file or a text into code or objects of any kind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            named = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            yield from (name for name in names if name.split(".")[0] in FORBIDDEN)
            yield from (f"yaml.{name}" for name in named if names == ["yaml"] and name not in YAML)
            yield from (f"torch.{name}" for name in named if names == ["torch"] and name == "load")
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml" and node.attr not in YAML:
            yield ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield called
        if called == "torch.load" and options.get("weights_only") != "True":
            yield ast.unparse(node)
        if options.get("allow_pickle", "False") != "False" or options.get("trust_remote_code", "False") != "False":
            yield ast.unparse(node)
        if options.get("shell", "False") != "False":
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_file_that_is_read_is_executed(path):
    assert list(runs_what_it_reads(ast.parse(path.read_text()))) == []


def test_the_walk_finds_what_it_looks_for():
    bad = "import pickle\nfrom torch import load\nimport yaml\nyaml.load(f)\nyaml.full_load(f)\n"
    bad += "from yaml import unsafe_load\n"
    bad += "torch.load(f)\ntorch.load(f, weights_only=False)\nnp.load(f, allow_pickle=True)\neval('1')\nexec(x)\n"
    assert len(list(runs_what_it_reads(ast.parse(bad)))) == 10
    good = "import yaml, torch\nyaml.safe_load(f)\ntorch.load(f, weights_only=True)\nmodel.eval()\nnp.load(f)\n"
    assert list(runs_what_it_reads(ast.parse(good))) == []


# ------------------------------------------------------------------------------------------------ the real command


@broken("a deeply nested manifest, given to the command", "exit code 5, one line, no traceback")
def test_the_command(place, saved, injected):
    run = shutil.copytree(saved, place / "run")
    (run / "checkpoints/step_00000001/manifest.json").write_text("[" * 100_000)
    write_shard(place / "x.bin", TOKENS, VOCAB)
    flags = [f"--output_dir={run}", "--device=cpu", *SHAPE, "--batch_size=4", "--tokenizer=none"]
    command = [sys.executable, str(ROOT / "train_gpt.py"), *flags, f"--input_train_bin={place}/x.bin"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
    assert done.stderr.startswith("error: ") and "no valid checkpoint is left" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    injected(1)
