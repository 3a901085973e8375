"""Embeddings for a new tokenizer: old tokens spell each new one, and special tokens keep their roles."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data.tokenizers.hf_json import SAMPLE
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import END_OF_TEXT
from data.tokenizers.transfer import token_rows
from data.train_tokenizer import train

LEARNED = [" t", "th", "he", " the", "ma", "at", "mat", "東", *" themasXf\n"]


def bags(old, new, old_size=None, new_size=None):
    """Returns the old ids of each new id."""
    new_size = new_size or new.vocab_size
    ids, offsets = token_rows(old, new, old_size or old.vocab_size, new_size)
    assert (ids.dtype, offsets.dtype, offsets.shape) == (np.int64, np.int64, (new_size + 1,))
    assert offsets[0] == 0 and offsets[-1] == len(ids) and (np.diff(offsets) >= 0).all()
    assert ids.min() >= 0 and ids.max() < (old_size or old.vocab_size)
    return [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Different tokenizers: tiktoken's core, the library, one that prepends a space, and SentencePiece."""
    corpus = ["the cat's 12345 hats on mats;\n\n  naïve 東京 they'll" * 20, *SAMPLE]
    one = json.loads(train(iter(corpus), 400, [END_OF_TEXT, "<|fim_prefix|>"], "gpt4").to_str())
    two = json.loads(train(iter(corpus[1:]), 330, ["<s>", END_OF_TEXT], "gpt2").to_str())
    slow = two | {"normalizer": {"type": "NFC"}}
    spaced = one | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}
    made = {}
    for name, data in (("one", one), ("two", two), ("slow", slow), ("spaced", spaced)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_text(json.dumps(data))
        made[name] = load_tokenizer(str(folder))
    file = tmp_path_factory.mktemp("pieces") / "tok.bin"
    file.write_bytes(llama2c_file(LEARNED))
    made["pieces"] = load_tokenizer(str(file))
    kinds = [(t.ranks is None, bool(t.library and t.library.prepends_space)) for t in made.values()]
    assert kinds == [(False, False), (False, False), (True, False), (True, True), (True, True)]
    return made


def llama2c_file(learned):
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *[f"<0x{b:02X}>" for b in range(256)], *learned]
    rows = [(np.float32(-i).tobytes(), piece.encode()) for i, piece in enumerate(pieces)]
    lengths = [np.int32(len(piece)).tobytes() for _, piece in rows]
    return np.int32(8).tobytes() + b"".join(s + n + p for (s, p), n in zip(rows, lengths, strict=True))


NAMES = ["one", "two", "slow", "spaced", "pieces"]


@pytest.mark.parametrize("old", NAMES)
@pytest.mark.parametrize("new", NAMES)
def test_the_old_tokens_spell_each_new_token(small, old, new):
    old, new = small[old], small[new]
    rows = bags(old, new)
    for i, token in new.token_bytes.items():
        assert old.decode_bytes(rows[i]) == token, (i, token)
    by_bytes = set(old.token_bytes.values())
    assert all(len(rows[i]) == 1 for i, token in new.token_bytes.items() if token in by_bytes)
    assert rows[new.end_of_text] == [old.end_of_text]
    for name, i in new.special.items():
        if i != new.end_of_text:
            assert rows[i] == ([old.special[name]] if name in old.special else [])


@pytest.mark.parametrize("name", NAMES)
def test_transfer_to_an_equal_tokenizer_keeps_every_row(small, name):
    same = small[name]
    size = same.vocab_size
    assert bags(same, same) == [[i] for i in range(size)]
    assert bags(same, same, size + 64, size + 128) == [[i] for i in range(size + 64)] + [[]] * 64
    assert bags(same, same, size + 128, size + 64) == [[i] for i in range(size + 64)]


def test_a_token_is_spelled_as_the_old_tokenizer_encodes_it(small):
    """Includes a token inside a text, where SentencePiece does not add a space."""
    old, new = small["pieces"], small["one"]
    rows = bags(old, new)
    row = lambda text: rows[new.ranks[text.encode()]]  # noqa: E731
    piece = lambda text: 259 + LEARNED.index(text)  # noqa: E731
    assert row(" the") == [piece(" the")]
    assert row(" they") == [piece(" the"), 3 + ord("y")]
    assert row("ats") == [piece("at"), piece("s")]
    assert row("'s") == [3 + ord("'"), piece("s")]


def test_bytes_that_are_not_text_are_merged_by_ranks(tokenizer):
    """GPT-2's dashes and quotes: a space and two of three bytes."""
    old, new = fewer(tokenizer, 1000), fewer(tokenizer, 1000)
    i = new.ranks[b" \xe2\x80"]
    del old.ranks[b" \xe2\x80"]
    assert bags(old, new)[i] == [old.ranks[b" "], old.ranks[b"\xe2\x80"]]


def test_a_token_with_a_byte_that_the_old_tokenizer_lacks_gets_no_old_tokens(tokenizer):
    new = fewer(tokenizer, 1000)
    old = replace(new, ranks={token: i for token, i in new.ranks.items() if token != b"\xe2"})
    rows = bags(old, new)
    for token, i in new.ranks.items():
        assert token in old.ranks or not rows[i]


def fewer(tokenizer, count):
    """Returns a tokenizer of its first tokens."""
    return replace(tokenizer, ranks={token: i for token, i in tokenizer.ranks.items() if i < count})


def test_duplicate_bytes_are_matched_in_order(small, tmp_path):
    """SentencePiece has <0x61> and a. A byte-level tokenizer has one token, which is used for both."""
    (tmp_path / "tok.bin").write_bytes(llama2c_file([*LEARNED, "q"]))
    more = load_tokenizer(str(tmp_path / "tok.bin"))
    byte, piece = 3 + ord("a"), 259 + LEARNED.index("a")
    rows = bags(small["pieces"], more)
    assert (rows[byte], rows[piece], rows[3 + ord("q")], rows[-1]) == ([byte], [piece], [3 + ord("q")], [3 + ord("q")])
    one = small["one"].ranks[b"a"]
    assert bags(small["pieces"], small["one"])[one] == [piece]
    rows = bags(small["one"], small["pieces"])
    assert rows[byte] == rows[piece] == [one]


def test_gpt2_and_its_sentinels(tokenizer, fim_tokenizer):
    ids, offsets = token_rows(tokenizer, fim_tokenizer, 50257, 50304)
    assert (ids == np.arange(50257)).all() and (offsets == np.minimum(np.arange(50305), 50257)).all()
    ids, offsets = token_rows(fim_tokenizer, tokenizer, 50304, 50257)
    assert (ids == np.arange(50257)).all() and (offsets == np.arange(50258)).all()


def test_fewer_rows_than_ids_are_an_error(tokenizer, small):
    with pytest.raises(ValueError, match="50257 and 400 ids in 50256 and 400 rows"):
        token_rows(tokenizer, small["one"], 50256, 400)
