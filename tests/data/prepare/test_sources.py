"""Files to documents: each document occurs once for any division into units, and errors are one line."""

import bz2
import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.prepare import inputs, parquet, sources, text_files, workers
from data.prepare.inputs import COMPRESSED, KINDS, ReadOptions, file_fingerprint, input_files
from data.prepare.sources import WorkUnit, documents, plan
from util.errors import UserError

few = settings(max_examples=100, deadline=None)
SUFFIXES = [*KINDS, *(kind + packing for kind in (".txt", ".jsonl", ".json") for packing in COMPRESSED)]
OPTIONS = ReadOptions()
DOCUMENTS = ["First Citizen:\nBefore we proceed", "naïve 東京 👩‍👩‍👧", "say <|endoftext|> aloud", "  spaces \n\n", "a"]
unicode_text = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)


def read(paths, text_key="text", **options):
    """Returns all documents of the files, unit by unit, and the counts of skipped ones."""
    skipped, options = Counter(), ReadOptions(text_key, **options)
    units = plan([str(path) for path in paths], options)
    return ["".join(d.text) for unit in units for d in documents(unit, options, skipped)], skipped


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        read(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Finding files


def test_names_globs_and_folders_give_each_file_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.jsonl", "sub/deep/c.txt.gz", "sub/d.parquet", "sub/e.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert input_files(["sub"]) == ["sub/d.parquet", "sub/deep/c.txt.gz"]
    assert input_files(["b.txt", "*.txt", "./b.txt", "**/*.txt*", "."]) == [
        "b.txt", "sub/deep/c.txt.gz", "a.jsonl", "sub/d.parquet",
    ]  # fmt: skip
    assert input_files(["hf://x/y.parquet"]) == ["hf://x/y.parquet"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with a hidden file, a hidden folder, and links to a file and a folder elsewhere."""
    for name in ("in/a.txt", "in/._a.txt", "in/.DS_Store", "in/.checkpoints/a.txt", "in/sub/b.txt", "far/more/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/linked").symlink_to(tmp_path / "far")
    (tmp_path / "in/sub/again.txt").symlink_to("../a.txt")
    monkeypatch.chdir(tmp_path)


ALL = ["in/a.txt", "in/linked/more/c.txt", "in/sub/b.txt"]


@pytest.mark.parametrize("pattern", ["in", "in/*", "in/**/*.txt", "./in/"])
def test_links_are_followed_and_hidden_files_are_skipped(library, pattern, capsys):
    assert sorted(input_files([pattern])) == ALL
    out = capsys.readouterr().out
    assert out.startswith("hidden files or folders skipped, ") and "in/._a.txt" in out


def test_hidden_files_are_counted_once_and_read_if_they_are_named(library, capsys):
    input_files(["in", "in/*"])
    assert capsys.readouterr().out == "hidden files or folders skipped, 2: in/.checkpoints, in/._a.txt\n"
    assert input_files(["in/.*.txt", "in/.checkpoints"]) == ["in/._a.txt", "in/.checkpoints/a.txt"]
    assert not capsys.readouterr().out


def test_files_that_describe_data_are_skipped_in_folders_and_counted(tmp_path, capsys):
    for name in ("a.txt", "b.json", "README.md", "shards/manifest.json", "tok/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    text = [f"{tmp_path}/a.txt", f"{tmp_path}/b.json"]
    assert input_files([str(tmp_path)]) == text
    names = ("README.md", "shards/manifest.json", "tok/tokenizer.json")
    skipped = ", ".join(f"{tmp_path}/{name}" for name in names)
    assert capsys.readouterr().out == f"files that describe data skipped, 3: {skipped}\n"
    with pytest.raises(UserError, match="shards: no text in this folder"):
        input_files([f"{tmp_path}/shards"])
    assert input_files([str(tmp_path), f"{tmp_path}/README.md"]) == [*text, f"{tmp_path}/README.md"]
    assert input_files([f"{tmp_path}/tok"], "jsonl") == [f"{tmp_path}/tok/tokenizer.json"]


def test_a_file_that_two_paths_name_is_read_once(library):
    assert input_files(["far", "in/sub/again.txt", "in"]) == ["far/more/c.txt", "in/sub/again.txt", "in/sub/b.txt"]


@pytest.mark.parametrize("pattern", ["in", "in/**/*.txt", "in/*"])
@pytest.mark.parametrize("link", ["in/sub/loop", "far/loop"])
def test_a_loop_of_links_is_an_error(library, pattern, link):
    Path(link).symlink_to(Path("in").resolve())
    with pytest.raises(UserError, match="loop: a link to .*/in, which contains it"):
        input_files([pattern])


@pytest.mark.parametrize("pattern", ["in", "in/*", "in/lost.txt"])
def test_a_link_to_a_missing_file_is_an_error(library, pattern):
    Path("in/lost.txt").symlink_to("nowhere.txt")
    with pytest.raises(UserError, match="in/lost.txt: a link to a file that does not exist .nowhere.txt."):
        input_files([pattern])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(library):
    Path("in/sub").chmod(0)
    with pytest.raises(UserError, match="in/sub: Permission denied"):
        input_files(["in"])
    Path("in/sub").chmod(0o755)


@pytest.mark.parametrize("name", ["v[2]", "a*b", "[x"])
def test_folders_whose_names_look_like_globs_are_taken_literally(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in (name, "v2", "aXb"):
        Path(folder).mkdir()
        (Path(folder) / "[1].txt").write_text(folder)
    found = [f"{name}/[1].txt"]
    for pattern in (name, f"{name}/*", f"{name}/**/*.txt", f"{name}/[[]1].txt", f"{name}/[1].t*"):
        assert input_files([pattern]) == found
    assert input_files(["v?/*.txt", "a?b"])[0] == "v2/[1].txt"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_git_lfs_pointer_is_an_error(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_bytes(pointer)
    for skip_bad in (False, True):
        assert "a Git LFS pointer" in refusal([tmp_path / name], skip_bad=skip_bad)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("x.txt", "x.txt: no such file"),
        ("*.txt", "*.txt: no such file"),
        ("e.csv", "e.csv: only .txt, .md, .jsonl"),
        ("plain", "plain: only .txt"),
        ("empty", "empty: no text in this folder"),
    ],
)
def test_missing_and_unsupported_files_are_errors(tmp_path, monkeypatch, pattern, message):
    (tmp_path / "e.csv").touch()
    (tmp_path / "plain").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        input_files([pattern])
    assert str(caught.value).startswith(message)


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "part[1].txt").write_text("one")
    assert read(input_files([str(tmp_path / "part[1].txt")]))[0] == ["one"]


def test_a_file_is_identified_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "HASH_BLOCKS", 16)
    path = tmp_path / "a.txt"
    for size in (0, 100, 2**22 + 7):
        content = random.Random(size).randbytes(size)
        path.write_bytes(content)
        assert file_fingerprint(str(path)) == file_fingerprint(str(path))
        assert (file_fingerprint(str(path))["name"], file_fingerprint(str(path))["size"]) == ("a.txt", size)
        for at in (0, size - 1) if size else ():
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            changed = file_fingerprint(str(path))
            path.write_bytes(content)
            assert changed != file_fingerprint(str(path))


# Documents


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("unit_bytes", [1, 2**22])
def test_documents_of_every_kind_of_file(tmp_path, monkeypatch, write_input, suffix, unit_bytes):
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    pattern = write_input(tmp_path, suffix, DOCUMENTS, key="body")
    assert read(input_files([str(pattern)]), "body") == (DOCUMENTS, Counter())


@few
@given(texts=st.lists(unicode_text, max_size=30), unit_bytes=st.integers(1, 300), blanks=st.lists(st.integers(0, 29)))
@example(texts=["a"], unit_bytes=1, blanks=[0])
@example(texts=["", "x" * 200, "b"], unit_bytes=7, blanks=[])
def test_units_cover_every_line_once(tmp_path_factory, texts, unit_bytes, blanks):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [json.dumps({"text": t}, ensure_ascii=False) + "\n" + "  \n" * (i in blanks) for i, t in enumerate(texts)]
    path.write_text("".join(lines))
    if blanks:
        path.write_text("".join(lines).rstrip("\n"))  # the last line may have no end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit_bytes)
        found, skipped = read([path])
        units = plan([str(path)], OPTIONS)
    empty = texts.count("") if path.stat().st_size else 1  # the file itself
    assert found == [t for t in texts if t] and skipped.total() == empty
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    assert sum(unit.size for unit in units) == path.stat().st_size


@few
@given(
    texts=st.lists(unicode_text, max_size=40),
    groups=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    unit_bytes=st.integers(1, 400),
    splits=st.integers(1, 16),
)
def test_units_cover_every_row_once(tmp_path_factory, texts, groups, unit_bytes, splits):
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    table = pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    with pq.ParquetWriter(path, table.schema) as f:
        at, k = 0, 0
        while at < len(texts):
            f.write_table(table.slice(at, groups[k % len(groups)]))
            at, k = at + groups[k % len(groups)], k + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit_bytes)
        patch.setattr(sources, "MAX_SPLITS", splits)
        found, skipped = read([path])
        units = plan([str(path)], OPTIONS)
    assert found == [t for t in texts if t] and skipped.total() == texts.count("")
    rows = [row for unit in units for row in range(unit.start, unit.stop)]
    assert rows == list(range(len(texts)))


def test_large_row_groups_are_split_and_small_ones_merged(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": [f"{i:0100d}" for i in range(1000)]}), tmp_path / "large.parquet")
    pq.write_table(
        pa.table({"text": [f"{i:0100d}" for i in range(1000)]}), tmp_path / "small.parquet", row_group_size=10
    )
    monkeypatch.setattr(sources, "UNIT_BYTES", 10_000)
    for name in ("large", "small"):
        assert 8 <= len(plan([str(tmp_path / f"{name}.parquet")], OPTIONS)) <= 20, name


def test_a_line_longer_than_many_units_is_read_once(tmp_path, monkeypatch):
    """Otherwise a long line would cost its length times the number of its units."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 100_000}) + '\n{"text": "last"}\n')
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    taken = Counter()

    class Counting:
        def __init__(self, path):
            self.f = open(path, "rb")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.f.close()

        def read(self, size):
            return self.f.read(size)

        def seek(self, at):
            self.f.seek(at)

        def peek(self, size):
            return self.f.peek(size)

        def readline(self, size=-1):
            line = self.f.readline(size)
            taken["bytes"] += len(line)
            return line

    monkeypatch.setattr(text_files, "open_binary", Counting)
    assert [len(text) for text in read([tmp_path / "a.jsonl"])[0]] == [100_000, 4]
    assert taken["bytes"] < 3 * 100_000


def test_null_and_empty_documents_are_counted_and_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n   \n{"text": "one"}\n{"text": null}\n')
    pq.write_table(pa.table({"text": [None, "two", ""]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.jsonl").touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert read(sorted(tmp_path.iterdir())) == (["one", "two"], Counter(null=2, empty=4))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_type_of_text_column_is_read(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array([*DOCUMENTS, None]).cast(kind)}), tmp_path / "a.parquet")
    assert read([tmp_path / "a.parquet"]) == (DOCUMENTS, Counter(null=1))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
@pytest.mark.parametrize("block", [1, 5, 2**22])
def test_a_text_file_is_one_document_in_blocks(tmp_path, monkeypatch, pack, suffix, block):
    monkeypatch.setattr(text_files, "BLOCK", block)
    text = "naïve\r\n東京 👩‍👩‍👧\rend\n"
    (tmp_path / f"a{suffix}").write_bytes(pack(text.encode(), suffix))
    assert read([tmp_path / f"a{suffix}"])[0] == ["naïve\n東京 👩‍👩‍👧\nend\n"]


def test_only_the_suffix_decides_the_kind_of_a_file(tmp_path):
    (tmp_path / "notes.jsonl.txt").write_text("no JSON")
    assert read([tmp_path / "notes.jsonl.txt"])[0] == ["no JSON"]


def test_half_a_surrogate_pair_is_converted_as_in_tiktoken(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83db \ud83d\udc4d"}')
    (text,) = read([tmp_path / "a.jsonl"])[0]
    assert text == "a�b 👍" and tokenizer.encode("a\ud83db \ud83d\udc4d") == tokenizer.encode(text)


def test_compressed_files_with_several_members_are_read(tmp_path, pack):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(pack(json.dumps({"text": t}).encode() + b"\n", suffix) for t in DOCUMENTS))
        assert read([path])[0] == DOCUMENTS


def test_suffixes_in_capitals_are_read(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "B.JSON.GZ").write_bytes(gzip.compress(b'{"text": "two"}'))
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "C.Parquet")
    assert read(input_files([str(tmp_path)]))[0] == ["one", "two", "three"]


def test_the_format_of_other_files_can_be_given(tmp_path):
    (tmp_path / "a.rst").write_text("one")
    (tmp_path / "b.log.gz").write_bytes(gzip.compress(b"two"))
    assert read(input_files([str(tmp_path)], "txt"), format="txt")[0] == ["one", "two"]
    (tmp_path / "c.data").write_text('{"text": "three"}\n')
    assert read(input_files([f"{tmp_path}/c.data"], "jsonl"), format="jsonl")[0] == ["three"]
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "d")
    assert read(input_files([f"{tmp_path}/d"], "parquet"), format="parquet")[0] == ["four"]


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl"])
def test_a_json_file_may_hold_a_list(tmp_path, pack, suffix, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)
    rows = [{"text": text} for text in (*DOCUMENTS, None, "")]
    content = b"\xef\xbb\xbf\n " + json.dumps(rows, indent=1).encode()
    (tmp_path / f"a{suffix}").write_bytes(pack(content, suffix))
    assert read([tmp_path / f"a{suffix}"]) == (DOCUMENTS, Counter(null=1, empty=1))


def test_byte_order_marks_and_line_ends_of_windows_are_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n{"text": "four"}\r\n')
    assert read(input_files([str(tmp_path)])) == (["one\ntwo\n", "three", "four"], Counter())


def test_a_key_with_a_dot_names_a_field_of_an_object(tmp_path):
    rows = [{"meta": {"text": "one"}}, {"meta": None}, {"meta.text": "two", "meta": {}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read([tmp_path / "a.jsonl"], "meta.text") == (["one", "two"], Counter(null=1))
    (tmp_path / "a.jsonl").write_text('{"meta": {"txt": "one"}}')
    assert "line 1 is not a JSON object with a field 'meta.text'" in refusal([tmp_path / "a.jsonl"], "meta.text")


KINDS_OF_TEXT = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]


@pytest.mark.parametrize("kind", [*KINDS_OF_TEXT, pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_columns_of_every_kind_of_text(tmp_path, kind):
    plain = pa.array([*DOCUMENTS, None, ""])
    texts = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    pq.write_table(pa.table({"n": range(7), "text": texts}), tmp_path / "a.parquet")
    assert read([tmp_path / "a.parquet"]) == (DOCUMENTS, Counter(null=1, empty=1))
    rows = pa.array([{"x": {"n": 1, "text": text}} for text in plain.to_pylist()] + [{"x": None}, None])
    if kind == pa.string():
        pq.write_table(pa.table({"meta": rows, "text": [1] * 9}), tmp_path / "b.parquet", row_group_size=2)
        assert read([tmp_path / "b.parquet"], "meta.x.text") == (DOCUMENTS, Counter(null=3, empty=1))
        assert "no column 'meta.x.txt'; it has meta, text" in refusal([tmp_path / "b.parquet"], "meta.x.txt")
        assert "column 'meta.x' holds struct<" in refusal([tmp_path / "b.parquet"], "meta.x")


def test_bytes_that_are_not_utf8_are_bad(tmp_path):
    pq.write_table(pa.table({"text": [b"fine", b"caf\xe9"]}), tmp_path / "a.parquet")
    assert "a.parquet: row 2 is not UTF-8 text" in refusal([tmp_path / "a.parquet"])
    assert read([tmp_path / "a.parquet"], skip_bad=True) == (["fine"], Counter(bad=1))


# Separators

EOT = "<|endoftext|>"


@pytest.mark.parametrize("block", [1, 2, 5, 14, 40, 2**22])
@pytest.mark.parametrize(
    "text, expected",
    [
        (f"one\n{EOT}\ntwo\n{EOT}\n", ["one", "two"]),
        (f"{EOT}\n\none.\n\n{EOT}\n  two\n\nthree\n", ["one.", "  two\n\nthree"]),
        (f"one.{EOT}two{EOT}{EOT}\r\n", ["one.", "two"]),
        (f"one {EOT}\ntwo", ["one ", "two"]),
        (f"say {EOT} aloud, as `{EOT}`, not ({EOT})!\n", None),
        (f"say {EOT} aloud\n{EOT}\n\n<|endof|>\n", [f"say {EOT} aloud", "<|endof|>"]),
        ("no separator\n\n", None),
    ],
)
def test_a_text_is_divided_at_end_of_text_markers(tmp_path, monkeypatch, block, text, expected):
    monkeypatch.setattr(text_files, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(text.encode())
    found, counts = read([tmp_path / "a.txt"])
    assert found == (expected or [text])
    plain = text.replace("\r\n", "\n")
    assert bool(counts) == bool(expected)
    assert read([tmp_path / "a.txt"], document_separator="none") == ([plain], Counter())


@few
@given(
    documents=st.lists(st.text("ab \n-", max_size=12), max_size=8),
    separator=st.sampled_from(["---", "-", "aba"]),
    block=st.integers(1, 12),
)
def test_a_separator_of_the_user_divides_at_every_place(documents, separator, block):
    text = separator.join(documents)
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    counts = Counter()
    found = ["".join(parts) for parts in text_files.split_documents(blocks, separator, counts)]
    first, *others = text.split(separator)
    expected = [first.rstrip("\n") if others else first, *(part.strip("\n") for part in others)]
    assert found == [part for part in expected if part] and counts.total() == len(others)


def test_a_document_may_be_left_before_its_end(tmp_path, monkeypatch):
    """The sample that is compared between encoders takes only the beginning of each document."""
    monkeypatch.setattr(text_files, "BLOCK", 3)
    (tmp_path / "a.txt").write_text(f"first\n{EOT}\nsecond")
    (unit,) = plan([str(tmp_path / "a.txt")], OPTIONS)
    assert [next(iter(d.text))[:1] for d in documents(unit, OPTIONS, Counter())] == ["f", "s"]


# Damaged input

GOOD = b'{"text": "fine"}\n'
TABLE = pa.table({"text": [f"document {i} " * 50 for i in range(400)]})


def column(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def bytes_of(content):
    return lambda path: path.write_bytes(content)


MISTAKES = {
    "bad line": ("a.jsonl", bytes_of(GOOD + GOOD + b'{"text": '), "line 3 is not JSON"),
    "no object": ("a.jsonl", bytes_of(GOOD + b'["text"]'), "line 2 is not a JSON object"),
    "bad list": ("a.json", bytes_of(b'[{"text": "fine"}, {"text"'), "a list that is not JSON"),
    "bad item": ("a.json", bytes_of(b'[{"text": "fine"}, {"txt": "x"}]'), "item 2 is not a JSON object with a field"),
    "no field": (
        "a.jsonl",
        bytes_of(b'{"txt": "x"}'),
        "line 1 is not a JSON object with a field 'text' (see --text_key)",
    ),
    "no text": ("a.jsonl", bytes_of(GOOD + b'{"text": 3}'), "line 2: field 'text' is not text"),
    "nested": ("a.jsonl", bytes_of(b'{"text":' * 10**5), "line 1 is not JSON"),
    "bytes": ("a.jsonl", bytes_of(GOOD + b'{"text": "\xff"}\n'), "line 2 is not UTF-8 text"),
    "gz bytes": ("a.jsonl.gz", bytes_of(gzip.compress(GOOD + b'{"text": "\xff"}\n')), "line 2 is not UTF-8 text"),
    "txt bytes": ("a.txt", bytes_of(b"caf\xe9 x"), "not UTF-8 text (invalid continuation byte at byte 3)"),
    "txt cut": ("a.txt", bytes_of("é".encode()[:1]), "not UTF-8 text (unexpected end of data at byte 0)"),
    "txt.zst bytes": ("a.txt.zst", bytes_of(pa.compress(b"a\xff", "zstd", asbytes=True)), "not UTF-8 text"),
    "bz2 cut": ("a.txt.bz2", bytes_of(bz2.compress(b"some text")[:-5]), "damaged compressed file"),
    "no xz": ("a.jsonl.xz", bytes_of(b"plain"), "damaged compressed file"),
    "no gz": ("a.txt.gz", bytes_of(b"plain"), "damaged compressed file"),
    "gz cut": ("a.jsonl.gz", bytes_of(gzip.compress(GOOD * 99)[:-9]), "damaged compressed file"),
    "no zst": ("a.jsonl.zst", bytes_of(b"plain text, that is"), "a.jsonl.zst: "),
    "no parquet": ("a.parquet", bytes_of(b"PAR1 not"), "not a readable parquet file"),
    "empty parquet": ("a.parquet", bytes_of(b""), "not a readable parquet file"),
    "no column": ("a.parquet", column(id=[1], body=["x"]), "no column 'text'; it has id, body; see --text_key"),
    "number column": ("a.parquet", column(text=[1, 2]), "column 'text' holds int64, not text"),
    "list column": ("a.parquet", column(text=[["a"], ["b"]]), "column 'text' holds list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_damaged_input_is_one_line(tmp_path, mistake):
    name, make, message = MISTAKES[mistake]
    make(tmp_path / name)
    said = refusal([tmp_path / name])
    assert said.startswith(f"{tmp_path / name}: ") and message in said
    assert mistake.endswith("column") or said.count("; repair it, or skip damaged text with --skip_bad") == 1


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if not name.endswith("column")])
def test_damaged_text_can_be_skipped_and_is_counted(tmp_path, mistake):
    name, make, _ = MISTAKES[mistake]
    make(tmp_path / name)
    found, skipped = read([tmp_path / name], skip_bad=True)
    assert set(found) <= {"fine"} and skipped == Counter(bad=1)


def test_a_row_that_is_not_utf8_is_an_error(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9s", b"too"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert "row 2 is not UTF-8 text (invalid continuation byte at byte 3)" in refusal([tmp_path / "a.parquet"])
    assert read([tmp_path / "a.parquet"], skip_bad=True) == (["fine", "too"], Counter(bad=1))


def test_skipping_bad_lines_does_not_count_line_numbers(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes((GOOD + b"oops\n") * 50)
    monkeypatch.setattr(text_files, "line_name", None)
    assert read([tmp_path / "a.jsonl"], skip_bad=True) == (["fine"] * 50, Counter(bad=50))


@pytest.mark.parametrize("block", [1, 20, 2**22])
def test_line_numbers_count_from_the_start_of_the_file(tmp_path, monkeypatch, block):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 30 + b"oops\n" + GOOD * 9)
    monkeypatch.setattr(sources, "UNIT_BYTES", 50)
    monkeypatch.setattr(text_files, "BLOCK", block)
    assert "a.jsonl: line 31 is not" in refusal([tmp_path / "a.jsonl"])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".jsonl.zst", ".txt.gz"])
def test_damage_anywhere_is_one_line_or_other_text(tmp_path, pack, suffix):
    """Random bytes anywhere in the file give text or a UserError, never a traceback."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(TABLE, path, row_group_size=100, use_dictionary=False)
    else:
        path.write_bytes(
            pack("".join(json.dumps({"text": t}) + "\n" for t in TABLE["text"].to_pylist()).encode(), suffix)
        )
    sound, rng, refused = path.read_bytes(), random.Random(3), 0
    for _ in range(60):
        at, length = rng.randrange(len(sound)), rng.choice([1, 8, 64])
        path.write_bytes((sound[:at] + rng.randbytes(length) + sound[at + length :])[: len(sound)])
        try:
            read([path])
        except UserError as e:
            refused += 1
            assert str(e).startswith(f"{path}: ")
    assert refused > 20


def test_damage_in_the_middle_of_the_data_pages(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=100, use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset + 2500  # after the statistics
    content[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(content)
    assert refusal([path]).startswith(f"{path}: not a readable parquet file")


def test_damage_that_reads_as_other_text_is_found_by_the_checksum(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, use_dictionary=False, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"document 250", b"document 520"))
    assert "not a readable parquet file (could not verify page integrity" in refusal([path])


def test_the_rest_of_a_row_group_after_a_damaged_page_can_be_skipped(tmp_path):
    path = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True, "data_page_size": 500}
    pq.write_table(TABLE, path, row_group_size=100, **options, write_batch_size=1)
    path.write_bytes(path.read_bytes().replace(b"document 250", b"document 520"))
    found, skipped = read([path], skip_bad=True)
    texts = TABLE["text"].to_pylist()
    assert skipped == Counter(bad=1) and found == [t for t in texts if t in set(found)]
    assert set(texts[:200] + texts[300:]) <= set(found) and texts[250] not in found


def test_what_comes_before_the_end_of_a_truncated_file_is_kept(tmp_path):
    lines = b"".join(b'{"text": "%s"}\n' % random.Random(i).randbytes(40).hex().encode() for i in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-1000])
    found, skipped = read([tmp_path / "a.jsonl.gz"], skip_bad=True)
    assert 1900 < len(found) < 2000 and skipped == Counter(bad=1)


def test_a_long_truncated_text_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK", 100)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(2000).hex().encode())[:-100])
    assert "a.txt.gz: damaged compressed file" in refusal([tmp_path / "a.txt.gz"])
    assert read([tmp_path / "a.txt.gz"], skip_bad=True) == ([], Counter(bad=1))


# Network


@pytest.fixture
def remote(monkeypatch):
    """A remote parquet file that fails to open `failures` times in a row."""
    import fsspec

    with fsspec.open("memory://far/a.parquet", "wb") as f:
        pq.write_table(TABLE, f)
    state, real = {"failures": 0}, fsspec.open

    def sometimes(*args, **options):
        if state["failures"]:
            state["failures"] -= 1
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(*args, **options)

    monkeypatch.setattr(fsspec, "open", sometimes)
    monkeypatch.setattr(sources, "FIRST_PAUSE", 0.0)
    parquet._remote_metadata.cache_clear()
    return state


def encoder_of(tokenizer):
    return workers.Encoder.of(workers.EncodeOptions(fast=False), tokenizer)


def test_a_network_error_is_retried(tmp_path, remote, tokenizer, monkeypatch):
    remote["failures"] = sources.TRIES - 1
    (unit,) = plan(["memory://far/a.parquet"], OPTIONS)
    assert unit == WorkUnit("memory://far/a.parquet", 0, 400, unit.size)
    monkeypatch.setattr(workers, "_encoder", encoder_of(tokenizer))
    remote["failures"] = sources.TRIES - 1
    assert workers._work(unit, tmp_path / "unit", False).documents == 400


def test_a_lasting_network_error_is_one_line(tmp_path, remote, tokenizer, monkeypatch):
    (unit,) = plan(["memory://far/a.parquet"], OPTIONS)
    monkeypatch.setattr(workers, "_encoder", encoder_of(tokenizer))
    remote["failures"] = 99
    with pytest.raises(UserError, match="far/a.parquet cannot be read .ConnectionResetError.*repeat the command"):
        workers._work(unit, tmp_path / "unit", False)
    assert remote["failures"] == 99 - sources.TRIES


def test_a_local_data_set_is_read_once_only(monkeypatch):
    monkeypatch.setattr(sources, "FIRST_PAUSE", 0.0)
    for path, tries in (("hf:./folder", 1), ("hf:/folder/x", 1), ("hf:~/x", 1), ("hf:owner/name", sources.TRIES)):
        calls = []
        with pytest.raises(UserError, match="cannot be read .OSError: damaged"):
            sources.retry(path, lambda calls=calls: calls.append(1) or (_ for _ in ()).throw(OSError("damaged")))
        assert len(calls) == tries


def test_the_paths_of_units_are_plain_strings(tmp_path):
    """They are sent to other processes and are not in a manifest."""
    (tmp_path / "a.txt").write_text("x")
    assert plan([str(tmp_path / "a.txt")], OPTIONS) == [WorkUnit(str(tmp_path / "a.txt"), 0, 1, 1)]
    assert Path(plan([str(tmp_path / "a.txt")], OPTIONS)[0].path).is_file()


def test_folders_that_a_glob_matches_are_read_too(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("in/a.txt", "in/sub/b.txt"):
        (tmp_path / name).write_text("x")
    quoted = input_files([f"{tmp_path}/in/*"])
    assert quoted == input_files([f"{tmp_path}/in/a.txt", f"{tmp_path}/in/sub"]) == input_files([f"{tmp_path}/in"])


def test_an_unknown_home_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        input_files(["~nobody-of-that-name/x.txt"])


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".parquet"])
def test_an_empty_file_is_counted(tmp_path, pack, suffix):
    (tmp_path / f"nil{suffix}").write_bytes(pack(b"", suffix))
    skipped = Counter()
    for unit in plan([str(tmp_path / f"nil{suffix}")], OPTIONS):
        assert not list(documents(unit, OPTIONS, skipped))
    assert skipped == {"empty": 1}


def test_few_long_rows_are_in_memory_at_a_time(tmp_path):
    pq.write_table(pa.table({"text": ["x" * 500_000] * 20}), tmp_path / "a.parquet", use_dictionary=False)
    pq.write_table(pa.table({"text": ["x"] * 5000}), tmp_path / "b.parquet", use_dictionary=False)
    rows = {}
    for name in "ab":
        file = pq.ParquetFile(tmp_path / f"{name}.parquet")
        rows[name] = parquet.rows_at_once(file.metadata.row_group(0), 0)
    assert rows == {"a": 2, "b": 1024}
