"""llama2.c's tokenizer file: its ids equal llama2.c's algorithm, and an invalid file is one line."""

import json
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.fingerprint import same_tokenizer
from data.tokenizers.export import tokenizer_files
from data.tokenizers.llama2c import MAX_BYTES
from data.tokenizers.load import load_tokenizer
from util.errors import UserError

few = settings(max_examples=60, deadline=None)
FIRST = ["<unk>", "\n<s>\n", "\n</s>\n", *[f"<0x{b:02X}>" for b in range(256)]]
LEARNED = [" t", "he", " the", " a", "ab", "aba", "abab", " ", "t", "h", "e", "a", "b", "c", "é", "xyz", "\n"]


def pack(pieces, scores=None, longest=None):
    """Returns the bytes of llama2.c's file, as its tokenizer.py writes them."""
    coded = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    scores = scores or [min(0.0, len(FIRST) - float(i)) for i in range(len(pieces))]
    body = b"".join(struct.pack("<fi", s, len(c)) + c for s, c in zip(scores, coded, strict=True))
    return struct.pack("<i", longest or max(map(len, coded))) + body


def llama2c(pieces, scores, text):
    """run.c's encode() without <s>: characters or bytes, then merges of the best pair, leftmost first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = [ids[" "]] if text else []
    for c in text:
        tokens += [ids[c]] if c in ids else [b + 3 for b in c.encode()]
    while True:
        best = None
        for at in range(len(tokens) - 1):
            i = ids.get(pieces[tokens[at]] + pieces[tokens[at + 1]])
            if i is not None and (best is None or scores[i] > best[0]):
                best = scores[i], i, at
        if best is None:
            return tokens
        tokens[best[2] : best[2] + 2] = [best[1]]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama2c") / "tok276.bin"
    path.write_bytes(pack(FIRST + LEARNED))
    return path


@pytest.fixture(scope="module")
def stories(file):
    return load_tokenizer(str(file))


def test_names_sizes_and_special_tokens(stories):
    assert (stories.vocab_size, stories.prefix, stories.end_of_text) == (276, [1], 1)
    assert stories.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert stories.encode("the abab") == [261, 262, 271, 263]
    assert stories.byte_lengths(276)[[3, 259, 261, 273]].tolist() == [1, 2, 4, 2]


@few
@given(text=st.text(st.sampled_from("the abcé字\n<s>")) | st.text(st.characters(codec="utf-8", exclude_characters="▁")))
@example(text=" the ababa\n\n  xyz <s> </s> <0x41> ")
def test_the_ids_equal_llama2cs(stories, text):
    pieces = FIRST + LEARNED
    ids = stories.encode(text)
    assert ids == llama2c(pieces, [-float(i) for i in range(len(pieces))], text)
    assert stories.decode(ids) == text


@few
@given(words=st.lists(st.text("ab ", min_size=2, max_size=5), unique=True, max_size=8), data=st.data())
def test_any_pieces_in_any_order(tmp_path_factory, words, data):
    """Includes pieces that merging cannot make, and pieces whose parts have a lower score."""
    pieces = [*FIRST, *words, "a", "b", " "]
    order = data.draw(st.permutations(range(len(pieces))))
    scores = [float(i) for i in order]
    path = tmp_path_factory.mktemp("any") / "tok.bin"
    path.write_bytes(pack(pieces, scores))
    tokenizer = load_tokenizer(str(path))
    for text in data.draw(st.lists(st.text("ab ", max_size=14), min_size=5, max_size=10)):
        assert tokenizer.encode(text) == llama2c(pieces, scores, text), (words, scores[259:], text)


def test_runs_of_spaces_with_one_score_are_merged_as_by_llama2c(tmp_path):
    """Llama's file has runs of 1 to 16 spaces, in this order of ids and all with the score -1e9."""
    runs = [" " * n for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15)]
    pieces = [*FIRST, *runs, " t", "he", " the", "t", "h", "e", " "]
    scores = [*[0.0] * 259, *[-1e9] * 15, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -1e9]
    (tmp_path / "tokenizer.bin").write_bytes(pack(pieces, scores))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.bin"))
    for text in (" " * n + end for n in range(50) for end in ("", "the", "\n")):
        assert tokenizer.encode(text) == llama2c(pieces, scores, text), text


