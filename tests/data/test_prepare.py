"""Text → shards: no document lost or changed, no half-made output, and one line about what is wrong with the input."""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cfg.errors import UserError
from data import assets, prepare, text, tiny_shakespeare
from data.prepare import ShardWriter, begin, finish
from data.shards import open_shard
from data.tokenizer import GPT2_END_OF_TEXT, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 50257
DOCUMENTS = ["First Citizen:\nBefore we proceed", "naïve 東京 👩‍👩‍👧", "say <|endoftext|> aloud", "  spaces \n\n", "a"]
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def quick(tokenizer, monkeypatch):
    """The commands in this process, with the tokenizer read once."""
    monkeypatch.setattr(text, "load_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(tiny_shakespeare, "load_tokenizer", lambda: tokenizer)

    def run(*args, command=text):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        command.main()

    return run


def command(*args, cwd=ROOT):
    script = [sys.executable, str(ROOT / "data" / "text.py"), *map(str, args)]
    return subprocess.run(script, cwd=cwd, capture_output=True, text=True)


def tokens_of(folder, pattern):
    shards = [open_shard(path, VOCAB, check_all=True) for path in sorted(folder.glob(pattern))]
    return [shard.read(0, shard.count).tolist() for shard in shards]


def whole(folder):
    """All tokens in the order in which they were made."""
    return sum(tokens_of(folder, "*_val_*.bin") + tokens_of(folder, "*_train_*.bin"), [])


def documents_in(tokens, tokenizer):
    assert tokens[0] == GPT2_END_OF_TEXT
    cuts = [i for i, token in enumerate(tokens) if token == GPT2_END_OF_TEXT] + [len(tokens)]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def write_input(folder, suffix, documents, key="text"):
    """The documents as files of one kind, and what to give the command for them."""
    if suffix == ".txt":
        for i, document in enumerate(documents):
            (folder / f"doc{i}.txt").write_bytes(document.encode())
        return folder / "*.txt"
    path = folder / f"docs{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, key: document}) + "\n" for document in documents))
    else:
        pq.write_table(pa.table({"id": list(range(len(documents))), key: documents}), path)
    return path


# What comes out


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_documents_come_back_from_the_shards(tmp_path, tokenizer, suffix):
    write_input(tmp_path, suffix, DOCUMENTS)
    done = command(f"*{suffix}", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert re.fullmatch(r"out: 5 documents, \d+ training and \d+ validation tokens\n", done.stdout)
    assert documents_in(whole(tmp_path / "out"), tokenizer) == DOCUMENTS
    names = ["manifest.json", "out_train_000001.bin", "out_val_000000.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_shards_sizes_and_manifest(tmp_path, quick, tokenizer):
    path = write_input(tmp_path, ".jsonl", [f"Document number {i}, of no great length." for i in range(40)])
    out = tmp_path / "out"
    quick(path, "--output_dir", out, "--name=x", "--shard_size=100", "--val_tokens=30")
    (val,), train = tokens_of(out, "x_val_*.bin"), tokens_of(out, "x_train_*.bin")
    total = len(whole(out))
    assert len(val) == 30 and len(train) == -(-(total - 30) // 100) > 2
    assert all(len(shard) == 100 for shard in train[:-1]) and 0 < len(train[-1]) <= 100
    assert [p.name for p in sorted(out.glob("*_train_*"))] == [f"x_train_{i:06d}.bin" for i in range(1, len(train) + 1)]
    assert [p.name for p in out.glob("*_val_*")] == ["x_val_000000.bin"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["documents"]) == ("gpt2", VOCAB, 40)
    assert len(manifest["files"]) == 1 + len(train)
    for row in manifest["files"]:
        content = (out / row["name"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@few
@given(
    documents=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=20),
    shard_size=st.integers(1, 60),
    val_tokens=st.integers(0, 20),
)
@example(documents=["a"] * 20, shard_size=20, val_tokens=2)  # both splits end where a shard does
@example(documents=["a"] * 10, shard_size=1, val_tokens=1)
def test_no_token_is_lost_whatever_the_sizes(tmp_path_factory, tokenizer, documents, shard_size, val_tokens):
    folder = tmp_path_factory.mktemp("sizes")
    path = write_input(folder, ".jsonl", documents)
    partial = begin(folder / "out", {})
    args = argparse.Namespace(name="x", text_key="text", shard_size=shard_size, val_tokens=val_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load_tokenizer", lambda: tokenizer)
        if not any(documents):
            with pytest.raises(UserError, match="no text"):
                text.write_shards(args, [path], partial)
            return
        writers, count = text.write_shards(args, [path], partial)
    finish(folder / "out", writers, {})
    expected = sum(([GPT2_END_OF_TEXT, *tokenizer.encode_ordinary(d)] for d in documents if d), [])
    val, train = tokens_of(folder / "out", "*_val_*.bin"), tokens_of(folder / "out", "*_train_*.bin")
    assert sum(val + train, []) == expected and count == sum(map(bool, documents))
    assert len(sum(val, [])) == min(val_tokens, len(expected) // 10) == writers[0].tokens
    assert len(val) <= 1 and all(len(shard) == shard_size for shard in train[:-1])


@few
@given(pieces=st.lists(st.integers(0, 25), max_size=12), size=st.integers(1, 10))
def test_a_writer_fills_every_shard_but_the_last(tmp_path_factory, pieces, size):
    folder = tmp_path_factory.mktemp("writer")
    writer, at = ShardWriter(folder, "x_train", 300, size, first=1), 0
    for piece in pieces:
        writer.add(np.arange(at, at + piece) % 300)
        at += piece
    writer.close()
    shards = tokens_of(folder, "x_train_*.bin")
    assert [len(shard) for shard in shards] == [size] * (at // size) + ([at % size] if at % size else [])
    assert sum(shards, []) == [i % 300 for i in range(at)]
    assert writer.tokens == at and [p.name for p in writer.paths] == sorted(p.name for p in folder.iterdir())


def test_empty_documents_missing_values_and_blank_lines_are_no_documents(tmp_path, quick, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n   \n{"text": "one"}\n')
    pq.write_table(pa.table({"text": [None, "two", ""]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").touch()
    quick(*sorted(tmp_path.iterdir()), "--output_dir", tmp_path / "out")
    assert documents_in(whole(tmp_path / "out"), tokenizer) == ["one", "two"]


def test_inputs_are_read_in_the_order_given_and_once(tmp_path, quick, tokenizer):
    write_input(tmp_path, ".txt", ["zero", "one", "two"])
    quick(tmp_path / "doc2.txt", tmp_path / "*.txt", "--output_dir", tmp_path / "out")
    assert documents_in(whole(tmp_path / "out"), tokenizer) == ["two", "zero", "one"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_another_field_holds_the_text(tmp_path, quick, tokenizer, suffix):
    path = write_input(tmp_path, suffix, DOCUMENTS, key="content")
    quick(path, "--output_dir", tmp_path / "out", "--text_key=content")
    assert documents_in(whole(tmp_path / "out"), tokenizer) == DOCUMENTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_way_of_holding_text_in_a_column(tmp_path, quick, tokenizer, kind):
    pq.write_table(pa.table({"text": pa.array(DOCUMENTS).cast(kind)}), tmp_path / "a.parquet")
    quick(tmp_path / "a.parquet", "--output_dir", tmp_path / "out")
    assert documents_in(whole(tmp_path / "out"), tokenizer) == DOCUMENTS


def test_a_file_whose_name_looks_like_a_pattern(tmp_path, quick, tokenizer):
    (tmp_path / "part[1].txt").write_text("one")
    quick(tmp_path / "part[1].txt", "--output_dir", tmp_path / "out")
    assert documents_in(whole(tmp_path / "out"), tokenizer) == ["one"]


# A second time


def stamp(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_second_run_finds_everything_there(tmp_path, quick, capsys):
    args = [write_input(tmp_path, ".jsonl", DOCUMENTS), "--output_dir", tmp_path / "out"]
    quick(*args)
    before = stamp(tmp_path / "out")
    quick(*args)
    assert capsys.readouterr().out.endswith("already there\n")
    assert stamp(tmp_path / "out") == before


@pytest.mark.parametrize("option", ["--shard_size=50", "--val_tokens=7", "--name=other", "--text_key=body", "input"])
def test_shards_made_otherwise_are_not_overwritten(tmp_path, quick, option):
    path = write_input(tmp_path, ".jsonl", DOCUMENTS)
    quick(path, "--output_dir", tmp_path / "out")
    before = stamp(tmp_path / "out")
    if option == "input":
        write_input(tmp_path, ".jsonl", DOCUMENTS[:-1])
    with pytest.raises(UserError, match="other input or options"):
        quick(path, "--output_dir", tmp_path / "out", *([] if option == "input" else [option]))
    assert stamp(tmp_path / "out") == before


# Mistakes


def jsonl(*lines):
    return lambda path: path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))


def parquet(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


GOOD = '{"text": "fine"}'
MISTAKES = {
    "missing": ("a.txt", lambda path: None, "a.txt: no such file"),
    "suffix": ("a.csv", lambda path: path.write_text("x"), "a.csv: only .txt, .jsonl, .parquet"),
    "no suffix": ("a", lambda path: path.write_text("x"), "a: only .txt"),
    "empty": ("a.txt", Path.touch, "no text"),
    "bad line": ("a.jsonl", jsonl(GOOD, GOOD, '{"text": '), "a.jsonl: line 3 is not a JSON object"),
    "no object": ("a.jsonl", jsonl(GOOD, '["text"]'), "a.jsonl: line 2 is not"),
    "no field": ("a.jsonl", jsonl('{"txt": "x"}'), "line 1 is not a JSON object with a field 'text'; see --text_key"),
    "field no text": ("a.jsonl", jsonl(GOOD, '{"text": 3}'), "line 2: field 'text' is not text"),
    "txt bytes": ("a.txt", lambda path: path.write_bytes(b"caf\xe9"), "a.txt: not UTF-8"),
    "jsonl bytes": ("a.jsonl", lambda path: path.write_bytes(b'{"text": "\xff"}\n'), "a.jsonl: not UTF-8"),
    "no parquet": ("a.parquet", lambda path: path.write_text("PAR1 not"), "a.parquet: not a readable parquet file"),
    "empty parquet": ("a.parquet", Path.touch, "a.parquet: not a readable parquet file"),
    "no column": ("a.parquet", parquet(id=[1], body=["x"]), "a.parquet: no column 'text'; it has id, body"),
    "number column": ("a.parquet", parquet(text=[1, 2]), "a.parquet: column 'text'"),
    "list column": ("a.parquet", parquet(text=[["a"], ["b"]]), "a.parquet: column 'text'"),
}


@pytest.mark.parametrize("name, make, message", MISTAKES.values(), ids=MISTAKES)
def test_what_is_wrong_with_an_input_is_said(tmp_path, quick, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        quick(tmp_path / name, "--output_dir", tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") in ([], [".partial"])


@pytest.mark.parametrize("mistake", ["missing", "bad line", "txt bytes", "no parquet", "number column"])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, mistake):
    name, make, message = MISTAKES[mistake]
    make(tmp_path / name)
    done = command(tmp_path / name, "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_a_mistake_can_be_mended_in_place(tmp_path, quick, tokenizer):
    path = tmp_path / "a.jsonl"
    jsonl(GOOD, "oops")(path)
    with pytest.raises(UserError):
        quick(path, "--output_dir", tmp_path / "out")
    jsonl(GOOD)(path)
    quick(path, "--output_dir", tmp_path / "out")
    assert documents_in(whole(tmp_path / "out"), tokenizer) == ["fine"]


@pytest.mark.parametrize(
    "option", ["--shard_size=0", "--shard_size=-5", "--val_tokens=-1", "--shard_size=many", "--val_tokens=nan", "--x=1"]
)
def test_options_out_of_range(tmp_path, quick, option):
    with pytest.raises(UserError, match=option.split("=")[0]):
        quick(write_input(tmp_path, ".txt", ["a"]), "--output_dir", tmp_path / "out", option)


def test_an_output_folder_is_required(tmp_path, quick):
    with pytest.raises(UserError, match="--output_dir"):
        quick(write_input(tmp_path, ".txt", ["a"]))


def test_a_name_is_not_a_path(tmp_path, quick):
    with pytest.raises(UserError, match="--name"):
        quick(write_input(tmp_path, ".txt", ["a"]), "--output_dir", tmp_path / "out", "--name=a/b")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be(tmp_path, quick, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--output_dir={tmp_path / place}"):
        quick(write_input(tmp_path, ".txt", ["a"]), "--output_dir", tmp_path / place)


def test_shards_of_someone_else_are_left_alone(tmp_path):
    (tmp_path / "x_train_000001.bin").touch()
    with pytest.raises(UserError, match="without a manifest"):
        begin(tmp_path, {})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not a manifest of rawgpt"):
        begin(tmp_path, {})


# Interruptions


def make(folder, recipe):
    """Two splits of two shards each, as the commands make them; True if they were made, False if they were there."""
    partial = begin(folder, recipe)
    if partial is None:
        return False
    writers = []
    for split in ("train", "val"):
        writers.append(ShardWriter(partial, f"x_{split}", VOCAB, 10))
        writers[-1].add(np.arange(17))
    finish(folder, writers, {"recipe": recipe})
    return True


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("step, nth", [("replace", n) for n in range(10)] + [("fsync", n) for n in range(5)])
def test_what_was_interrupted_anywhere_is_completed(tmp_path, monkeypatch, step, nth):
    """Whichever file was about to be flushed or renamed, nothing half-made shows, and the next run makes it whole."""
    recipe, calls, real = {"of": "test"}, [], getattr(os, step)
    make(tmp_path / "whole", recipe)

    def interrupt(*args):
        if len(calls) == nth:
            raise Interrupted
        calls.append(args)
        return real(*args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, step, interrupt)
        make(out, recipe)
    assert not (out / "manifest.json").exists()
    assert (out / ".partial" / "manifest.json").exists() or not list(out.glob("*.bin"))
    make(out, recipe)
    assert content(out) == content(tmp_path / "whole")
    assert not make(out, recipe)


def test_what_was_made_but_not_moved_out_is_moved_by_the_next_run(tmp_path):
    make(tmp_path / "out", {"a": 1})
    made = content(tmp_path / "out")
    partial = tmp_path / "out" / ".partial"
    partial.mkdir()
    for path in tmp_path.glob("out/*"):
        if path.name not in (".partial", "x_train_000000.bin"):
            path.rename(partial / path.name)
    assert begin(tmp_path / "out", {"a": 1}) is None
    assert content(tmp_path / "out") == made and not partial.exists()


def test_leftovers_of_an_interrupted_run_do_not_get_into_the_next(tmp_path):
    partial = begin(tmp_path, {})
    (partial / "x_train_000099.bin").write_bytes(b"half")
    assert begin(tmp_path, {}) == partial
    assert not list(partial.iterdir())


# tinyshakespeare


def test_tinyshakespeare_is_split_by_characters(tmp_path, quick, tokenizer, capsys):
    quick("--output_dir", tmp_path, command=tiny_shakespeare)
    original = assets.fetch("tinyshakespeare.txt").read_text()
    parts = [documents_in(*tokens_of(tmp_path, f"tiny_shakespeare_{s}.bin"), tokenizer) for s in ("train", "val")]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0][0] + parts[1][0] == original and len(parts[0][0]) == int(0.9 * len(original))
    quick("--output_dir", tmp_path, command=tiny_shakespeare)
    assert capsys.readouterr().out.endswith("already there\n")


def test_another_file_is_not_tinyshakespeare(tmp_path, quick):
    (tmp_path / "other.txt").write_text("To be")
    with pytest.raises(UserError, match="not tinyshakespeare.txt"):
        quick(f"--input={tmp_path / 'other.txt'}", "--output_dir", tmp_path / "out", command=tiny_shakespeare)


def test_documents_are_encoded_in_order_over_many_batches(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "DOCUMENTS_AT_ONCE", 3)
    pieces = list(prepare.encode_documents((str(i) for i in range(10)), tokenizer))
    assert all(piece.dtype == np.uint16 for piece in pieces)
    assert [piece.tolist() for piece in pieces] == [[50256, *tokenizer.encode_ordinary(str(i))] for i in range(10)]
