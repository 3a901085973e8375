"""Encoding of a context and its continuation, with a tokenizer that inserts a space before every text."""

from eval.encoding import continuation_encoder, encode_pair


def encode(text):
    """Encodes each word as its length, and inserts a space before the text as SentencePiece does."""
    return [len(word) for word in (" " + text).split(" ")[1:]]


def test_a_continuation_gets_no_second_space():
    assert continuation_encoder(encode)(" two words") == [3, 5]


def test_a_pair_is_split_where_the_context_ends():
    assert encode_pair("some context ", "more", encode) == ([4, 7], [4])
    assert encode_pair("some context", " more", encode) == ([4, 7], [4])
