"""Units to shards: no token is lost for any sizes, and interruptions do not change the bytes."""

import errno
import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.prepare import job as preparing
from data.prepare import journal, sources, text_files, workers
from data.prepare.inputs import ReadOptions
from data.prepare.job import locked, open_job, prepare, summary, tokenizer_recipe
from data.prepare.sources import WorkUnit, plan
from util.errors import UserError

few = settings(max_examples=40, deadline=None)
TEXTS = [f"Document number {i}, of no great length{' or not' * (i % 7)}." for i in range(60)]


@pytest.fixture
def many_units(monkeypatch):
    """Makes units small and writes the journal after each unit."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", -1.0)


@pytest.fixture
def units(tmp_path, many_units, write_input):
    found = plan([str(write_input(tmp_path, ".jsonl", TEXTS))], ReadOptions())
    assert len(found) > 10
    return found


@pytest.fixture(scope="module")
def expected(tokenizer):
    return lambda texts: sum(([tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts), [])


# Output


def test_shards_sizes_and_manifest(tmp_path, make_job, units, expected, tokens_of, tokenizer):
    out = tmp_path / "out"
    made = prepare(make_job(out, shard_size=100, val_tokens=30), units)
    tokens = expected(TEXTS)
    assert tokens_of(out, "x_val_*.bin") == [tokens[:30]]
    assert tokens_of(out, "x_train_*.bin") == [tokens[i : i + 100] for i in range(30, len(tokens), 100)]
    names = [f"x_train_{i:06d}.bin" for i in range(1, len(made["files"]))]
    assert sorted(os.listdir(out)) == ["manifest.json", *names, "x_val_000000.bin"]
    assert json.loads((out / "manifest.json").read_text()) == made
    assert made["tokenizer"] == tokenizer.fingerprint and made["recipe"] == {"of": "test"}
    assert (made["tokens"], made["documents"], made["vocab_size"]) == (len(tokens), 60, 50257)
    assert made["text_bytes"] == sum(map(len, TEXTS)) and made["skipped"] == {}
    for row in made["files"]:
        content = (out / row["name"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("prefix, start", [([], [50256]), ([50256], [50256]), ([7], [50256, 7])])
def test_a_bos_token_follows_the_end_of_text_token(tmp_path, make_job, units, whole, tokenizer, prefix, start):
    """Models whose tokenizer adds BOS were trained on such data. In other tokenizers one token has both roles."""
    made = prepare(make_job(tmp_path / "out", tokenizer=replace(tokenizer, prefix=prefix)), units)
    tokens = [token for text in TEXTS for token in [*start, *tokenizer.encode(text)]]
    assert whole(tmp_path / "out") == tokens and (made["tokens"], made["documents"]) == (len(tokens), 60)


def test_the_recipe_names_the_tokens_before_a_document(tokenizer):
    """Shards with and without BOS are then not taken for the same."""
    assert tokenizer_recipe(tokenizer) == {"tokenizer": tokenizer.sha256}
    assert tokenizer_recipe(replace(tokenizer, bos=7)) == {"tokenizer": tokenizer.sha256, "document_prefix": [50256, 7]}


@few
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=20),
    shard_size=st.integers(1, 60),
    val_tokens=st.integers(0, 20),
    tenth=st.booleans(),
)
@example(texts=["a"] * 20, shard_size=20, val_tokens=2, tenth=True)  # both splits end at the end of a shard
@example(texts=["a"] * 10, shard_size=1, val_tokens=1, tenth=True)
@example(texts=["a"] * 10, shard_size=20, val_tokens=20, tenth=False)  # not more tokens than --val_tokens
def test_no_token_is_lost_whatever_the_sizes(
    tmp_path_factory, make_job, write_input, expected, tokens_of, texts, shard_size, val_tokens, tenth
):
    folder = tmp_path_factory.mktemp("sizes")
    job = make_job(folder / "out", shard_size=shard_size, val_tokens=val_tokens, val_tenth=tenth)
    units = plan([str(write_input(folder, ".jsonl", texts))], ReadOptions())
    if not any(texts):
        with pytest.raises(UserError, match="no text"):
            prepare(job, units)
        assert os.listdir(folder / "out") == []
        return
    made = prepare(job, units)
    tokens = expected(filter(None, texts))
    val, train = (tokens_of(folder / "out", f"*_{split}_*.bin") for split in ("val", "train"))
    assert sum(val + train, []) == tokens
    assert made["skipped"] == ({"empty": texts.count("")} if "" in texts else {})
    asked = min(val_tokens, len(tokens) // 10) if tenth else val_tokens
    assert len(sum(val, [])) == (asked if len(tokens) > asked else len(tokens) // 10)
    assert len(val) <= 1 and train and all(len(shard) == shard_size for shard in train[:-1])


@pytest.mark.parametrize("limit", [1, 2, 29, 30, 31, 400, 10**6])
def test_max_tokens_limits_the_output(tmp_path, make_job, units, expected, whole, tokenizer, limit):
    made = prepare(make_job(tmp_path / "out", max_tokens=limit, val_tokens=3), units)
    tokens = expected(TEXTS)[:limit]
    assert whole(tmp_path / "out") == tokens and made["tokens"] == len(tokens)
    assert made["documents"] == tokens.count(tokenizer.end_of_text)
    text = tokenizer.decode([t for t in tokens if t != tokenizer.end_of_text])
    assert made["text_bytes"] == len(text.encode())


def test_text_beyond_max_tokens_is_not_read(tmp_path, make_job, write_input, monkeypatch):
    """A compressed file is a single unit of any size."""
    encoded, real = [], workers.parts
    monkeypatch.setattr(workers, "parts", lambda document, encoder: encoded.append(1) or real(document, encoder))
    units = plan([str(write_input(tmp_path, ".jsonl.gz", TEXTS))], ReadOptions())
    prepare(make_job(tmp_path / "out", max_tokens=20, val_tokens=3), units)
    assert len(encoded) <= 2


def test_the_summary_counts_skipped_documents(tmp_path, make_job):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": null}\nbad\n{"text": ""}\n')
    made = prepare(make_job(tmp_path / "out", skip_bad=True), plan([str(tmp_path / "a.jsonl")], ReadOptions()))
    assert summary(Path("out"), made) == (
        "out: 1 documents, 3 training and 0 validation tokens, 1 bad and 1 empty and 1 null skipped"
    )


# Interruptions


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("val_tenth", [False, True], ids=["as laid out", "cut anew"])
@pytest.mark.parametrize("step", ["replace", "fsync", "unlink", "rmtree"])
def test_a_run_interrupted_anywhere_is_completed(tmp_path, monkeypatch, make_job, units, content, step, val_tenth):
    """After an interruption before any step, no partial file is visible, and the next run completes the output."""
    units = units[:5]
    job = make_job(tmp_path / "whole", shard_size=100, val_tokens=90, val_tenth=val_tenth)
    prepare(job, units)
    expected, module = content(tmp_path / "whole"), preparing.shutil if step == "rmtree" else os
    real, nth, interrupted = getattr(module, step), 0, True
    while interrupted:
        calls, out, interrupted = [], tmp_path / f"out{nth}", False

        def interrupt(*args, calls=calls, nth=nth, **options):
            if len(calls) == nth:
                raise Interrupted
            calls.append(args)
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, step, interrupt)
            try:
                prepare(replace(job, output_dir=out), units)
            except Interrupted:
                interrupted = True
        assert all(expected[path.name] == path.read_bytes() for path in out.iterdir() if path.is_file())
        prepare(replace(job, output_dir=out), units)
        assert content(out) == expected and prepare(replace(job, output_dir=out), units) is None
        nth += 1
    assert nth > (1 if step == "rmtree" else 5)


def test_an_interruption_after_max_tokens_was_reached(tmp_path, monkeypatch, make_job, units, content):
    """Text after the limit is not read, so damage in it is not an error."""
    job = make_job(tmp_path / "out", max_tokens=100, val_tokens=10)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(preparing, "_finish", lambda *args: (_ for _ in ()).throw(Interrupted))
        prepare(job, units)
    done = json.loads((tmp_path / "out/.partial/journal.json").read_text())["progress"]
    beyond = [replace(unit, path="/nowhere.jsonl") for unit in units[done["units"] :]]
    made = prepare(job, [*units[: done["units"]], *beyond])
    assert (made["tokens"], made["documents"]) == (100, done["documents"])


def test_units_in_the_journal_are_not_read_again(tmp_path, monkeypatch, make_job, units, content):
    prepare(make_job(tmp_path / "whole"), units)
    real = workers.encode_unit

    def fail_at_the_eighth(unit, path, encoder):
        if unit == units[7]:
            raise UserError("no more")
        return real(unit, path, encoder)

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(workers, "encode_unit", fail_at_the_eighth)
        prepare(make_job(tmp_path / "out"), units)
    read = []
    monkeypatch.setattr(workers, "encode_unit", lambda *args: read.append(args[0]) or real(*args))
    prepare(make_job(tmp_path / "out"), units)
    assert read == units[7:] and content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_damaged_unfinished_shards_are_not_resumed(tmp_path, monkeypatch, make_job, units, damage):
    job = make_job(tmp_path / "out", shard_size=100, val_tokens=10)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(preparing, "_finish", lambda *args: (_ for _ in ()).throw(Interrupted))
        prepare(job, units)
    shard = tmp_path / "out/.partial/x_train_000002.bin"
    os.truncate(shard, 1030) if damage == "shorter" else shard.unlink()
    with pytest.raises(UserError, match="x_train_000002.bin is missing or shorter.*remove"):
        prepare(job, units)


@pytest.mark.parametrize("where", ["unit", "shard", "journal"])
def test_a_full_disk_is_one_line_and_the_work_is_kept(tmp_path, monkeypatch, make_job, units, content, where):
    prepare(make_job(tmp_path / "whole"), units)
    place = {"unit": workers.os, "shard": preparing.ShardWriter, "journal": journal}[where]
    name = {"unit": "replace", "shard": "add", "journal": "write_atomically"}[where]
    real, calls = getattr(place, name), []

    def full(*args):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(UserError, match="out: No space left on device; finished work is kept, repeat the command"):
            prepare(make_job(tmp_path / "out"), units)
    assert os.listdir(tmp_path / "out") == [".partial"]
    prepare(make_job(tmp_path / "out"), units)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# Second runs


def stamp(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_second_run_does_nothing(tmp_path, make_job, units):
    assert prepare(make_job(tmp_path / "out"), units)
    before = stamp(tmp_path / "out")
    assert prepare(make_job(tmp_path / "out"), [WorkUnit("/nowhere.jsonl", 0, 1, 1)]) is None
    assert stamp(tmp_path / "out") == before


def test_shards_of_another_recipe_are_not_overwritten(tmp_path, make_job, units):
    prepare(make_job(tmp_path / "out", recipe={"a": 1, "b": [2]}), units)
    before = stamp(tmp_path / "out")
    with pytest.raises(UserError, match=r"from other input or options \(b, c\); choose another --output_dir"):
        prepare(make_job(tmp_path / "out", recipe={"a": 1, "b": [3], "c": 1}), units)
    assert stamp(tmp_path / "out") == before


def test_unfinished_work_of_another_command_is_not_resumed(tmp_path, monkeypatch, make_job, units):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(preparing, "_finish", lambda *args: (_ for _ in ()).throw(Interrupted))
        prepare(make_job(tmp_path / "out"), units)
    with pytest.raises(UserError, match="unfinished work of a command with other input or options .of.; repeat that"):
        prepare(make_job(tmp_path / "out", recipe={"of": "other"}), units)


def test_a_second_command_at_the_same_time_is_an_error(tmp_path, make_job, units):
    """Above all while the first command moves its shards: the second would move them too."""
    partial = open_job(tmp_path / "out", {"of": "test"})
    (partial / "manifest.json").write_text('{"files": []}')
    with locked(tmp_path / "out"), pytest.raises(UserError, match=f"another command .process {os.getpid()}. is prep"):
        prepare(make_job(tmp_path / "out"), units)
    assert (partial / "manifest.json").exists()


def test_shards_without_a_manifest_are_not_overwritten(tmp_path):
    (tmp_path / "x_train_000001.bin").touch()
    with pytest.raises(UserError, match="without a manifest"):
        open_job(tmp_path, {})
    for other in ("[]", "not JSON", '{"recipe": {}, "tokenizer": "gpt2"}'):
        (tmp_path / "manifest.json").write_text(other)
        with pytest.raises(UserError, match="not a manifest that rawgpt wrote"):
            open_job(tmp_path, {})


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path, make_job, units, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--output_dir={tmp_path / place}"):
        prepare(make_job(tmp_path / place), units)


def test_leftovers_of_an_interrupted_run_are_discarded(tmp_path, make_job, units, content):
    prepare(make_job(tmp_path / "whole"), units)
    partial = open_job(tmp_path / "out", {"of": "test"})
    for name in ("x_train_000001.bin", "x_train_000099.bin", "unit_00000000", "unit_00000001.123", ".journal.json.abc"):
        (partial / name).write_bytes(random.Random(1).randbytes(5000))
    prepare(make_job(tmp_path / "out"), units)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_units_have_the_tokens_of_their_documents_in_order(tmp_path, units, tokenizer, expected):
    encoded = list(workers.encoded_units(units, 0, workers.EncodeOptions(fast=False), tokenizer, tmp_path, 1))
    tokens = [np.fromfile(one.path, "<u2").tolist() for one in encoded]
    assert sum(tokens, []) == expected(TEXTS) and [one.tokens for one in encoded] == list(map(len, tokens))


def test_an_error_of_the_disk_is_not_a_bad_document(tmp_path, tokenizer, monkeypatch):
    """Not even with --skip_bad: the rest of the file would be lost."""
    (tmp_path / "a.txt").write_text("some text")
    (unit,) = plan([str(tmp_path / "a.txt")], ReadOptions())
    reads = []

    def blocks(path):
        reads.append(path)
        yield "some text " * 10
        if len(reads) > 1:  # the first time it only looks for damage
            raise UserError(f"{path}: Input/output error")

    monkeypatch.setattr(text_files, "text_blocks", blocks)
    encoder = workers.Encoder.of(workers.EncodeOptions(fast=False, skip_bad=True), tokenizer)
    with pytest.raises(UserError, match="a.txt: Input/output error"):
        workers.encode_unit(unit, tmp_path / "unit", encoder)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_and_truncated_shards_are_errors(tmp_path, make_job, units, damage):
    prepare(make_job(tmp_path / "out", shard_size=100), units)
    path = sorted((tmp_path / "out").glob("*_train_*"))[0]
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{path} is missing or truncated"):
        prepare(make_job(tmp_path / "out", shard_size=100), units)


def test_a_journal_of_other_units_is_not_resumed(tmp_path, monkeypatch, make_job, units, content, capsys):
    real = preparing._append
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "_append", stop)
        prepare(make_job(tmp_path / "out"), units)
    prepare(make_job(tmp_path / "out"), units[:1] + units[2:])
    assert "the last file is encoded again from its beginning" in capsys.readouterr().out
    prepare(make_job(tmp_path / "whole"), units[:1] + units[2:])
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_unfinished_work_on_other_units_is_not_resumed(tmp_path, monkeypatch, make_job, units):
    """The recipe is the same, so the units must differ in the input."""
    job = make_job(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(preparing, "_finish", lambda *args: (_ for _ in ()).throw(Interrupted))
        prepare(job, units)
    path = tmp_path / "out/.partial/journal.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "file_start": {**state, "units": "other"}}))
    with pytest.raises(UserError, match="other input or options .source."):
        prepare(job, units[1:])


def test_a_journal_of_another_version_is_not_resumed(tmp_path, make_job, units):
    partial = open_job(tmp_path / "out", {"of": "test"})
    (partial / "journal.json").write_text('{"plan": "x", "progress": {}}')
    (partial / "recipe.json").write_text('{"of": "test"}')
    with pytest.raises(UserError, match="written by another version"):
        prepare(make_job(tmp_path / "out"), units)
