"""The commands that prepare data: flags, parts, --check, output, and one-line errors."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import assets, fineweb_edu, shards, tiny_shakespeare
from data.prepare import encoder, job, sources, workers
from data.prepare import hub as data_sets
from data.tokenizers.tokenizer import Tokenizer
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["First Citizen:\nBefore we proceed", "naïve 東京 👩‍👩‍👧", "say <|endoftext|> aloud", "  spaces \n\n", "a"]


def command(*args, cwd=ROOT, **options):
    script = [sys.executable, str(ROOT / "data" / "text.py"), *map(str, args)]
    return subprocess.run(script, cwd=cwd, capture_output=True, text=True, **options)


@pytest.fixture
def source(tmp_path, write_input):
    return write_input(tmp_path, ".jsonl", DOCUMENTS * 20)


# The real command


def test_documents_come_back_from_the_shards(tmp_path, write_input, whole, documents_in):
    """Reads files of every kind with two workers."""
    for suffix in (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst"):
        write_input(tmp_path, suffix, DOCUMENTS)
    done = command("*.txt*", "*.jsonl*", "*.parquet", "--output_dir", "out", "--workers=2", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert re.fullmatch(r"out: 35 documents, \d+ training and \d+ validation tokens\n", done.stdout)
    found = documents_in(whole(tmp_path / "out"))
    assert sorted(found) == sorted(DOCUMENTS * 7) and found[20:] == DOCUMENTS * 3
    names = ["manifest.json", "out_train_000001.bin", "out_val_000000.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_workers_and_encoder_do_not_change_a_byte(tmp_path, quick, content, monkeypatch, write_input):
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        write_input(tmp_path / f"{i}", ".jsonl", [f"{i} {text}" for text in DOCUMENTS * 20])
    args = [*tmp_path.glob("?/*.jsonl"), "--name=x", "--shard_size=200", "--fim_rate=0.5", "--tokenizer=gpt2-fim"]
    assert command(*args, "--output_dir", tmp_path / "two", "--workers=2").returncode == 0
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    quick(*args, "--output_dir", tmp_path / "one")
    quick(*args, "--output_dir", tmp_path / "fast", "--encoder=auto")
    assert content(tmp_path / "two") == content(tmp_path / "one") == content(tmp_path / "fast")


@pytest.mark.parametrize("workers, bad", [(1, b"oops"), (2, b'{"text": "\xff"}')])
def test_a_damaged_line_is_one_line_and_exit_code_2(tmp_path, source, workers, bad):
    (tmp_path / "bad.jsonl").write_bytes(bad)
    done = command(source, tmp_path / "bad.jsonl", "--output_dir", tmp_path / "out", "--workers", workers)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "bad.jsonl" in done.stderr
    assert os.listdir(tmp_path / "out") == [".partial"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line(tmp_path, source, workers, quick):
    """Simulates it by a limit on file sizes, which first a worker reaches and then the shards."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    args = [source, source.parent / "again.jsonl", "--output_dir", tmp_path / "out", "--workers", workers, "--name=x"]
    (source.parent / "again.jsonl").write_bytes(source.read_bytes() * 3)
    done = command(*args, preexec_fn=limit)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and "File too large; finished work is kept" in done.stderr
    assert os.listdir(tmp_path / "out") == [".partial"]
    quick(*args, "--workers=1")
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_tokenizer_without_some_bytes_refuses_only_texts_with_these(tmp_path, source):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())  # without an alphabet for the trainer, it has only the bytes of its text
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = {"special_tokens": ["<|endoftext|>"], "show_progress": False}
    trained.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(vocab_size=300, **options))
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "bad.txt").write_text("a cost of €9")
    args = ["--tokenizer", tmp_path / "tokenizer.json", "--output_dir", tmp_path / "out", "--workers=1"]
    assert command(source, *args).returncode == 0
    done = command(tmp_path / "bad.txt", *args[:2], "--output_dir", tmp_path / "bad", "--workers=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "bad.txt: --tokenizer=" in done.stderr and "'€' has no token, in the text 'a cost of €9'" in done.stderr


# Options


def test_an_option_that_decides_the_shards_may_not_change(tmp_path, quick, source):
    quick(source, "--output_dir", tmp_path / "out")
    for option in ("--shard_size=50", "--val_tokens=7", "--name=other", "--max_tokens=9", "--skip_bad"):
        with pytest.raises(UserError, match=f"other input or options .{option[2:].split('=')[0]}.;"):
            quick(source, "--output_dir", tmp_path / "out", option)
    with pytest.raises(UserError, match="options .tokenizer."):
        quick(source, "--output_dir", tmp_path / "out", "--tokenizer=gpt2-fim")
    source.write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match="options .source."):
        quick(source, "--output_dir", tmp_path / "out")


