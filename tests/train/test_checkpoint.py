"""The checkpoint protocol: whole or absent, whatever fails on the way; and the optimizer by name."""

import json
import math
import random
import re
import threading
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfg.config import ModelConfig, load_config
from model.formats import checkpoint as weights
from model.formats.checkpoint import (
    MANIFEST,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    read_manifest,
    read_state,
    with_sha256,
)
from model.formats.pretrained import load_model
from model.gpt import GPT, init_weights
from train import checkpoint_writer
from train.checkpoint import check_same_model, clean_up_partial, find_checkpoint_to_resume, load_checkpoint
from train.checkpoint_writer import CheckpointWriter
from train.optim import make_optimizer, make_states, named_states
from train.stability import SpikeGuard
from util import files
from util.errors import StorageError, UserError
from util.files import file_sha256
from util.ranks import Ranks

RANKS = Ranks(0, 0, 1, torch.device("cpu"))
FLAGS = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=50", "--sequence_length=8"]


def setup(tmp_path, *flags):
    config = load_config([*FLAGS, f"--output_dir={tmp_path}", *flags], world_size=1)
    model = GPT(config)
    init_weights(model, 0)
    return config, model, make_optimizer(model, config, 1)


def step(model, optimizer, seed=0):
    x = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))
    loss, count = model(x[:, :-1], x[:, 1:])
    (loss / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(config, number, model, optimizer):
    CheckpointWriter(config, RANKS).save(number, model, optimizer, state_of(number))


def state_of(number):
    return {"record": {"loss": 1.0, "elapsed_s": 1.0, "step": number}, "data": {}, "scaler": {}, "wandb_id": None}


def test_a_saved_run_is_restored_exactly_and_continues_equally(tmp_path):
    config, model, optimizer = setup(tmp_path)
    for k in range(3):
        step(model, optimizer, k)
    save(config, 3, model, optimizer)
    _, other, other_optimizer = setup(tmp_path)
    path = list_checkpoints(tmp_path)[0]
    load_checkpoint(path, other, other_optimizer)
    assert read_state(path) == {"step": 3, **state_of(3)}
    assert [step(model, optimizer, k) for k in range(3, 6)] == [step(other, other_optimizer, k) for k in range(3, 6)]


@pytest.mark.parametrize("layers", [1, 3])
def test_a_checkpoint_with_more_or_fewer_layers_is_refused(tmp_path, layers):
    config, model, optimizer = setup(tmp_path, "--n_layer=2")
    step(model, optimizer)
    save(config, 1, model, optimizer)
    _, other, other_optimizer = setup(tmp_path, f"--n_layer={layers}")
    with pytest.raises(UserError, match=r"h\.[12]\.\S+ is only in one of the two"):
        load_checkpoint(list_checkpoints(tmp_path)[0], other, other_optimizer)


def test_the_state_of_a_skipped_step_can_be_read(tmp_path):
    config, model, optimizer = setup(tmp_path)
    state = state_of(3) | {"guard": SpikeGuard(config).state_dict()}
    state["record"] |= {"skipped": "loss or gradient not finite", "loss": math.nan}
    CheckpointWriter(config, RANKS).save(3, model, optimizer, state)
    assert read_state(list_checkpoints(tmp_path)[0])["record"]["skipped"] == "loss or gradient not finite"


@pytest.mark.filterwarnings("ignore:Pydantic")
@pytest.mark.parametrize("flag", ModelConfig.model_fields)
def test_a_checkpoint_of_another_model_is_refused_by_the_flag(two, flag):
    config = setup(two)[0]
    other = config.model_copy(update={flag: "another"})
    if flag in ("dropout", "flash", "zero_init", "embedding_std", "head_init"):  # these leave the weights as they are
        assert check_same_model(find_checkpoint(two), other) == [f"{flag}: {getattr(config, flag)} → another"]
    else:
        with pytest.raises(UserError, match=f"of another model: --{flag}=another"):
            check_same_model(find_checkpoint(two), other)


def test_a_checkpoint_from_before_a_model_flag_was_added_loads(two):
    path, (config, model, optimizer) = find_checkpoint(two), setup(two)
    manifest = read_manifest(path)
    for flag in ("norm_weight", "embedding_norm", "embedding_std", "head_init"):
        del manifest["config"][flag]
    (path / MANIFEST).write_text(json.dumps(with_sha256(manifest)))
    assert find_checkpoint(two) == path and check_same_model(path, config) == []
    load_checkpoint(path, model, optimizer)
    old, _, _ = load_model(path, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), model.parameters(), strict=True))
    with pytest.raises(UserError, match="another model: h.0.ln_1.bias is only in one"):
        load_checkpoint(path, *setup(two, "--norm_weight=0")[1:])


