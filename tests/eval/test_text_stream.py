"""Incremental decoding: equal to decoding all tokens, ended at a stop string, and never retracted."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.tokenizers.hf_json import _byte_letters
from data.tokenizers.load import load_tokenizer
from eval.text_stream import TextStream

END, UNKNOWN = 256, 260
few = settings(max_examples=200, deadline=None)
ids = st.lists(st.sampled_from([*b"ab\n", *"é東😀".encode(), 0xFF, END, UNKNOWN]), max_size=24)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer with a token per byte and end-of-text."""
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [{"id": END, "content": "<|endoftext|>", "special": True}]
    model = {"type": "BPE", "vocab": dict(_byte_letters()), "merges": []}
    file.write_text(json.dumps({"added_tokens": added, "pre_tokenizer": pre, "model": model}))
    return load_tokenizer(str(file))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A tokenizer like SentencePiece, which inserts a space before the text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    names = ["</s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a"]
    data = {
        "added_tokens": [{"id": 0, "content": "</s>", "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {n: i for i, n in enumerate(names)}, "merges": []},
    }
    file = tmp_path_factory.mktemp("spaced") / "tokenizer.json"
    file.write_text(json.dumps(data))
    return load_tokenizer(str(file))


def pieces(stream, tokens):
    return [*(stream.add(token) for token in tokens), stream.finish()]


def first_to_be_complete(text, stop):
    """Returns the length of the text before the first stop string, by adding one character at a time."""
    for end in range(1, len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(s):
                return end - len(s)
    return len(text)


@few
@given(tokens=ids)
@example(tokens=[*"東😀".encode()[:5], UNKNOWN, *"é".encode()])
def test_the_pieces_joined_equal_the_decoded_text(tokenizer, tokens):
    assert "".join(pieces(TextStream(tokenizer, [], [], True), tokens)) == tokenizer.decode(tokens)


@few
@given(tokens=ids, stop=st.lists(st.text("ab\né�", min_size=1, max_size=4), max_size=3))
@example(tokens=[*b"aab"], stop=["ab", "aaa"])  # the start of one stop string becomes another one
@example(tokens=[*b"abab\n"], stop=["abab\n", "bab"])
@example(tokens=[0xC3], stop=["�"])
def test_text_ends_before_the_first_stop_string_and_final_text_is_not_held_back(tokenizer, tokens, stop):
    stream, shown = TextStream(tokenizer, stop, [END], True), ""
    seen = tokens[: tokens.index(END)] if END in tokens else tokens
    whole = tokenizer.decode(seen)
    for n, token in enumerate(tokens, 1):
        shown += stream.add(token)
        text = tokenizer.decode(tokens[:n])
        if not stream.ended and not text.endswith("�"):
            held = text.removeprefix(shown)
            assert text.startswith(shown) and (not held or any(s.startswith(held) for s in stop))
    shown += stream.finish()
    assert shown == whole[: first_to_be_complete(whole, stop)]
    assert stream.ended and stream.add(ord("x")) == stream.finish() == ""


def test_a_character_is_returned_when_it_is_complete(tokenizer):
    stream = TextStream(tokenizer, [], [END], True)
    assert pieces(stream, "a東b".encode()) == ["a", "", "", "東", "b", ""]


def test_a_stop_string_of_several_tokens(tokenizer):
    stream = TextStream(tokenizer, ["\n\n"], [END], True)
    assert pieces(stream, b"a\nb\n\nc") == ["a", "", "\nb", "", "", "", ""]
    assert pieces(TextStream(tokenizer, ["\n\n"], [END], True), b"a\n") == ["a", "", "\n"]


def test_end_of_text_ends_the_stream(tokenizer):
    stream = TextStream(tokenizer, [], [END], True)
    assert pieces(stream, [*b"a", END, *b"b"]) == ["a", "", "", ""]
    assert "".join(pieces(TextStream(tokenizer, [], [], True), [*b"a", END])) == "a<|endoftext|>"


def test_an_empty_stop_string_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        TextStream(tokenizer, [""], [END], True)


def test_the_space_that_the_encoder_inserts_is_removed(spaced):
    tokens = spaced.encode("a a")
    assert "".join(pieces(TextStream(spaced, [], [0], True), tokens)) == spaced.decode(tokens) == "a a"
    assert "".join(pieces(TextStream(spaced, [], [0], False), tokens)) == " a a"