def test_the_output_may_be_below_the_input(tmp_path, quick, source, capsys):
    for _ in range(2):
        quick(tmp_path, "--output_dir", tmp_path / "out")
    assert capsys.readouterr().out.endswith(f"{tmp_path}/out/manifest.json\n{tmp_path}/out: already there\n")
    for step in ("--part=1/2", "--part=2/2", "--join"):
        quick(tmp_path, "--output_dir", tmp_path / "parts", step)
    assert "100 documents" in capsys.readouterr().out.splitlines()[-1]


def test_an_option_that_does_not_decide_the_shards_may_change(tmp_path, quick, source, capsys):
    quick(source, "--output_dir", tmp_path / "out")
    quick(source, "--output_dir", tmp_path / "out", "--workers=3", "--encoder=auto")
    assert capsys.readouterr().out.endswith("out: already there\n")


def test_a_damaged_input_file_can_be_repaired_in_place(tmp_path, quick, whole, documents_in):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\noops\n')
    with pytest.raises(UserError):
        quick(path, "--output_dir", tmp_path / "out")
    path.write_text('{"text": "fine"}\n')
    quick(path, "--output_dir", tmp_path / "out")
    assert documents_in(whole(tmp_path / "out")) == ["fine"]


@pytest.fixture
def bad_file_last(tmp_path, write_input):
    """Three files of which the last has a damaged line after a good one. Returns the arguments that prepare them."""
    for name in "ab":
        (tmp_path / name).mkdir()
        write_input(tmp_path / name, ".jsonl", [f"{name} {text}" for text in DOCUMENTS])
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\noops\n{"text": "last"}\n')
    args = [tmp_path / "a", tmp_path / "b", tmp_path / "c.jsonl", "--output_dir", tmp_path / "out"]
    return [*args, "--val_tokens=0"]


GOOD = [f"{name} {text}" for name in "ab" for text in DOCUMENTS]


@pytest.mark.parametrize("remedy", ["skip", "repair", "remove", "add"])
def test_finished_files_are_kept_when_a_bad_one_is_repaired_or_skipped(
    tmp_path, quick, bad_file_last, remedy, whole, documents_in, monkeypatch, capsys
):
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)  # so that the good line of the bad file is done too
    with pytest.raises(UserError, match="c.jsonl: line 2 is not JSON; repair it, or skip damaged text with --skip_bad"):
        quick(*bad_file_last)
    (tmp_path / "d.txt").write_text("new")
    encoded, real = [], workers.encode_unit
    monkeypatch.setattr(workers, "encode_unit", lambda unit, *args: encoded.append(unit.path) or real(unit, *args))
    more = ["--skip_bad"] if remedy in ("skip", "add") else []
    if remedy == "add":
        bad_file_last.insert(3, tmp_path / "d.txt")
    elif remedy == "repair":
        (tmp_path / "c.jsonl").write_text('{"text": "fine and longer"}\n{"text": "last"}\n')
    elif remedy == "remove":
        bad_file_last.remove(tmp_path / "c.jsonl")
    quick(*bad_file_last, *more)
    ends = {"skip": ["fine", "last"], "repair": ["fine and longer", "last"], "add": ["fine", "last", "new"]}
    assert documents_in(whole(tmp_path / "out")) == GOOD + ends.get(remedy, [])
    assert {Path(path).name for path in encoded} == {"remove": set(), "add": {"c.jsonl", "d.txt"}}.get(
        remedy, {"c.jsonl"}
    )
    out = capsys.readouterr().out
    assert ("encoded again" in out) == (remedy in ("repair", "remove")) and "resuming after" in out