def test_the_checkpoints_of_a_run_win_over_the_one_it_began_from(tmp_path):
    for folder in ("first", "branch"):
        config, model, optimizer = setup(tmp_path / folder)
        save(config, 1, model, optimizer)
    [first], [branch] = (list_checkpoints(tmp_path / folder) for folder in ("first", "branch"))
    assert find_checkpoint_to_resume(tmp_path / "branch", str(first)) == branch
    assert find_checkpoint_to_resume(tmp_path / "new", str(first)) == first


def test_optimizer_state_is_keyed_by_parameter_name():
    config, model, optimizer = setup("unused")
    step(model, optimizer)
    tensors = named_states(optimizer, model)
    names = {name for name, _ in model.named_parameters()}
    assert {key.rsplit("/", 1)[0] for key in tensors} == names
    assert {key.rsplit("/", 1)[1] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(tensors[f"{name}/step"] == 1 for name in names)
    assert not any(t.any() for t in make_states(optimizer, model).values())


def test_weight_decay_is_for_matrices_only():
    _, model, optimizer = setup("unused")
    decayed, plain = optimizer.param_groups
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in plain["params"]) and plain["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_whole_checkpoint_is_not_written_again(tmp_path):
    config, model, optimizer = setup(tmp_path)
    step(model, optimizer)
    save(config, 1, model, optimizer)
    before = (
        (tmp_path / "checkpoints/step_00000001/model/shard-00001-model-00001-of-00001.safetensors").stat().st_mtime_ns
    )
    save(config, 1, model, optimizer)
    assert (
        tmp_path / "checkpoints/step_00000001/model/shard-00001-model-00001-of-00001.safetensors"
    ).stat().st_mtime_ns == before


def test_a_checkpoint_of_other_data_is_moved_aside(tmp_path):
    config, model, optimizer = setup(tmp_path)
    for passed_over in (0, 6, 6):
        state = state_of(1) | {"guard": {"norms": [1 / 3], "passed_over": passed_over}}
        CheckpointWriter(config, RANKS).save(1, model, optimizer, state)
    folder = tmp_path / "checkpoints"
    assert read_state(folder / "step_00000001")["guard"]["passed_over"] == 6
    assert [p.name for p in folder.glob("damaged*")] == ["damaged_step_00000001.1"]


def test_pruning_keeps_the_last_and_every_mth(tmp_path):
    config, model, optimizer = setup(tmp_path, "--keep_last=2", "--keep_every=4")
    step(model, optimizer)
    for k in range(1, 11):
        save(config, k, model, optimizer)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step_{k:08d}" for k in (10, 9, 8, 4)]


def test_a_manifest_cannot_point_outside(tmp_path):
    config, model, optimizer = setup(tmp_path)
    step(model, optimizer)
    save(config, 1, model, optimizer)
    path = tmp_path / "checkpoints/step_00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(with_sha256(manifest)))
    assert "missing" in find_damage(path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "files": {"a": 1}}']
)
def test_any_manifest_is_judged_without_a_traceback(tmp_path, content):
    path = tmp_path / "step_00000001"
    path.mkdir()
    (path / "manifest.json").write_text(content)
    assert find_damage(path)


