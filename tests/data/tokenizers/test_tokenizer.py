"""Named tokenizers: decoding gives the text, byte lengths are right, unknown ids can be decoded."""

import hashlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import assets
from data.prepare.encoder import make_encoder
from data.shards import token_dtype
from data.tokenizers import load
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import GPT2_END_OF_TEXT, NAMED_FINGERPRINTS, rank_file
from util.errors import UserError

few = settings(max_examples=100, deadline=None)
text = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def lengths(tokenizer):
    return tokenizer.byte_lengths(50304)


def test_the_default_is_gpt2(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, GPT2_END_OF_TEXT)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("First Citizen:\n") == [5962, 22307, 25, 198]


@few
@given(text=text)
@example(text="")
@example(text="naïve 東京 👩‍👩‍👧 \x00\r\n\t  <|endoftext|>")
def test_decoding_gives_the_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert GPT2_END_OF_TEXT not in tokens  # text never encodes to it


@few
@given(text=text)
def test_the_byte_lengths_of_tokens_sum_to_the_text(tokenizer, lengths, text):
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


@few
@given(text=text)
@example(text="naïve 東京 👩‍👩‍👧 \x00\r\n <|endoftext|>")
def test_the_byte_tokenizer_gives_the_bytes_of_the_text(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(text) == make_encoder(tokenizer)[0](text).tolist() == list(text.encode())
    assert tokenizer.decode([*tokenizer.encode(text), 256]) == text + "<|endoftext|>"
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.missing_bytes) == (257, 256, b"")
    assert tokenizer.byte_lengths(300).tolist() == [1] * 256 + [0] * 44


def test_the_byte_tokenizer_takes_long_words_and_runs_of_spaces():
    text = "ACGT" * 500_000 + " " * 2_000_000 + "\ud800"
    assert load_tokenizer("bytes").encode(text) == list(text.replace("\ud800", "\ufffd").encode())


def test_byte_lengths_of_every_id(tokenizer, lengths):
    assert all(lengths[i] == len(tokenizer.decode_bytes([i])) > 0 for i in range(GPT2_END_OF_TEXT))
    assert not lengths[GPT2_END_OF_TEXT:].any()
    assert len(lengths) == 50304


def test_byte_lengths_for_a_smaller_vocabulary(tokenizer, lengths):
    assert tokenizer.byte_lengths(300).tolist() == lengths[:300].tolist()


@few
@given(tokens=st.lists(st.integers(0, 50303), max_size=20))
def test_any_ids_can_be_decoded(tokenizer, tokens):
    shown = tokenizer.decode(tokens)
    assert shown.count("�") >= sum(t >= tokenizer.vocab_size for t in tokens)


def test_ids_outside_the_vocabulary_are_replacement_characters(tokenizer):
    assert tokenizer.decode([50300, 15496, 50257, 50303, 995, 99999]) == "�Hello�� world�"
    assert tokenizer.decode([GPT2_END_OF_TEXT]) == "<|endoftext|>"


def test_half_a_character_is_a_replacement_character(tokenizer):
    first, *rest = tokenizer.encode("👩")
    assert tokenizer.decode([first]) == "�" and rest


@pytest.mark.parametrize("vocab_size, fits", [(50256, False), (251, False), (50257, True), (50304, True)])
def test_the_models_vocabulary_must_have_room_for_every_id(vocab_size, fits):
    if fits:
        assert load_tokenizer(vocab_size=vocab_size).vocab_size == 50257
        return
    with pytest.raises(UserError, match=f"--vocab_size={vocab_size}"):
        load_tokenizer(vocab_size=vocab_size)


def test_a_tokenizer_whose_size_was_asked_for_is_loaded_once(tmp_path, tokenizer, monkeypatch):
    loads = []
    monkeypatch.setattr(load, "_load_path", lambda path: loads.append(path) or tokenizer)
    assert load.tokenizer_size(str(tmp_path)) == 50257 and load_tokenizer(str(tmp_path)) is tokenizer
    assert loads == [tmp_path]
    load_tokenizer(str(tmp_path))  # the file may have changed
    assert loads == [tmp_path] * 2


def test_the_ranks_come_from_the_verified_file(tmp_path, monkeypatch, tokenizer):
    """tiktoken caches files in a world-writable folder and trusts them unless it is given a hash."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ranks = assets.fetch("gpt2.tiktoken")
    content = ranks.read_text()
    for old, new in ((" 15496\n", " x\n"), (" 995\n", " 15496\n"), (" x\n", " 995\n")):
        content = content.replace(old, new)
    (tmp_path / hashlib.sha1(str(ranks).encode()).hexdigest()).write_text(content)
    assert load_tokenizer().encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("name, size, end", [("cl100k_base", 100277, 100257), ("o200k_base", 200019, 199999)])
def test_the_larger_named_tokenizers_equal_tiktokens(name, size, end, monkeypatch):
    import tiktoken_ext.openai_public as public

    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr("data.tokenizers.load.assets.fetch", lambda file: BytesFile())
    tokenizer, theirs = load_tokenizer(name), getattr(public, name)()
    assert (tokenizer.pattern, tokenizer.special) == (theirs["pat_str"], theirs["special_tokens"])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (size, end)
    assert token_dtype(tokenizer.vocab_size).itemsize == 4
    assert tokenizer.decode(tokenizer.encode("naïve <|endoftext|>")) == "naïve <|endoftext|>"


class BytesFile:
    """A rank file with only the 256 bytes."""

    def read_bytes(self):
        return rank_file({bytes([b]): b for b in range(256)})


def test_the_hash_of_gpt2_never_changes(tokenizer):
    """Shards and checkpoints contain it, so another hash would reject all of them."""
    assert tokenizer.sha256.startswith("1408ad06293e4f88")


def test_an_unavailable_asset_is_one_line(tmp_path, monkeypatch):
    def fail(asset):
        raise OSError("not reachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAWGPT_DATA", raising=False)
    monkeypatch.setattr(assets, "_from_url", fail)
    monkeypatch.setattr(assets, "_from_package", fail)
    with pytest.raises(UserError, match="RAWGPT_DATA"):
        load_tokenizer()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-fim"])
def test_named_fingerprints_equal_the_fingerprints_of_the_files(name):
    assert load_tokenizer(name).fingerprint == NAMED_FINGERPRINTS[name]