def test_options_that_concern_finished_work_may_not_change(tmp_path, quick, bad_file_last, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)
    with pytest.raises(UserError, match="line 2"):
        quick(*bad_file_last)
    for option in ("--shard_size=50", "--val_tokens=7", "--max_tokens=9", "--document_separator=none"):
        name = option[2:].split("=")[0]
        with pytest.raises(UserError, match=f"unfinished work of a command with other input or options .{name}."):
            quick(*bad_file_last, option)
    with pytest.raises(UserError, match="other input or options .source."):
        quick(tmp_path / "b", *bad_file_last)
    quick(*bad_file_last, "--skip_bad", "--max_tokens=1000")


def test_work_that_skipped_bad_text_does_not_become_work_that_skipped_none(tmp_path, quick, bad_file_last, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)
    (tmp_path / "d.parquet").write_bytes(b"x")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stop"):
        patch.setattr(job, "_finish", lambda *args: (_ for _ in ()).throw(UserError("stop")))
        quick(*bad_file_last, "--skip_bad")
    with pytest.raises(UserError, match="other input or options .skip_bad."):
        quick(*bad_file_last)


def test_parts_may_differ_in_skip_bad(tmp_path, quick, source, monkeypatch, content):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    source.write_text(source.read_text() + "oops\n")
    args = [source, "--output_dir", tmp_path / "out"]
    quick(*args, "--part=1/2")
    with pytest.raises(UserError, match="line 101 is not JSON"):
        quick(*args, "--part=2/2")
    quick(*args, "--part=2/2", "--skip_bad")
    quick(*args, "--join", "--skip_bad")
    quick(*args[:1], "--output_dir", tmp_path / "one", "--skip_bad", "--name=out")
    assert content(tmp_path / "out") == content(tmp_path / "one")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_document_that_the_encoder_cannot_take(tmp_path, quick, skip_bad, whole, documents_in, monkeypatch):
    """tiktoken panics at a million spaces in a row, after it has tried for long. Here it panics at a zero."""
    monkeypatch.setattr(workers, "HELD_TOKENS", 2)
    monkeypatch.setattr(encoder, "LONG", 100)
    panic, real = type("PanicException", (BaseException,), {}), Tokenizer.encode

    def encode(self, text):
        if "\0" in text:
            raise panic
        return real(self, text)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    rows = ["one", "x " * 200 + "\0", "two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    args = [tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--val_tokens=0"]
    if not skip_bad:
        with pytest.raises(UserError, match="a.jsonl: line 2: tiktoken cannot encode .* skip it with --skip_bad"):
            quick(*args)
        return
    quick(*args, "--skip_bad")
    assert documents_in(whole(tmp_path / "out")) == ["one", "two"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["skipped"] == {"bad": 1} and (manifest["documents"], manifest["text_bytes"]) == (2, 6)


def test_the_summary_says_at_how_many_separators_text_was_split(tmp_path, quick, whole, documents_in, capsys):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    args = [tmp_path / "a.txt", "--val_tokens=0"]
    quick(*args, "--output_dir", tmp_path / "split")
    assert "2 documents, 4 training and 0 validation tokens, text split at 2 <|endoftext|> " in capsys.readouterr().out
    quick(*args, "--output_dir", tmp_path / "none", "--document_separator=none")
    assert "1 documents" in capsys.readouterr().out
    quick(*args, "--output_dir", tmp_path / "own", "--document_separator=o")
    assert documents_in(whole(tmp_path / "own")) == ["ne\n<|end", "ftext|>\ntw", "<|end", "ftext|>"]
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    quick(*args, "--output_dir", tmp_path / "lines", r"--document_separator=\n\n")
    assert documents_in(whole(tmp_path / "lines")) == ["one", "two"]
    capsys.readouterr()
    quick(*args, "--output_dir", tmp_path / "missing", "--document_separator=###")
    assert "no ### found (see --document_separator)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--document_separator: is empty"):
        quick(*args, "--output_dir", tmp_path / "empty", "--document_separator=")


WRONG = """--shard_size=0 --shard_size=-5 --shard_size=2147483648 --val_tokens=-1 --val_tokens=2147483648
    --shard_size=many --val_tokens=nan --x=1 --workers=0 --max_tokens=-1 --fim_rate=1.1 --fim_rate=-0.1 --fim_rate=nan
    --fim_spm_rate=0.5 --part=0/2 --encoder=fast --name=a/b"""


