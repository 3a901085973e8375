"""The fast encoder gives tiktoken's ids or is not used, and splitting a long document does not change its ids."""

import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.prepare import encoder, workers
from data.prepare.encoder import make_encoder, split_safely
from data.prepare.sources import WorkUnit
from data.prepare.workers import EncodeOptions, check_fast
from data.tokenizers.hf_json import GPT4_PATTERN
from data.tokenizers.tokenizer import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, Tokenizer
from util.errors import UserError

few = settings(max_examples=150, deadline=None)
unicode_text = st.text(st.characters(codec="utf-8"), max_size=200)
# Text that matters to the patterns: runs of letters, digits, signs and kinds of spaces.
rough = [*"aé字1٣.'{ \t\r\n\u00a0\u3000\x1c\u2028", "'s", "  ", "\n\n", " a"]
rough_text = st.lists(st.sampled_from(rough), max_size=60).map("".join)


@pytest.fixture(scope="module")
def quick(tokenizer):
    encode, name = make_encoder(tokenizer)
    if name != "splintr":
        pytest.skip("splintr is not installed")
    return encode


@pytest.fixture(scope="module", params=[CL100K_PATTERN, GPT4_PATTERN], ids=["cl100k", "gpt4"])
def cl100k(request, tokenizer):
    return replace(tokenizer, name="other", pattern=request.param)


@few
@given(text=unicode_text | rough_text)
def test_the_fast_encoder_gives_tiktokens_ids(tokenizer, quick, text):
    ids = quick(text)
    assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode(text)


def test_every_character_alone_and_in_a_word(tokenizer, quick):
    for start in range(0, 0x30000, 0x1000):
        text = "".join(f" a{chr(i)}{chr(i)} " for i in range(start, start + 0x1000) if not 0xD800 <= i < 0xE000)
        assert quick(text).tolist() == tokenizer.encode(text), hex(start)


class OffByOne:
    """A fast encoder that gives wrong ids for text with a z."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text):
        return np.array(self.tokenizer.encode(text), np.uint32) + ("z" in text)


def test_an_encoder_that_differs_on_the_sample_is_not_used(tokenizer, monkeypatch):
    monkeypatch.setattr(encoder, "SAMPLE", ["abc"])
    monkeypatch.setattr(encoder, "_splintr", OffByOne)
    assert make_encoder(tokenizer)[1] == "splintr"
    encode, name = make_encoder(tokenizer, ["fine", "fuzzy"])
    assert name == "tiktoken" and encode("fuzzy").tolist() == tokenizer.encode("fuzzy")


@pytest.mark.parametrize("texts, fast", [(["ab", "cd", "ef"], True), (["ab", "zz", "ef"], False)])
def test_the_units_text_is_in_the_sample_at_every_start(tmp_path, tokenizer, monkeypatch, texts, fast):
    monkeypatch.setattr(encoder, "SAMPLE", [])
    monkeypatch.setattr(encoder, "_splintr", OffByOne)
    units = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
        units.append(WorkUnit(str(tmp_path / f"{i}.txt"), 0, 2, 2))
    assert check_fast(EncodeOptions(), tokenizer, units) == EncodeOptions(fast=fast)
    assert check_fast(EncodeOptions(), tokenizer, []) == EncodeOptions()


def test_without_splintr_tiktoken_encodes(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "splintr", None)
    assert make_encoder(tokenizer)[1] == "tiktoken"


def test_the_built_in_sample_is_compared_first(tokenizer, monkeypatch):
    monkeypatch.setattr(encoder, "_splintr", lambda tokenizer: lambda text: np.zeros(len(text), np.uint32))
    assert make_encoder(tokenizer)[1] == "tiktoken"


@few
@given(text=rough_text | unicode_text, data=st.data())
@example(text="a\nb\nc\n\n d", data=None)
def test_segments_give_the_ids_of_the_whole_text(tokenizer, cl100k, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5))) if data else [1]
    blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    long = data.draw(st.integers(1, 40)) if data else 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "LONG", long)
        for tok in (tokenizer, cl100k):
            pieces = list(split_safely(blocks, tok.pattern))
            assert "".join(pieces) == text
            assert sum(map(tok.encode, pieces), []) == tok.encode(text)


@pytest.mark.parametrize("text", ["one two three " * 500, "eins\nzwei\n" * 500, " \n = Title = \n \n word" * 300])
@pytest.mark.parametrize("blocks", [1, 7])
def test_segments_are_not_much_longer_than_the_limit(tokenizer, monkeypatch, text, blocks):
    """The text is one block, as a line of .jsonl, or many blocks. WikiText has a space before every newline."""
    monkeypatch.setattr(encoder, "LONG", 100)
    size = len(text) // blocks + 1
    pieces = list(split_safely((text[i : i + size] for i in range(0, len(text), size)), tokenizer.pattern))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 2 * 100


def test_text_with_another_pattern_is_not_split(monkeypatch):
    monkeypatch.setattr(encoder, "LONG", 4)
    assert list(split_safely(["a b c ", "d e f"], r"\w+|\W+")) == ["a b c d e f"]


def test_splitting_a_document_does_not_change_its_byte_count(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoder, "LONG", 10)
    text = "naïve 東京 words and more words\n" * 20
    (tmp_path / "a.txt").write_text(text)
    unit = WorkUnit(str(tmp_path / "a.txt"), 0, 1, 1)
    found = workers.encode_unit(unit, tmp_path / "unit", workers.Encoder.of(EncodeOptions(fast=False), tokenizer))
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    assert np.fromfile(tmp_path / "unit", "<u2").tolist() == ids
    assert (found.tokens, found.documents, found.text_bytes) == (len(ids), 1, len(text.encode()))
    assert found.skipped == Counter() and isinstance(tokenizer, Tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [GPT2_PATTERN, *(pytest.param(p, marks=pytest.mark.slow) for p in (CL100K_PATTERN, O200K_PATTERN))],
    ids=["gpt2", "cl100k", "o200k"],
)
def test_every_unicode_character_is_split_alike(tokenizer, quick, pattern):
    """The two engines may have different versions of Unicode, and so different letters."""
    other = replace(tokenizer, name="other", pattern=pattern)
    encode, name = make_encoder(other)
    assert name == "splintr"
    # The planes with assigned characters, and a sample of the others.
    for start in [*range(0, 0x40000, 0x400), *range(0x40000, 0x110000, 0x4000)]:
        characters = [chr(i) for i in range(start, start + 0x400) if not 0xD800 <= i < 0xE000]
        text = "".join(f" a{c}'d!{c}'d 1{c} {c}x" for c in characters)
        assert encode(text).tolist() == other.encode(text), hex(start)


def test_other_patterns_use_tiktoken(tokenizer):
    assert make_encoder(replace(tokenizer, name="other", pattern=GPT4_PATTERN))[1] == "tiktoken"


def test_text_that_tiktoken_cannot_encode_is_one_line(tokenizer):
    with pytest.raises(UserError, match="tiktoken cannot encode"):
        make_encoder(tokenizer, fast=False)[0](" " * 5_000_000 + "x")