@few
@given(words=st.lists(st.text("ab ", min_size=2, max_size=4), unique=True, max_size=6), data=st.data())
def test_pieces_with_one_score_are_merged_as_by_llama2c_or_refused(tmp_path_factory, words, data):
    pieces = [*FIRST, *words, "a", "b", " "]
    scores = [0.0] * 259 + [float(data.draw(st.integers(0, 2))) for _ in pieces[259:]]
    path = tmp_path_factory.mktemp("tied") / "tok.bin"
    path.write_bytes(pack(pieces, scores))
    try:
        tokenizer = load_tokenizer(str(path))
    except UserError as error:
        assert "have one score, and so no order in" in str(error)
        return
    for text in data.draw(st.lists(st.text("ab ", max_size=14), min_size=5, max_size=10)):
        assert tokenizer.encode(text) == llama2c(pieces, scores, text), (words, scores[259:], text)


def test_a_copy_has_an_equal_fingerprint(stories, tmp_path):
    for name, content in stories.files.items():
        (tmp_path / name).write_bytes(content)
    copy = load_tokenizer(str(tmp_path))
    assert same_tokenizer(copy.fingerprint, stories.fingerprint) and copy.encode("the é") == stories.encode("the é")
    assert (copy.end_of_text, copy.prefix) == (1, [1])


def test_transformers_puts_the_prefix_before_equal_ids(stories, tmp_path):
    from transformers import AutoTokenizer

    files = tokenizer_files(stories, 512)
    assert files["tokenizer.json"] == stories.files["tokenizer.json"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("", "the abab", " a  the\n字é"):
        ids = stories.encode(text)
        assert theirs.encode(text) == [1, *ids] and theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (1, 1, 0, 276)
    assert (theirs.model_max_length, json.loads(files["tokenizer_config.json"])["eos_token"]) == (512, "<s>")


GOOD = pack(FIRST + LEARNED)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "does not start with the length of its longest piece"),
        (b"\x07\x00", "does not start with"),
        (struct.pack("<i", -1) + GOOD[4:], "does not start with"),
        (struct.pack("<3i", 20240520, 1, 100), "does not start with"),  # a shard of tokens
        (struct.pack("<i", 3) + GOOD[4:], "piece 0 at byte 4 has length 5, but the longest should have 3"),
        (GOOD[:-1], "piece 275 at byte 3,787 is cut off"),
        (GOOD[:7], "piece 0 at byte 4 is cut off"),
        (GOOD[:4], "it ends before <unk>"),
        (pack(FIRST[:100]), "it ends before <0x61>"),
        (GOOD + b"\0", "piece 276 .* is cut off"),
        (GOOD + struct.pack("<fi", 0, -5), "has length -5"),
        (GOOD + struct.pack("<fi", 0, 2**31 - 1), "has length 2147483647"),
        (GOOD + struct.pack("<fi", 0, 0), "has length 0"),
        (pack([*FIRST, *LEARNED, "ab"]), "'ab', occurs twice"),
        (pack([*FIRST, *LEARNED, "<s>"]), "a learned piece has the name of a special token or byte"),
        (pack([*FIRST, *LEARNED, b"\xff\xfe"]), "piece 276 .* is not UTF-8"),
        (pack([*FIRST, "a", "b"]), "no piece for the space"),
        (pack([*FIRST, *LEARNED, "▁a"]), "or one with ▁"),
        (pack(["<pad>", *FIRST, *LEARNED]), "id 0 is '<pad>', not <unk>"),
        (pack([*FIRST[:3], "x", *FIRST[4:], *LEARNED]), "id 3 is 'x', not <0x00>"),
        (pack(FIRST + LEARNED, [0.0] * 276), "pieces .ab. and .aba. have one score, and so no order in .ababa."),
        (pack(FIRST + LEARNED, [float("nan")] * 276), "has score nan"),
    ],
)
def test_an_invalid_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(path))
    assert "tok.bin: not llama2.c's tokenizer file, or damaged" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "tok.bin", "wb") as f:
        f.write(GOOD)
        f.truncate(2**40)
    with pytest.raises(UserError, match=f"more than {MAX_BYTES:,} bytes"):
        load_tokenizer(str(tmp_path / "tok.bin"))


@few
@given(at=st.integers(0, len(GOOD) - 1), patch=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_a_damaged_file_is_a_tokenizer_or_one_line(tmp_path_factory, at, patch, cut):
    path = tmp_path_factory.mktemp("damaged") / "tok.bin"
    path.write_bytes(GOOD[:at] + patch + (b"" if cut else GOOD[at + len(patch) :]))
    try:
        tokenizer = load_tokenizer(str(path))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