@pytest.mark.parametrize("option", WRONG.split())
def test_options_out_of_range_are_errors(tmp_path, quick, source, option):
    with pytest.raises(UserError, match=option.split("=")[0]):
        quick(source, "--output_dir", tmp_path / "out", option)
    assert not (tmp_path / "out").exists()


def test_options_that_exclude_each_other_are_errors(tmp_path, quick, source):
    (tmp_path / "m.yaml").write_text(json.dumps({"tokens": 9, "sources": {"a": {"input": str(source), "weight": 1}}}))
    mixture, out = ["--mixture", tmp_path / "m.yaml"], ["--output_dir", tmp_path / "out"]
    for args, message in [
        ([source], "--output_dir"),
        (out, "give either files or a --mixture"),
        ([source, *mixture, *out], "give either files or a --mixture"),
        ([*mixture, *out, "--join"], "--mixture is prepared by one command"),
        ([*mixture, *out, "--max_tokens=5"], "--mixture is prepared by one command"),
        ([source, *out, "--part=1/2", "--join"], "give one of the two"),
    ]:
        with pytest.raises(UserError, match=message):
            quick(*args)
    assert not (tmp_path / "out").exists()


# Parts


def test_joined_parts_equal_a_single_run(tmp_path, quick, source, content, monkeypatch, capsys):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    args = [source, "--name=x", "--shard_size=100", "--val_tokens=20"]
    quick(*args, "--output_dir", tmp_path / "one")
    for k in (3, 1, 2):
        quick(*args, "--output_dir", tmp_path / "out", f"--part={k}/3")
    quick(*args, "--output_dir", tmp_path / "out", "--join")
    assert content(tmp_path / "out") == content(tmp_path / "one")
    quick(*args, "--output_dir", tmp_path / "out", "--part=2/3")
    assert content(tmp_path / "out") == content(tmp_path / "one")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].replace("one:", "out:") == lines[-2] and lines[-1].endswith("already there")
    assert [re.search(r"part_\d_of_3(?=:)", line)[0] for line in lines[1:4]] == [f"part_{k}_of_3" for k in (3, 1, 2)]


# --check


def test_check_counts_documents_and_tokens(tmp_path, quick, source, tokenizer, capsys):
    quick(source, "--output_dir", tmp_path / "out", "--shard_size=500")
    capsys.readouterr()
    quick("--output_dir", tmp_path / "out", "--check")
    tokens = 20 * sum(1 + len(tokenizer.encode(text)) for text in DOCUMENTS)
    size = 20 * sum(len(text.encode()) for text in DOCUMENTS)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: {2 + tokens * 9 // 10 // 500} shards, all ids below 50,257, hashes as in the manifest\n"
        f"100 documents, {tokens:,} tokens, {tokens / 100:.1f} tokens a document, {size / tokens:.2f} bytes a token\n"
    )


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_check_names_the_damaged_shard(tmp_path, quick, source, damage):
    quick(source, "--output_dir", tmp_path / "out", "--shard_size=500", "--name=x")
    path = tmp_path / "out" / "x_train_000002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match="x_train_000002.bin is"):
        quick("--output_dir", tmp_path / "out", "--check")


