"""A run does not resume on other data, and shards are not read with another tokenizer."""

import json

import numpy as np
import pytest

from data.fingerprint import check_same_data, check_shards_tokenizer
from data.loader import Loader
from data.shards import open_shard, write_shard
from util.errors import UserError

VOCAB = 60_000


def saved_and_now(folder, change=lambda folder: None, **options):
    """Returns the fingerprint in a checkpoint, and the fingerprint of the folder after a change."""
    base = {"T": 8, "batch": 4, "seed": 1, "shuffle": True}
    start = 0
    for i, size in enumerate((300, 20_000, 400)):
        write_shard(folder / f"x_train_{i:06d}.bin", np.arange(start, start + size) % VOCAB, VOCAB)
        start += size

    def now(**options):
        shards = [open_shard(path, VOCAB) for path in sorted(folder.glob("*.bin"))]
        o = base | options
        return Loader(shards, o["T"], o["batch"], o["seed"], o["shuffle"], "input_train_bin").fingerprint

    saved = json.loads(json.dumps(now()))  # as in a checkpoint
    change(folder)
    return saved, now(**options)


def test_unchanged_data_is_accepted(tmp_path):
    check_same_data(*saved_and_now(tmp_path))


def test_data_that_was_only_moved_is_accepted(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    check_same_data(saved_and_now(tmp_path / "here")[0], saved_and_now(tmp_path / "there")[1])


@pytest.mark.parametrize(
    "flag, options",
    [
        ("--seed=2,", {"seed": 2}),
        ("--sequence_length=4,", {"T": 4, "batch": 8}),
        ("--total_batch_size=64,", {"batch": 8}),
        ("--shuffle=", {"shuffle": False}),
    ],
)
def test_a_flag_that_decides_the_order_may_not_change(tmp_path, flag, options):
    with pytest.raises(UserError) as caught:
        check_same_data(*saved_and_now(tmp_path, **options))
    assert str(caught.value).startswith(flag) and "--output_dir" in str(caught.value)


def rewrite(number, tokens):
    return lambda folder: write_shard(folder / f"x_train_{number:06d}.bin", np.array(tokens), VOCAB)


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda folder: (folder / "x_train_000001.bin").rename(folder / "x_train_000001b.bin"), "x_train_000001.bin"),
        (lambda folder: (folder / "x_train_000000.bin").unlink(), "x_train_000000.bin"),
        (lambda folder: (folder / "x_train_000002.bin").unlink(), "x_train_000002.bin"),
        (rewrite(3, range(50)), "x_train_000003.bin"),
        (rewrite(1, range(7)), "x_train_000001.bin"),  # another length
        (rewrite(0, [9, *range(1, 300)]), "x_train_000000.bin"),  # another first token
        (rewrite(1, [*range(300, 20_299), 7]), "x_train_000001.bin"),  # another last token
    ],
    ids=["renamed", "first missing", "last missing", "added", "shorter", "other start", "other end"],
)
def test_changed_shards_are_refused_by_name(tmp_path, change, name):
    with pytest.raises(UserError) as caught:
        check_same_data(*saved_and_now(tmp_path, change))
    assert str(caught.value).startswith("--input_train_bin: ") and name in str(caught.value)


@pytest.mark.parametrize(
    "manifest, refused",
    [
        ({"tokenizer": "gpt2"}, False),
        ({"tokenizer": {"name": "gpt2", "vocab_size": 50257, "sha256": "x"}}, False),
        ({"tokenizer": "gpt2-fim"}, True),
        ({"tokenizer": {"name": "mine", "vocab_size": 300, "sha256": "x"}}, True),
        ({"tokenizer": "meta-llama/Llama-3"}, False),  # not written by rawgpt
        ({"tokenizer": {"name": 3, "sha256": "x"}}, False),
        ({"tokenizer": ["gpt2"]}, False),
        ({}, False),
        ([], False),
        ("{damaged", False),
        (b"\xff\xfe\x00", False),
        ("[" * 100_000, False),
        (None, False),
    ],
)
def test_a_manifest_must_name_the_tokenizer_of_the_run(tmp_path, manifest, refused):
    file = tmp_path / "manifest.json"
    if isinstance(manifest, bytes):
        file.write_bytes(manifest)
    elif manifest is not None:
        file.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    paths = [tmp_path / "a_train_000001.bin", tmp_path / "a_train_000002.bin"]
    if not refused:
        return check_shards_tokenizer(paths, {"name": "gpt2"}, 50257, "input_train_bin")
    with pytest.raises(UserError, match=r"--input_train_bin: .* tokenizer (mine|gpt2-fim), but --tokenizer=gpt2; give"):
        check_shards_tokenizer(paths, {"name": "gpt2"}, 50257, "input_train_bin")


def test_a_tokenizer_file_that_changed_after_the_shards_were_made_is_an_error(tmp_path):
    made = {"tokenizer": {"name": "mine", "vocab_size": 300, "sha256": "x"}}
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    check_shards_tokenizer([tmp_path / "a.bin"], {"name": "moved", "sha256": "x"}, 300, "input_val_bin")
    with pytest.raises(UserError, match="whose files have changed"):
        check_shards_tokenizer([tmp_path / "a.bin"], {"name": "mine", "sha256": "y"}, 300, "input_val_bin")


@pytest.mark.parametrize("name", ["none", "mine"])
def test_shards_of_a_tokenizer_that_does_not_fit_the_model_are_refused(tmp_path, name):
    (tmp_path / "manifest.json").write_text(
        json.dumps({"tokenizer": {"name": "mine", "vocab_size": 300, "sha256": "x"}})
    )
    for vocab_size in (300, 320):
        check_shards_tokenizer([tmp_path / "a.bin"], {"name": name}, vocab_size, "input_train_bin")
    for vocab_size in (299, 128_256):
        with pytest.raises(UserError, match=f"--input_train_bin: .* has 300 ids, .* --vocab_size={vocab_size};"):
            check_shards_tokenizer([tmp_path / "a.bin"], {"name": name}, vocab_size, "input_train_bin")
