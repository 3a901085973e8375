"""Named tokenizers, GPT-2's above all: text comes back, bytes are counted right, foreign ids are shown."""

import hashlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import assets
from data.shards import token_dtype
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


def test_it_is_gpt2s(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, GPT2_END_OF_TEXT)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("First Citizen:\n") == [5962, 22307, 25, 198]


@few
@given(text=text)
@example(text="")
@example(text="naïve 東京 👩‍👩‍👧 \x00\r\n\t  <|endoftext|>")
def test_text_comes_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert GPT2_END_OF_TEXT not in tokens  # never made from what a document says


@few
@given(text=text)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, lengths, text):
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_bytes_of_every_id(tokenizer, lengths):
    assert all(lengths[i] == len(tokenizer.decode_bytes([i])) > 0 for i in range(GPT2_END_OF_TEXT))
    assert not lengths[GPT2_END_OF_TEXT:].any()
    assert len(lengths) == 50304


def test_bytes_for_a_vocabulary_that_is_smaller(tokenizer, lengths):
    assert tokenizer.byte_lengths(300).tolist() == lengths[:300].tolist()


@few
@given(tokens=st.lists(st.integers(0, 50303), max_size=20))
def test_any_ids_are_shown(tokenizer, tokens):
    shown = tokenizer.decode(tokens)
    assert shown.count("�") >= sum(t >= tokenizer.vocab_size for t in tokens)


def test_ids_beyond_the_vocabulary_are_marked_where_they_stand(tokenizer):
    assert tokenizer.decode([50300, 15496, 50257, 50303, 995, 99999]) == "�Hello�� world�"
    assert tokenizer.decode([GPT2_END_OF_TEXT]) == "<|endoftext|>"


def test_half_a_character_is_marked(tokenizer):
    first, *rest = tokenizer.encode("👩")
    assert tokenizer.decode([first]) == "�" and rest


@pytest.mark.parametrize("vocab_size, fits", [(50256, False), (251, False), (50257, True), (50304, True)])
def test_a_model_must_have_room_for_every_id(vocab_size, fits):
    if fits:
        assert load_tokenizer(vocab_size=vocab_size).vocab_size == 50257
        return
    with pytest.raises(UserError, match=f"--vocab_size={vocab_size}"):
        load_tokenizer(vocab_size=vocab_size)


def test_the_ranks_are_those_that_were_verified(tmp_path, monkeypatch, tokenizer):
    """tiktoken keeps copies in a folder that everybody can write to, and believes them unless told a hash."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ranks = assets.fetch("gpt2.tiktoken")
    content = ranks.read_text()
    for old, new in ((" 15496\n", " x\n"), (" 995\n", " 15496\n"), (" x\n", " 995\n")):
        content = content.replace(old, new)
    (tmp_path / hashlib.sha1(str(ranks).encode()).hexdigest()).write_text(content)
    assert load_tokenizer().encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("name, size, end", [("cl100k_base", 100277, 100257), ("o200k_base", 200019, 199999)])
def test_the_larger_named_tokenizers_are_tiktokens(name, size, end, monkeypatch):
    import tiktoken_ext.openai_public as public

    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr("data.tokenizers.load.assets.fetch", lambda file: BytesFile())
    tokenizer, theirs = load_tokenizer(name), getattr(public, name)()
    assert (tokenizer.pattern, tokenizer.special) == (theirs["pat_str"], theirs["special_tokens"])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (size, end)
    assert token_dtype(tokenizer.vocab_size).itemsize == 4
    assert tokenizer.decode(tokenizer.encode("naïve <|endoftext|>")) == "naïve <|endoftext|>"


class BytesFile:
    """A rank file of the 256 bytes and nothing else."""

    def read_bytes(self):
        return rank_file({bytes([b]): b for b in range(256)})


def test_the_hash_of_gpt2_is_settled(tokenizer):
    """Shards and checkpoints hold it: a change of it would refuse them all."""
    assert tokenizer.sha256.startswith("1408ad06293e4f88")


def test_an_asset_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    def fail(asset):
        raise OSError("not reachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAWGPT_DATA", raising=False)
    monkeypatch.setattr(assets, "_from_url", fail)
    monkeypatch.setattr(assets, "_from_package", fail)
    with pytest.raises(UserError, match="RAWGPT_DATA"):
        load_tokenizer()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-fim"])
def test_what_is_known_of_a_name_without_its_file(name):
    assert load_tokenizer(name).fingerprint == NAMED_FINGERPRINTS[name]
