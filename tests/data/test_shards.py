"""Token shards: written tokens are read back, and an error names the file."""

import os
import struct
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import shards
from data.shards import ShardWriter, find_shards, open_shard, write_shard
from util.errors import UserError

GPT2, LLAMA = (20240520, 1, "H"), (20240801, 7, "I")
VOCAB = 50257
few = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder shared by the examples of a property."""
    return tmp_path_factory.mktemp("shards")


def layout(tokens, magic=20240520, version=1, letter="H", count=None):
    """Returns the bytes of a shard, written independently of the code."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    return header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}{letter}", *tokens)


def put(path, content):
    path.write_bytes(content)
    return path


def refusal(path, vocab_size=VOCAB, **options):
    with pytest.raises(UserError) as caught:
        open_shard(path, vocab_size, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def no_match(pattern):
    with pytest.raises(UserError) as caught:
        find_shards(str(pattern), "input_train_bin")
    message = str(caught.value)
    assert message.startswith(f"--input_train_bin={pattern} matches no file: ")
    return message


# Layout


@few
@given(data=st.data(), vocab=st.sampled_from([2, 251, 50257, 2**16, 2**16 + 1, 128256, 2**31]))
def test_tokens_survive_writing_and_reading(folder, data, vocab):
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), max_size=200))
    path = folder / "x_train_000001.bin"
    write_shard(path, np.array(tokens, np.int64), vocab)
    assert path.read_bytes() == layout(tokens, *(GPT2 if vocab <= 2**16 else LLAMA))
    shard = open_shard(path, vocab, check_all=True)
    assert shard.count == len(tokens)
    assert shard.read(0, shard.count).tolist() == tokens
    start = data.draw(st.integers(0, len(tokens)))
    length = data.draw(st.integers(0, len(tokens) - start))
    assert shard.read(start, length).tolist() == tokens[start : start + length]


def test_a_shard_of_gpt2_byte_by_byte(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 258, 50256]), VOCAB)
    content = (tmp_path / "a.bin").read_bytes()
    assert content[:12] == bytes([0x88, 0xD8, 0x34, 0x01, 1, 0, 0, 0, 3, 0, 0, 0])
    assert content[12:1024] == bytes(1012)
    assert content[1024:] == bytes([1, 0, 2, 1, 0x50, 0xC4])


def test_a_shard_of_a_larger_vocabulary_byte_by_byte(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1, 128255]), 128256)
    content = (tmp_path / "a.bin").read_bytes()
    assert content[:12] == bytes([0xA1, 0xD9, 0x34, 0x01, 7, 0, 0, 0, 2, 0, 0, 0])
    assert content[1024:] == bytes([1, 0, 0, 0, 0xFF, 0xF4, 1, 0])


# Appending


def sizes_of(first, size):
    """Returns a layout in which the first shard has another size."""
    return (("x_val_000000.bin", first) if i == 0 else (f"x_train_{i:06d}.bin", size) for i in count())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@few
@given(
    pieces=st.lists(st.integers(0, 25), max_size=12),
    stops=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 30)), max_size=4),
    first=st.integers(1, 20),
    size=st.integers(1, 10),
    vocab=st.sampled_from([300, 70000]),
)
@example(pieces=[10, 10], stops=[(1, 0)], first=10, size=10, vocab=300)  # stopped at the end of a shard
def test_a_writer_can_be_resumed_anywhere(tmp_path_factory, pieces, stops, first, size, vocab):
    """After each flush the writer adds `extra` tokens, which are lost, and another writer resumes."""
    folder, whole = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("whole")
    tokens = np.arange(sum(pieces) + 30) * 7 % vocab
    stops = dict(stops)
    writer, at = ShardWriter(folder, sizes_of(first, size), vocab), 0
    for i, piece in enumerate(pieces):
        writer.add(tokens[at : at + piece])
        at += piece
        if i in stops:
            writer.flush()
            known = writer.position()
            files, held = list(known["files"]), known["held"]
            writer.add(tokens[at : at + stops[i]] ^ 1)
            if writer._file is not None:
                writer._file.flush()  # the extra tokens may have reached the disk
            writer = ShardWriter(folder, sizes_of(first, size), vocab)
            writer.resume(files, held)
    writer.close()
    for row in writer.files:
        content = (folder / row["name"]).read_bytes()
        assert (row["bytes"], row["tokens"]) == (len(content), open_shard(folder / row["name"], vocab, True).count)
    undisturbed = ShardWriter(whole, sizes_of(first, size), vocab)
    undisturbed.add(tokens[:at])
    undisturbed.close()
    assert writer.files == undisturbed.files
    expected = [tokens[:at][:first], *(tokens[:at][i : i + size] for i in range(first, at, size))] if at else []
    kind = GPT2 if vocab <= 2**16 else LLAMA
    names = [row["name"] for row in writer.files]
    assert [(folder / name).read_bytes() for name in names] == [layout(part.tolist(), *kind) for part in expected]
    assert {name: contents(folder)[name] for name in names} == contents(whole)