def test_check_does_not_look_in_the_repository(tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repository/data/x").mkdir(parents=True)
    (tmp_path / "repository/data/x/x_train_000001.bin").touch()
    monkeypatch.setattr(shards, "REPOSITORY", tmp_path / "repository")
    with pytest.raises(UserError, match="--output_dir=data/x: no shards to check"):
        quick("--output_dir", "data/x", "--check")


def test_check_of_shards_without_a_manifest(tmp_path, quick, source, capsys):
    with pytest.raises(UserError, match=str(tmp_path / "out")):
        quick("--output_dir", tmp_path / "out", "--check")
    quick(source, "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match="was made with tokenizer gpt2, not gpt2-fim; give it as --tokenizer"):
        quick("--output_dir", tmp_path / "out", "--check", "--tokenizer=gpt2-fim")
    manifest = tmp_path / "out" / "manifest.json"
    former = json.loads(manifest.read_text()) | {"tokenizer": "gpt2"}
    manifest.write_text(json.dumps(former))
    with pytest.raises(UserError, match="not a manifest that rawgpt wrote"):
        quick("--output_dir", tmp_path / "out", "--check")
    manifest.unlink()
    quick("--output_dir", tmp_path / "out", "--check")
    assert "no manifest, hashes are not verified\n" in capsys.readouterr().out


# FineWeb-Edu from local files, and tinyshakespeare


def test_fineweb_edu_from_local_files(tmp_path, quick, whole, documents_in, tokens_of):
    for i in range(2):
        table = pa.table({"id": [f"{j}" for j in range(60)], "text": [f"{i} document {j}" for j in range(60)]})
        pq.write_table(table, tmp_path / f"{i:03d}_00000.parquet", row_group_size=10)
    quick(f"--input={tmp_path}/*.parquet", "--output_dir", tmp_path / "out", "--shard_size=100", command=fineweb_edu)
    assert documents_in(whole(tmp_path / "out")) == [f"{i} document {j}" for i in range(2) for j in range(60)]
    sizes = [len(shard) for shard in tokens_of(tmp_path / "out", "edufineweb_*_*.bin")]
    assert sizes[:-2] + sizes[-1:] == [100] * (len(sizes) - 1) and 0 < sizes[-2] <= 100  # val sorts last


@pytest.mark.parametrize(
    "name, folder",
    [
        ("sample-10BT", "edu_fineweb10B"),
        ("sample-350BT", "edu_fineweb350B"),
        ("CC-MAIN-2024-10", "edu_fineweb_CC-MAIN-2024-10"),
    ],
)
def test_the_default_folders_of_fineweb_edu(name, folder):
    assert fineweb_edu.default_output(name) == ROOT / "data" / folder


def test_tinyshakespeare_is_split_by_characters(tmp_path, quick, tokens_of, documents_in, capsys):
    quick("--output_dir", tmp_path, command=tiny_shakespeare)
    original = assets.fetch("tinyshakespeare.txt").read_text()
    parts = [documents_in(*tokens_of(tmp_path, f"tiny_shakespeare_{s}.bin")) for s in ("train", "val")]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0][0] + parts[1][0] == original and len(parts[0][0]) == int(0.9 * len(original))
    quick("--output_dir", tmp_path, command=tiny_shakespeare)
    assert capsys.readouterr().out.endswith("already there\n")
    quick("--output_dir", tmp_path, "--check")
    assert "2 documents, " in capsys.readouterr().out


def test_another_file_is_not_accepted_as_tinyshakespeare(tmp_path, quick):
    (tmp_path / "other.txt").write_text("To be")
    with pytest.raises(UserError, match="not tinyshakespeare.txt"):
        quick(f"--input={tmp_path / 'other.txt'}", "--output_dir", tmp_path / "out", command=tiny_shakespeare)


# FineWeb-Edu from the hub, simulated by a local folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    (folder / "sample" / "10BT").mkdir(parents=True)
    for i in range(2):
        pq.write_table(
            pa.table({"text": [f"Page {i} {j}." for j in range(50)]}), folder / f"sample/10BT/{i:03d}.parquet"
        )
    header = "configs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
    (folder / "README.md").write_text(f"---\n{header}---\n")
    monkeypatch.setattr(fineweb_edu, "REPOSITORY", str(folder))
    real = fineweb_edu.hub_files
    calls = []

    def addresses(*args):
        calls.append(args)
        return [f"file://{path}" for path in real(*args)]

    monkeypatch.setattr(fineweb_edu, "hub_files", addresses)
    return calls


def test_fineweb_edu_from_a_hub(tmp_path, quick, hub, whole, documents_in):
    out = tmp_path / "out"
    quick("--output_dir", out, command=fineweb_edu)
    assert documents_in(whole(out)) == [f"Page {i} {j}." for i in range(2) for j in range(50)]
    quick("--output_dir", out, command=fineweb_edu)  # complete: the hub is not asked
    assert len(hub) == 1


def test_all_parts_read_the_revision_of_the_first_part(tmp_path, quick, hub, capsys):
    for part in ("--part=1/2", "--part=2/2", "--join"):
        quick("--output_dir", tmp_path / "out", part, command=fineweb_edu)
    assert len(hub) == 1
    assert "100 documents" in capsys.readouterr().out.splitlines()[-1]


def test_an_unknown_configuration_is_an_error(tmp_path, quick, hub):
    with pytest.raises(UserError, match="no such configuration; did you mean sample-10BT"):
        quick("--name=sample-10B", "--output_dir", tmp_path / "out", command=fineweb_edu)


def test_without_a_network_the_error_names_both_solutions(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    script = [sys.executable, str(ROOT / "data" / "fineweb_edu.py"), f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and "check the network" in line and "--input 'FOLDER/*.parquet'" in line
    assert not (tmp_path / "out").exists()


# Data sets of the hub, simulated by a local folder


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A folder in the hub's layout with two configurations, of parquet files and of JSON lines."""
    folder = tmp_path / "set"
    (folder / "pages").mkdir(parents=True)
    for i in range(2):
        pq.write_table(pa.table({"text": [f"Page {i} {j}." for j in range(20)]}), folder / f"pages/train-{i}.parquet")
    rows = [{"meta": {"body": "one"}}, {"meta": {"body": ""}}, {"meta": {"body": "two"}}]
    (folder / "lines").mkdir()
    (folder / "lines/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [("pages", "train", "pages/train-*"), ("lines", "test", "lines/*")]
    header = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n" for name, split, path in configs
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{header}---\n")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return folder


def test_a_data_set_in_the_layout_of_the_hub(tmp_path, quick, data_set, whole, documents_in, capsys):
    quick(f"hf:{data_set}/pages", "--output_dir", tmp_path / "out", "--val_tokens=9")
    assert documents_in(whole(tmp_path / "out")) == [f"Page {i} {j}." for i in range(2) for j in range(20)]
    quick(f"hf:{data_set}/pages:train", "--output_dir", tmp_path / "out", "--val_tokens=9")
    assert capsys.readouterr().out.endswith("already there\n")
    quick(f"hf:{data_set}/lines:test", "--output_dir", tmp_path / "own", "--text_key=meta.body", "--val_tokens=0")
    assert documents_in(whole(tmp_path / "own")) == ["one", "two"] and "1 empty skipped" in capsys.readouterr().out


DATA_SET_ERRORS = {
    "": ("several configurations; it has pages, lines; name one, for example with /pages"),
    "/page": "no configuration page; did you mean pages",
    "/pages:trian": "no split trian; did you mean train",
    "/lines:test": "no column 'text'; it has meta; see --text_key",
    "x/pages": "no such folder",
}


@pytest.mark.parametrize("rest", DATA_SET_ERRORS)
def test_what_a_data_set_does_not_have_is_named(tmp_path, quick, data_set, rest):
    with pytest.raises(UserError, match=DATA_SET_ERRORS[rest]):
        quick(f"hf:{data_set}{rest}", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_revision_of_a_data_set_is_recorded_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data_sets, "_revision", lambda path, address: "abc123")
    pinned = "hf:owner/name@abc123/config:test"
    assert data_sets.pin("hf:owner/name/config:test", tmp_path) == pinned == data_sets.pin(pinned, tmp_path)
    assert data_sets.parse(pinned) == ("owner/name", "abc123", "config", "test")
    assert data_sets.parse("hf:wikitext") == ("wikitext", None, None, "train")
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": {"source": [{"name": pinned}]}}))
    monkeypatch.setattr(data_sets, "_revision", lambda path, address: "newer")
    assert data_sets.pin("hf:owner/name/config:test", tmp_path) == pinned
    assert data_sets.pin("hf:owner/name/config", tmp_path) == "hf:owner/name@newer/config"
    with pytest.raises(UserError, match="must be hf:OWNER/NAME"):
        data_sets.parse("hf:a/b/c/d")


def test_a_data_set_without_a_network_is_one_line(tmp_path):
    done = command("hf:owner/name", "--output_dir", tmp_path / "out", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: hf:owner/name: the hub does not have it or cannot be reached" in done.stderr


@pytest.mark.parametrize("name", ["a_val_b", "x_train_1"])
def test_names_that_hide_the_split_are_errors(tmp_path, quick, source, name):
    with pytest.raises(UserError, match="--name"):
        quick(source, "--output_dir", tmp_path / "out", f"--name={name}")