def test_the_model_alone_can_be_loaded(tmp_path):
    config, model, optimizer = setup(tmp_path)
    step(model, optimizer)
    save(config, 1, model, optimizer)
    loaded, flags, _ = load_model(tmp_path, torch.device("cpu"))
    x = torch.randint(50, (1, 8))
    assert torch.equal(loaded(x), model.eval()(x)) and not loaded.training
    assert flags["n_embd"] == 16
    with pytest.raises(UserError, match="no such checkpoint"):
        load_model(tmp_path / "nowhere", torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no checkpoint"):
        load_model(tmp_path / "empty", torch.device("cpu"))


def test_pruning_never_counts_a_damaged_newer_checkpoint(tmp_path):
    """Going on from step 6 after step 12 was damaged must not leave the damaged one as the only one."""
    config, model, optimizer = setup(tmp_path, "--keep_last=1", "--keep_every=6")
    step(model, optimizer)
    for k in (6, 12):
        save(config, k, model, optimizer)
    (tmp_path / "checkpoints/step_00000012/model/shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    save(config, 7, model, optimizer)
    assert find_checkpoint(tmp_path).name == "step_00000007"


def test_an_optimizer_that_never_stepped_is_saved_and_loaded(tmp_path):
    config, model, optimizer = setup(tmp_path)
    save(config, 1, model, optimizer)
    _, other, other_optimizer = setup(tmp_path)
    load_checkpoint(list_checkpoints(tmp_path)[0], other, other_optimizer)
    step(other, other_optimizer)  # going back to before the first step forgets the moments
    load_checkpoint(list_checkpoints(tmp_path)[0], other, other_optimizer)
    assert [step(model, optimizer, k) for k in range(2)] == [step(other, other_optimizer, k) for k in range(2)]


def test_an_error_in_the_background_is_raised_by_the_next_save_or_wait(tmp_path, monkeypatch):
    config, model, optimizer = setup(tmp_path, "--async_save=1")
    step(model, optimizer)
    saver = CheckpointWriter(config, RANKS)
    saver.save(1, model, optimizer, {})
    saver.wait()
    assert not saver.failed()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.dcp, "save", full)
        saver.save(2, model, optimizer, {})  # raises nothing yet
        while not saver.failed():
            time.sleep(0.01)
    with pytest.raises(UserError, match="step 2 could not be written .No space left"):
        saver.save(3, model, optimizer, {})
    assert not saver.failed()  # it has been raised
    saver.save(4, model, optimizer, {})
    saver.close()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000001"]


def test_saves_in_the_background_never_overlap_and_each_holds_its_step(tmp_path, monkeypatch):
    config, model, optimizer = setup(tmp_path, "--async_save=1")
    saver = CheckpointWriter(config, RANKS)
    running, together, weights = [], [], {}
    write, go_on = saver._write, threading.Event()

    def held_back(number, *args):
        running.append(number)
        together.append(len(running))
        assert go_on.wait(60)
        write(number, *args)
        running.remove(number)

    monkeypatch.setattr(saver, "_write", held_back)
    for number in (1, 2, 3):
        step(model, optimizer, number)
        weights[number] = model.wte.weight.detach().clone()
        saver.save(number, model, optimizer, {})
        if number == 1:  # it has come back though nothing is written; the next must wait for it
            assert not list_checkpoints(tmp_path)
            threading.Timer(0.2, go_on.set).start()
    saver.close()
    assert together == [1, 1, 1]
    for path in list_checkpoints(tmp_path):
        loaded, *_ = load_model(path, torch.device("cpu"))
        assert torch.equal(loaded.wte.weight, weights[int(path.name[-1])])


def test_a_checkpoint_with_a_missing_part_or_a_stray_file_is_refused(tmp_path):
    config, model, optimizer = setup(tmp_path)
    save(config, 1, model, optimizer)
    path = list_checkpoints(tmp_path)[0]
    save_file({"wte.weight": torch.zeros(3, 16)}, path / "model/stray.safetensors")
    assert "model/stray.safetensors does not belong to it" in find_damage(path)
    (path / "model/stray.safetensors").unlink()
    file = next(path.glob("model/*"))
    tensors = load_file(file)
    tensors["wte.weight"] = tensors["wte.weight"][1:].clone()  # the first row is gone
    about = {name: {"saved_offsets": [0] * t.dim()} for name, t in tensors.items()}
    about["wte.weight"]["saved_offsets"] = [1, 0]
    save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(about)})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][f"model/{file.name}"] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (path / "manifest.json").write_text(json.dumps(with_sha256(manifest)))
    assert find_damage(path) is None  # so say the hashes
    with pytest.raises(UserError, match="parts of wte.weight are missing"):
        load_checkpoint(path, model, optimizer)
    del manifest["config"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "is not of format" in find_damage(path)


@pytest.fixture
def two(tmp_path):
    """A run with the checkpoints of steps 1 and 2."""
    config, model, optimizer = setup(tmp_path)
    for k in (1, 2):
        step(model, optimizer, k)
        CheckpointWriter(config, RANKS).save(k, model, optimizer, state_of(k), {"tokenizer.json": b"{}"})
    return tmp_path


@pytest.mark.fault(
    "a flipped byte in any file of a checkpoint, and at any place of the manifest; a truncated or missing file",
    "the checkpoint is skipped with a line that names the file; the one before is used",
)
def test_damage_to_any_file_is_found(two, injected):
    newest, older = list_checkpoints(two)
    files = [p for p in sorted(newest.rglob("*")) if p.is_file()]
    assert {p.name for p in files} >= {"state.json", "manifest.json", "tokenizer.json"} and len(files) == 5
    places = random.Random(0)
    done = 0
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        for content in (bytes(flipped), whole[:-1], whole[: len(whole) // 2], b"", None):
            path.unlink() if content is None else path.write_bytes(content)
            said = []
            # The last byte of the manifest is a newline, and the space between its parts means nothing either.
            harmless = path.name == MANIFEST and content and json.loads(whole) == loaded(content)
            assert find_checkpoint(two, said.append) == (newest if harmless else older)
            assert harmless or (path.name in said[0] and len(said) == 1)
            done += 1
            path.write_bytes(whole)
    assert find_checkpoint(two) == newest
    injected(done + flip_all(newest / MANIFEST))


@pytest.mark.parametrize("folder, found", [("model", True), ("optimizer", False)])
def test_evaluation_hashes_the_model_and_only_looks_for_the_optimizer(two, folder, found):
    file = next(list_checkpoints(two)[0].glob(f"{folder}/*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert bool(find_damage(list_checkpoints(two)[0], skip="optimizer")) == found


def loaded(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def flip_all(path):
    """Every fourth byte in turn. What passes says the same of the flags and the files."""
    whole = path.read_bytes()
    before = json.loads(whole)
    passed = []
    for i in range(0, len(whole), 4):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with suppress(StorageError):
            passed.append(read_manifest(path.parent))
    path.write_bytes(whole)
    assert all({k: v for k, v in m.items() if k in before and k != "sha256"}.items() <= before.items() for m in passed)
    assert all(m["config"] == before["config"] and m["files"] == before["files"] for m in passed)
    return -(-len(whole) // 4)


@pytest.mark.fault(
    "checkpoints cannot be listed, opened or read at a resume",
    "reported and skipped, or the run ends; it never starts from scratch",
)
@pytest.mark.parametrize("point,times", [("read hash", 1), ("read hash", 5), ("read manifest", 1), ("read list", 1)])
def test_an_unreadable_checkpoint_is_skipped_or_ends_the_run(two, monkeypatch, injected, point, times):
    newest, older = list_checkpoints(two)
    order(monkeypatch, f"{point}#{times}=EIO")
    said = []
    if point == "read list":
        with pytest.raises(OSError, match="Input/output error"):
            find_checkpoint(two, said.append)
    else:
        expected = newest if times > 4 else older  # a checkpoint has four files beside its manifest
        assert find_checkpoint(two, said.append) == expected
        assert [("Input/output error" in line) for line in said] == [True] * (expected == older)
    injected(1)


def order(monkeypatch, fault):
    monkeypatch.setattr(files, "_fault", files._FAULT.fullmatch(fault))
    monkeypatch.setattr(files, "_times_passed", 0)


def test_dangling_links_to_checkpoints_do_not_start_a_new_run(two):
    for path in list_checkpoints(two):
        path.rename(two / path.name)
        path.symlink_to(two / "gone" / path.name)
    with pytest.raises(StorageError, match="no valid checkpoint is left .newest: manifest.json: No such file"):
        find_checkpoint(two, lambda line: None)
    for path in list_checkpoints(two):
        path.unlink()
        path.symlink_to(two / path.name)
    assert find_checkpoint(two).name == "step_00000002"


@pytest.mark.parametrize("point", ["save latest", "prune rename", "prune delete"])
def test_an_error_after_the_rename_is_a_warning(tmp_path, monkeypatch, capsys, point):
    config, model, optimizer = setup(tmp_path, "--keep_last=1")
    save(config, 1, model, optimizer)
    order(monkeypatch, f"{point}=ENOSPC")
    save(config, 2, model, optimizer)
    assert re.fullmatch(r"warning: .*step 2 is written, but .+: No space left on device\n", capsys.readouterr().err)
    assert find_checkpoint(tmp_path).name == "step_00000002"


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints/.saving_00000002/model").mkdir(parents=True)

    def refuse(path, *args, **kwargs):
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.shutil, "rmtree", refuse)
        clean_up_partial(tmp_path)
    assert ".saving_00000002 could not be deleted: Directory not empty" in capsys.readouterr().err
    clean_up_partial(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_checkpoint_of_a_skipped_step_can_be_resumed(tmp_path):
    config, model, optimizer = setup(tmp_path)
    guard = SpikeGuard(config)
    reason = guard.reason_to_skip(math.nan, math.inf, overflow_expected=False)
    state = state_of(1)
    state["record"] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": reason}
    CheckpointWriter(config, RANKS).save(1, model, optimizer, {**state, "guard": guard.state_dict()})
    found = read_state(find_checkpoint(tmp_path))
    assert found["record"]["skipped"] == reason and math.isnan(found["record"]["loss"])
    assert found["guard"] == guard.state_dict()


@pytest.mark.parametrize("fault", ["read tensors=EIO", "read tensors#2=EIO", "read state=ESTALE", "read manifest=EIO"])
def test_a_checkpoint_that_cannot_be_loaded_is_named(two, monkeypatch, fault):
    config, model, optimizer = setup(two)
    path = find_checkpoint(two)
    order(monkeypatch, fault)
    with pytest.raises(StorageError, match=re.escape(str(path))):
        read_state(path)
        check_same_model(path, config)
        load_checkpoint(path, model, optimizer)


def test_a_bug_in_loading_is_not_a_storage_error(two, monkeypatch):
    config, model, optimizer = setup(two)

    def broken(*args):
        raise KeyError("x")

    monkeypatch.setattr(weights._Reader, "read_data", broken)
    with pytest.raises(RuntimeError, match="could not be loaded"):
        load_checkpoint(find_checkpoint(two), model, optimizer)


def test_a_checkpoint_that_vanishes_while_it_is_loaded_is_named(two):
    config, model, optimizer = setup(two)
    path = find_checkpoint(two)
    next(path.glob("optimizer/*")).unlink()
    (path / "model").rename(two / "model")
    with pytest.raises(StorageError, match="cannot be read .No such file"):
        load_checkpoint(path, model, optimizer)