def test_an_unfinished_shard_cannot_be_opened(tmp_path):
    writer = ShardWriter(tmp_path, sizes_of(10, 10), VOCAB)
    writer.add(np.arange(5))
    writer.flush()
    assert "magic 0 is not" in refusal(tmp_path / "x_val_000000.bin")
    with pytest.raises(ValueError, match="below"):
        writer.add(np.array([VOCAB]))


@pytest.mark.parametrize("tokens", [[-1], [5, 250, 251]])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path, tokens):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.bin", np.array(tokens), 251)
    assert not list(tmp_path.iterdir())


# Broken files


@few
@given(cut=st.integers(1, 1024 + 2 * 100 - 1))
@example(cut=1024)
@example(cut=1023)
@example(cut=1025)
@example(cut=1)
def test_a_file_cut_anywhere_is_truncated(folder, cut):
    path = put(folder / "cut_train_000001.bin", layout(range(100))[:cut])
    assert "truncated" in refusal(path)


def test_an_empty_file(tmp_path):
    assert "empty" in refusal(put(tmp_path / "a.bin", b""))


def test_a_shard_without_tokens_is_valid(tmp_path):
    assert open_shard(put(tmp_path / "a.bin", layout([])), VOCAB, check_all=True).count == 0


@pytest.mark.parametrize("name", ["a.bin", "val.bin"])
@pytest.mark.parametrize("magic", [0, -1, 20240521, 2**31 - 1])
def test_a_wrong_magic_is_an_error(tmp_path, name, magic):
    message = refusal(put(tmp_path / name, layout([1, 2, 3], magic=magic)))
    assert f"magic {magic}" in message and "20240520" in message


@pytest.mark.parametrize("magic, version", [(20240520, 7), (20240520, 0), (20240801, 1), (20240801, -7)])
def test_a_version_that_does_not_match_the_magic_is_an_error(tmp_path, magic, version):
    assert f"version {version}" in refusal(put(tmp_path / "a.bin", layout([1, 2, 3], magic, version)))


@pytest.mark.parametrize("count", [-1, -3, -(2**31), 2, 4, 2**31 - 1])
def test_a_wrong_token_count_is_an_error(tmp_path, count):
    message = refusal(put(tmp_path / "a.bin", layout([1, 2, 3], count=count)))
    assert f"{count} tokens" in message and ("truncated" if count > 3 else "too long") in message


@pytest.mark.parametrize("extra", [1, 2, 1000])
def test_a_file_that_is_too_long_is_an_error(tmp_path, extra):
    assert "too long" in refusal(put(tmp_path / "a.bin", layout([1, 2, 3]) + bytes(extra)))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: None])
def test_a_path_that_is_not_a_file_is_an_error(tmp_path, make):
    make(tmp_path / "a.bin")
    refusal(tmp_path / "a.bin")


