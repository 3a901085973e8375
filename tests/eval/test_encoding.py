"""Encoding of prompts, and of a context and its continuation with a tokenizer that inserts a space before a text."""

from dataclasses import replace

from data.tokenizers.load import load_tokenizer
from eval.encoding import continuation_encoder, encode_pair, encode_prompt


def encode(text):
    """Encodes each word as its length, and inserts a space before the text as SentencePiece does."""
    return [len(word) for word in (" " + text).split(" ")[1:]]


def test_a_continuation_gets_no_second_space():
    assert continuation_encoder(encode)(" two words") == [3, 5]


def test_a_pair_is_split_where_the_context_ends():
    assert encode_pair("some context ", "more", encode) == ([4, 7], [4])
    assert encode_pair("some context", " more", encode) == ([4, 7], [4])


def test_a_prompt_of_a_sample_or_of_generate():
    tokenizer = load_tokenizer("bytes")
    assert encode_prompt(tokenizer, "ab<|endoftext|>c") == ([], [97, 98, 256, 99])
    assert encode_prompt(tokenizer, "a<|endoftext|>", special_tokens=False) == ([], [97, *b"<|endoftext|>"])
    assert encode_prompt(tokenizer, "") == ([256], [])
    llama = replace(tokenizer, prefix=[5], special={"<s>": 5, "<s>x": 6})
    prompts = (("<s>x<s>", None), ("a", True), ("a", False), ("", False))
    found = [encode_prompt(llama, text, bos) for text, bos in prompts]
    assert found == [([5], [6, 5]), ([5], [97]), ([], [97]), ([5], [])]
