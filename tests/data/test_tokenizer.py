"""GPT-2's tokenizer: text comes back, bytes are counted right, ids that it does not have are shown."""

import hashlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cfg.errors import UserError
from data import assets
from data.tokenizer import GPT2_END_OF_TEXT, decode, load_tokenizer, token_bytes

few = settings(max_examples=100, deadline=None)
text = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def lengths(tokenizer):
    return token_bytes(tokenizer, 50304)


def test_it_is_gpt2s(tokenizer):
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, GPT2_END_OF_TEXT)
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]
    assert tokenizer.encode_ordinary("First Citizen:\n") == [5962, 22307, 25, 198]


@few
@given(text=text)
@example(text="")
@example(text="naïve 東京 👩‍👩‍👧 \x00\r\n\t  <|endoftext|>")
def test_text_comes_back(tokenizer, text):
    tokens = tokenizer.encode_ordinary(text)
    assert decode(tokenizer, tokens) == text
    assert GPT2_END_OF_TEXT not in tokens  # never made from what a document says


@few
@given(text=text)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, lengths, text):
    assert lengths[tokenizer.encode_ordinary(text)].sum() == len(text.encode())


def test_bytes_of_every_id(tokenizer, lengths):
    assert all(lengths[i] == len(tokenizer.decode_bytes([i])) > 0 for i in range(GPT2_END_OF_TEXT))
    assert not lengths[GPT2_END_OF_TEXT:].any()
    assert len(lengths) == 50304


def test_bytes_for_a_vocabulary_that_is_smaller(tokenizer, lengths):
    assert token_bytes(tokenizer, 300).tolist() == lengths[:300].tolist()


@few
@given(tokens=st.lists(st.integers(0, 50303), max_size=20))
def test_any_ids_are_shown(tokenizer, tokens):
    shown = decode(tokenizer, tokens)
    assert shown.count("�") >= sum(t >= tokenizer.n_vocab for t in tokens)


def test_ids_beyond_the_vocabulary_are_marked_where_they_stand(tokenizer):
    assert decode(tokenizer, [50300, 15496, 50257, 50303, 995, 99999]) == "�Hello�� world�"
    assert decode(tokenizer, [GPT2_END_OF_TEXT]) == "<|endoftext|>"


def test_half_a_character_is_marked(tokenizer):
    first, *rest = tokenizer.encode_ordinary("👩")
    assert decode(tokenizer, [first]) == "�" and rest


@pytest.mark.parametrize("vocab_size, fits", [(50256, False), (251, False), (50257, True), (50304, True)])
def test_a_model_must_have_room_for_every_id(vocab_size, fits):
    if fits:
        assert load_tokenizer(vocab_size=vocab_size).n_vocab == 50257
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
    assert load_tokenizer().encode_ordinary("Hello world") == [15496, 995]


def test_an_asset_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    def fail(asset):
        raise OSError("not reachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAWGPT_DATA", raising=False)
    monkeypatch.setattr(assets, "_from_url", fail)
    monkeypatch.setattr(assets, "_from_package", fail)
    with pytest.raises(UserError, match="RAWGPT_DATA"):
        load_tokenizer()