@few
@given(
    content=st.one_of(
        st.binary(max_size=2100),
        st.builds(
            lambda header, body: struct.pack("<3i", *header).ljust(1024, b"\0") + body,
            st.tuples(
                *(st.sampled_from([20240520, 20240801, 0]), st.sampled_from([1, 7]), st.integers(-2, 20)),
            ),
            st.binary(max_size=40),
        ),
    ),
    name=st.sampled_from(["a.bin", "train.bin"]),
)
def test_any_bytes_are_opened_or_a_user_error(folder, content, name):
    path = put(folder / name, content)
    try:
        shard = open_shard(path, VOCAB, check_all=True)
    except UserError as e:
        assert str(path) in str(e)
    else:
        assert len(shard.read(0, shard.count)) == shard.count


def test_a_file_truncated_after_opening_is_an_error(tmp_path):
    path = put(tmp_path / "a.bin", layout(range(100)))
    shard = open_shard(path, VOCAB)
    os.truncate(path, 1024 + 2 * 60)
    assert shard.read(0, 60).tolist() == list(range(60))
    for start, length in [(0, 61), (59, 2), (60, 1), (99, 1)]:
        with pytest.raises(UserError, match=r"a\.bin.*are missing; the file was truncated"):
            shard.read(start, length)


def test_a_file_removed_after_opening_is_an_error(tmp_path):
    path = put(tmp_path / "a.bin", layout(range(100)))
    shard = open_shard(path, VOCAB)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.bin"):
        shard.read(0, 10)


# Token ids


@few
@given(tokens=st.lists(st.integers(0, 300), min_size=1, max_size=50), vocab=st.integers(2, 301))
def test_an_id_outside_the_vocabulary_is_reported_with_its_position(folder, tokens, vocab):
    path = put(folder / "ids_train_000001.bin", layout(tokens))
    if max(tokens) < vocab:
        assert open_shard(path, vocab).count == len(tokens)
        return
    words = refusal(path, vocab).split()
    at = int(words[words.index("position") + 1])
    assert tokens[at] == int(words[words.index("id") + 1]) >= vocab


def test_ids_between_the_samples_are_found_only_with_check_all(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLE_BLOCKS", 3)
    monkeypatch.setattr(shards, "SAMPLE_BLOCK", 10)
    monkeypatch.setattr(shards, "READ_BLOCK", 64)
    found, missed = [], []
    for at in range(300):
        tokens = np.zeros(300, "<u2")
        tokens[at] = 251
        path = put(tmp_path / "a.bin", layout(tokens.tolist()))
        assert f"token id 251 at position {at} " in refusal(path, 251, check_all=True)
        try:
            open_shard(path, 251)
            missed.append(at)
        except UserError as e:
            assert f"position {at} " in str(e)
            found.append(at)
    assert found == [*range(10), *range(145, 155), *range(290, 300)]  # both ends and the middle


# nanoGPT's files


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_nanogpts_files_are_read_without_a_header(tmp_path, name):
    tokens = [50256, *range(3, 1200)]
    shard = open_shard(put(tmp_path / name, np.array(tokens, "<u2").tobytes()), VOCAB)
    assert shard.count == len(tokens)
    assert shard.read(0, shard.count).tolist() == tokens
    assert shard.read(1000, 3).tolist() == tokens[1000:1003]


@pytest.mark.parametrize("name", ["a.bin", "train.bin.bin", "x_train.bin", "Train.bin"])
@pytest.mark.parametrize("length", [100, 2000])
def test_other_names_need_a_header(tmp_path, name, length):
    refusal(put(tmp_path / name, np.arange(3, 3 + length).astype("<u2").tobytes()))


def test_a_short_file_of_nanogpts_is_read(tmp_path):
    assert open_shard(put(tmp_path / "train.bin", b"\x01\x00\x02\x00"), VOCAB).read(0, 2).tolist() == [1, 2]


def test_half_a_token_is_an_error(tmp_path):
    assert "odd number of bytes (4001)" in refusal(put(tmp_path / "train.bin", b"\x07" * 4001))


def test_ids_of_nanogpts_files_are_checked_too(tmp_path):
    assert "token id 300 at position 2 " in refusal(put(tmp_path / "val.bin", struct.pack("<4H", 1, 2, 300, 4)), 256)


def test_a_shard_under_nanogpts_name_is_a_shard(tmp_path):
    shard = open_shard(put(tmp_path / "train.bin", layout([5, 6, 7])), VOCAB)
    assert shard.read(0, shard.count).tolist() == [5, 6, 7]


# Finding


def test_shards_are_found_in_name_order(tmp_path):
    for name in ("x_train_000002.bin", "x_train_000010.bin", "x_train_000001.bin", "x_val_000000.bin"):
        (tmp_path / name).touch()
    (tmp_path / "x_train_folder.bin").mkdir()
    found = find_shards(f"{tmp_path}/x_train_*.bin", "input_train_bin")
    assert [path.name for path in found] == ["x_train_000001.bin", "x_train_000002.bin", "x_train_000010.bin"]


def test_a_plain_path_and_a_glob_over_folders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    deep = put(tmp_path / "a" / "b" / "x_train_000001.bin", b"")
    for pattern in (deep, f"{tmp_path}/*/b/*.bin", f"{tmp_path}/**/*.bin"):
        assert find_shards(str(pattern), "input_train_bin") == [deep]


def test_a_path_that_looks_like_a_pattern_but_is_a_file(tmp_path):
    (tmp_path / "run[1]").mkdir()
    path = put(tmp_path / "run[1]" / "x_train.bin", b"")
    assert find_shards(str(path), "input_train_bin") == [path]


@pytest.mark.parametrize("typed", ["tinyshakespare", "tinyshakespear", "tiny_shakespeare"])
def test_a_misspelled_folder_gets_a_suggestion(tmp_path, monkeypatch, typed):
    (tmp_path / "data" / "tinyshakespeare").mkdir(parents=True)
    for base in ("data", tmp_path / "data"):
        monkeypatch.chdir(tmp_path)
        assert f"did you mean {base}/tinyshakespeare?" in no_match(f"{base}/{typed}/*_train.bin")


@pytest.mark.parametrize("typed", ["tinyshakespare", "tinyshakespeare"])
def test_missing_tinyshakespeare_names_its_command(tmp_path, typed):
    (tmp_path / "data").mkdir()
    assert "python data/tiny_shakespeare.py" in no_match(tmp_path / "data" / typed / "*_train.bin")


def test_a_missing_folder_without_a_similar_one(tmp_path):
    (tmp_path / "data").mkdir()
    assert "does not exist" in no_match(tmp_path / "data" / "xyzzyx" / "*.bin")
    assert "does not exist" in no_match(tmp_path / "xyzzyx" / "data" / "*.bin")


def test_an_empty_folder_and_one_of_other_files(tmp_path):
    assert "contains nothing" in no_match(tmp_path / "*.bin")
    for i in range(6):
        (tmp_path / f"f{i}.txt").touch()
    assert "contains f0.txt, f1.txt, f2.txt, f3.txt, …" in no_match(tmp_path / "*.bin")


def test_a_pattern_in_the_folder_part(tmp_path):
    (tmp_path / "one").mkdir()
    assert "contains one" in no_match(tmp_path / "*" / "x.bin")


def test_a_folder_stands_for_its_shards(tmp_path):
    made = tmp_path / "web [1]"
    made.mkdir()
    for name in ("x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin", "x.json", ".x_train_000003.bin"):
        (made / name).touch()
    assert [p.name for p in find_shards(str(made), "input_train_bin")] == ["x_train_000001.bin", "x_train_000002.bin"]
    assert [p.name for p in find_shards(f"{made}/", "input_val_bin")] == ["x_val_000000.bin"]
    for name in ("tiny_shakespeare_{}.bin", "{}.bin", "edufineweb_{}_000001.npy"):
        other = tmp_path / name.format("x")
        other.mkdir()
        for split in ("train", "val"):
            (other / name.format(split)).touch()
            assert find_shards(str(other), f"input_{split}_bin") == [other / name.format(split)]
    assert f"folder {tmp_path / 'none'} does not exist; " in no_match(tmp_path / "none")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    assert no_match(tmp_path / "text").endswith(f"{tmp_path / 'text'} contains a.txt")


def test_data_is_found_in_the_repository_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "REPOSITORY", tmp_path / "rawgpt [x]")
    monkeypatch.chdir(tmp_path)
    for parent in ("rawgpt [x]", "."):  # a file here wins
        put_here = tmp_path / parent / "data" / "tinyshakespeare" / "tiny_shakespeare_train.bin"
        put_here.parent.mkdir(parents=True)
        put_here.touch()
        for pattern in ("data/tinyshakespeare/*_train.bin", "data/tinyshakespeare"):
            (found,) = find_shards(pattern, "input_train_bin")
            assert found.samefile(put_here)
    (tmp_path / "rawgpt [x]" / "mine.bin").touch()
    assert "contains" in no_match("mine.bin")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(shards, "REPOSITORY", tmp_path)
    hint = "python data/tiny_shakespeare.py --tokenizer bytes --output_dir data/tinyshakespeare_bytes makes data/"
    missing = f"folder {tmp_path}/data/tinyshakespeare_bytes does not exist; {hint}"
    assert missing in no_match("data/tinyshakespeare_bytes")


# Arrays of numpy


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_numpy_array_of_tokens_is_a_shard(tmp_path, dtype):
    tokens = np.arange(70, dtype=dtype)
    np.save(tmp_path / "edufineweb_train_000001.npy", tokens)
    shard = open_shard(tmp_path / "edufineweb_train_000001.npy", 70)
    assert shard.count == 70 and shard.largest_id == 69 and (shard.read(3, 60) == tokens[3:63]).all()
    assert "token id 69 at position 69" in refusal(shard.path, 69)


@pytest.mark.parametrize("tokens", [np.zeros(9), np.array([-1, 2]), np.zeros(9, np.int64), np.zeros((3, 3), np.uint16)])
def test_another_numpy_array_is_an_error(tmp_path, tokens):
    np.save(tmp_path / "x.npy", tokens)
    convertible = len(tokens) > 2 and tokens.dtype != float
    assert "but tokens are uint16" in (said := refusal(tmp_path / "x.npy"))
    assert ("tokens.astype(np.uint16).reshape(-1)" in said) == convertible


@pytest.mark.parametrize("largest, dtype", [(65535, "uint16"), (65536, "uint32")])
def test_the_advice_for_a_numpy_array_keeps_its_ids(tmp_path, largest, dtype):
    np.save(tmp_path / "x.npy", np.array([0, largest]))
    assert f"np.save(path, tokens.astype(np.{dtype}).reshape(-1))" in refusal(tmp_path / "x.npy")


def test_a_damaged_numpy_array_is_an_error(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros(900, np.uint16))
    content = (tmp_path / "whole.npy").read_bytes()
    for length in (1, 7, 9, 40, 128, 1000):
        assert "not an array of tokens" in refusal(put(tmp_path / "x.npy", content[:length]))


@pytest.mark.parametrize("name", ["runs[2]", "a*b", "x[y"])
def test_shards_in_a_folder_whose_name_looks_like_a_glob(tmp_path, name):
    for folder in (name, "runs2", "aXb"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / f"{name}_train_000001.bin", np.arange(5), 300)
    found = [tmp_path / name / f"{name}_train_000001.bin"]
    for pattern in ("*_train_*.bin", "*.bin", f"{name}_train_*.bin", f"{name}_train_000001.bin"):
        assert find_shards(f"{tmp_path}/{name}/{pattern}", "input_train_bin") == found
    with pytest.raises(UserError, match="matches no file: .* contains"):
        find_shards(f"{tmp_path}/{name}/*_val_*.bin", "input_val_bin")


def test_a_git_lfs_pointer_is_an_error(tmp_path):
    (tmp_path / "train.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="train.bin: a Git LFS pointer, not the file itself; run `git lfs pull`"):
        open_shard(tmp_path / "train.bin", 300)
