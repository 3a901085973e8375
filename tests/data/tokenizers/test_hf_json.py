"""tokenizer.json: both cores give the ids of `tokenizers`, and an unusable file is one line."""

import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.fingerprint import same_tokenizer
from data.shards import token_dtype
from data.tokenizers.hf_json import GPT4_PATTERN, SAME_CUTS, SAMPLE, _byte_letters, load_tokenizer_json
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import GPT2_PATTERN
from data.train_tokenizer import train
from util.errors import UserError

few = settings(max_examples=150, deadline=None)
text = st.text(st.characters(codec="utf-8"))
END = "<|endoftext|>"
CORPUS = ["the cat's 12345 hats;\n\n  they'll SIT on naïve 東京 mats,   \tif x == 1:\r\n    return y\n" * 20, *SAMPLE]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def save(folder, data, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(data if isinstance(data, str) else json.dumps(data))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def byte_level(merges, ids=None, **model):
    """Returns a byte-level tokenizer.json with the 256 bytes, <|endoftext|> as id 256, and merges of ASCII."""
    vocab = {letter: i for i, letter in enumerate(_byte_letters())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab) + 1)
    return {
        "version": "1.0",
        "added_tokens": [added(END, 256)],
        "pre_tokenizer": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab | (ids or {}), "merges": merges, **model},
    }


def added(name, i):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, "special": True, **flags}


def reference(data):
    """Returns the library's ids, with names of special tokens as text."""
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def trained(request, tmp_path_factory):
    data = json.loads(train(iter(CORPUS), 400, [END, "<|fim_prefix|>"], request.param).to_str())
    folder = save(tmp_path_factory.mktemp("trained"), data)
    return load_tokenizer(str(folder)), reference(data), data


# The fast path


def test_trained_tokenizers_use_tiktokens_core(trained):
    tokenizer, _, _ = trained
    assert tokenizer.ranks is not None and tokenizer.library is None
    assert tokenizer.pattern in (GPT2_PATTERN, GPT4_PATTERN)
    assert (tokenizer.vocab_size, tokenizer.end_of_text, len(tokenizer.special)) == (400, 0, 2)


@few
@given(text=text)
@example(text="".join(CORPUS))
@example(text="say <|endoftext|> aloud, <|fim_prefix|>")
@example(text="the the  the\n\n \n the\t")
def test_the_ids_equal_the_librarys(trained, text):
    tokenizer, ids, _ = trained
    tokens = tokenizer.encode(text)
    assert tokens == ids(text)
    assert tokenizer.decode(tokens) == text and not {0, 1} & set(tokens)
    assert tokenizer.byte_lengths(500)[tokens].sum() == len(text.encode())


@few
@given(text=text)
def test_the_library_alone_gives_equal_ids(trained, slow_twin, text):
    tokenizer, slow = trained[0], slow_twin
    assert slow.ranks is None and slow.pattern is None
    assert slow.encode(text) == tokenizer.encode(text)
    assert slow.decode(slow.encode(text)) == text
    assert (slow.byte_lengths(500) == tokenizer.byte_lengths(500)).all()
    assert slow.decode([0, 399, 1, 499]) == tokenizer.decode([0, 399, 1, 499])


@pytest.fixture(scope="module")
def slow_twin(trained, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizers.hf_json._same_merges", lambda *_: False)
        return load_tokenizer_json(save(tmp_path_factory.mktemp("slow"), trained[2]))


def test_both_cores_encode_half_a_surrogate_pair_alike(trained, slow_twin):
    assert slow_twin.encode("a\ud800b") == trained[0].encode("a\ud800b") == trained[0].encode("a\ufffdb")


@pytest.mark.parametrize(
    "merges, model, fast",
    [
        ([["a", "b"], ["ab", "c"]], {}, True),
        ([["b", "c"], ["a", "b"], ["ab", "c"]], {}, False),  # abc alone is a, bc: tiktoken would merge these
        (
            [["b", "c"], ["a", "b"], ["ab", "c"]],
            {"ignore_merges": True},
            False,
        ),  # the lookup does not help in a longer piece
        ([["a", "b"], ["c", "d"], ["b", "c"], ["bc", "d"]], {}, False),  # bcd alone is b, cd
        ([["b", "c"], ["b", "d"], ["a", "bc"], ["a", "bd"]], {}, True),
        ([["a", "b"], ["ab", "c"]], {"dropout": 0.1}, False),
        ([["a", "b"], ["ab", "c"]], {"end_of_word_suffix": "</w>"}, False),
    ],
)
def test_tiktokens_core_is_used_only_for_merges_it_can_do(tmp_path, merges, model, fast):
    assert (load_tokenizer(str(save(tmp_path, byte_level(merges, **model)))).ranks is not None) == fast


def test_a_token_that_merging_leaves_in_three_parts_is_looked_up(tmp_path):
    """abcd alone is ab, c, d and never merged, so both cores agree only with ignore_merges."""
    data = byte_level([["a", "b"]], ids={"abcd": 300})
    assert load_tokenizer(str(save(tmp_path / "a", data))).ranks is None
    whole = byte_level([["a", "b"]], ids={"abcd": 300}, ignore_merges=True)
    tokenizer = load_tokenizer(str(save(tmp_path / "b", whole)))
    assert tokenizer.ranks is not None and tokenizer.encode("abcd") == [300] == reference(whole)("abcd")
    assert tokenizer.encode("xabcd") == reference(whole)("xabcd")


def test_ids_that_are_not_in_merge_order_use_the_library(tmp_path):
    data = byte_level([["a", "b"], ["b", "c"]], ids={"ab": 300, "bc": 299})
    tokenizer = load_tokenizer(str(save(tmp_path, data)))
    assert tokenizer.ranks is None and tokenizer.encode("abc") == [300, tokenizer.encode("c")[0]]


MERGES = st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.text("abc", min_size=1, max_size=3)), max_size=8)


@settings(max_examples=100, deadline=None)
@given(merges=MERGES, whole=st.booleans(), order=st.randoms(use_true_random=False))
def test_the_fast_path_gives_the_librarys_ids(tmp_path_factory, merges, whole, order):
    """Compares on all short words, for lists of merges with duplicates and unreachable tokens."""
    known, kept = {"a", "b", "c"}, []
    for left, right in merges:
        if left in known and right in known and [left, right] not in kept:
            kept.append([left, right])
            known.add(left + right)
    data = byte_level(kept, ignore_merges=whole)
    tokenizer = load_tokenizer_json(save(tmp_path_factory.mktemp("merges"), data))
    ids = reference(data)
    for _ in range(30):
        word = "".join(order.choices("abc", k=order.randint(1, 12)))
        assert tokenizer.encode(word) == ids(word), (tokenizer.ranks is not None, kept, word)


def test_only_known_patterns_use_the_fast_path(tmp_path):
    assert len(SAME_CUTS) == 4
    data = byte_level([["a", "b"]])
    step = {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL | {"use_regex": False}]}
    slow = load_tokenizer(str(save(tmp_path / "a", data)))
    step["pattern"]["Regex"] = GPT4_PATTERN
    assert slow.ranks is None and load_tokenizer(str(save(tmp_path / "b", data))).ranks is not None
    data["normalizer"] = {"type": "NFC"}
    assert load_tokenizer(str(save(tmp_path / "c", data))).ranks is None


def test_a_difference_on_the_sample_turns_the_fast_path_off(tmp_path, monkeypatch, capsys):
    data = byte_level([["b", "c"], ["a", "b"], ["ab", "c"]])
    monkeypatch.setattr("data.tokenizers.hf_json._same_merges", lambda *_: True)
    monkeypatch.setattr("data.tokenizers.hf_json.SAMPLE", ["abc"])
    assert load_tokenizer(str(save(tmp_path, data))).ranks is None
    assert "slower" in capsys.readouterr().out


# Bytes without a token


@pytest.fixture(scope="module", params=[True, False], ids=["tiktoken", "library"])
def incomplete(request, tmp_path_factory):
    """A tokenizer without tokens for NUL and 13 bytes that UTF-8 does not have, as SmolLM's, and its definition."""
    data = byte_level([["a", "b"], ["ab", "c"]])
    missing = {0, 0xC0, 0xC1, *range(0xF5, 0x100)}
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {t: i for t, i in vocab.items() if _byte_letters().get(t) not in missing}
    if not request.param:
        data["normalizer"] = {"type": "NFC"}
    tokenizer = load_tokenizer(str(save(tmp_path_factory.mktemp("incomplete"), data)))
    assert (tokenizer.ranks is not None) == request.param and set(tokenizer.missing_bytes) == missing
    return tokenizer, data


@few
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
@example(text="".join(CORPUS).replace("\0", ""))
def test_a_tokenizer_without_some_bytes_gives_the_librarys_ids(incomplete, text):
    tokenizer, data = incomplete
    assert tokenizer.encode(text) == reference(data)(text)


def test_a_text_with_a_byte_that_has_no_token_is_refused(incomplete):
    tokenizer, _ = incomplete
    with pytest.raises(UserError, match=r"the character .\\x00. has no token, in the text .é abc\\x00def.; remove it"):
        tokenizer.encode("é abc\0def")
    assert tokenizer.decode(tokenizer.encode("é abcdef")) == "é abcdef"


# SentencePiece


def sentencepiece():
    names = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *"▁abch", "▁a", "ab", "▁ab", "▁abc"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    merges = [["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁ab", "c"]]
    return {
        "version": "1.0",
        "added_tokens": [added(name, i) for i, name in enumerate(names[:3])],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }


@few
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")))
@example(text="abc ab  a </s> <0x41> \n")
def test_sentencepiece_with_byte_fallback(tmp_path_factory, llama, text):
    tokens = llama.encode(text)
    assert tokens == reference(sentencepiece())(text)
    assert llama.decode(tokens) == text and not {0, 1, 2} & set(tokens)
    assert llama.byte_lengths(300)[tokens].sum() == len(text.encode()) + bool(text)  # the space put before


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    tokenizer = load_tokenizer(str(save(tmp_path_factory.mktemp("llama"), sentencepiece())))
    assert tokenizer.ranks is None and tokenizer.library is not None
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (2, 268)
    return tokenizer


# Prefixes


def template(*names, end=()):
    special = lambda name, i: {"id": name, "ids": [i], "tokens": [name]}  # noqa: E731
    piece = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}  # noqa: E731
    single = [*map(piece, names), {"Sequence": {"id": "A", "type_id": 0}}, *map(piece, end)]
    ids = {"<s>": 1, "</s>": 2, END: 256}
    tokens = {name: special(name, ids[name]) for name in (*names, *end)}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


def sequence(*steps):
    return {"type": "Sequence", "processors": [*steps]}


@pytest.mark.parametrize(
    "data, prefix",
    [
        (sentencepiece() | {"post_processor": template("<s>")}, [1]),
        (byte_level([["a", "b"]]) | {"post_processor": sequence(BYTE_LEVEL, template(END))}, [256]),
        (byte_level([["a", "b"]]) | {"post_processor": BYTE_LEVEL}, []),
        (byte_level([["a", "b"]]) | {"post_processor": None}, []),
    ],
    ids=["llama 2", "llama 3", "gpt2", "none"],
)
def test_the_prefix_equals_the_prefix_of_transformers(tmp_path, data, prefix):
    from transformers import AutoTokenizer

    name = "</s>" if prefix == [1] else END
    folder = save(tmp_path, data, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name})
    tokenizer, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.prefix == prefix
    for text in ("abc", " naïve  ab", ""):
        assert theirs.encode(text) == prefix + tokenizer.encode(text)


def test_nested_prefixes_and_a_suffix(tmp_path):
    data = sentencepiece() | {"post_processor": sequence(template("<s>", "</s>"), template("</s>", end=["<s>"]))}
    assert load_tokenizer(str(save(tmp_path, data))).prefix == [2, 1, 2]


# End of text, fingerprint


def test_the_end_of_text_token_is_found(tmp_path):
    data = sentencepiece()
    for config, end in ((None, 2), ({}, 2), ({"eos_token": "<s>"}, 1), ({"eos_token": {"content": "<unk>"}}, 0)):
        folder = save(tmp_path / str(end), data, config)
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.end_of_text == load_tokenizer(str(folder / "tokenizer.json")).end_of_text == end
    with pytest.raises(UserError, match="'<end>' is not one of its special tokens .it has </s>, <s>, <unk>"):
        load_tokenizer(str(save(tmp_path / "x", data, {"eos_token": "<end>"})))
    data["added_tokens"] = data["added_tokens"][:2]
    with pytest.raises(UserError, match="no end-of-text token .it has <s>, <unk>"):
        load_tokenizer(str(save(tmp_path / "y", data)))


def test_a_copy_in_another_folder_has_an_equal_fingerprint(tmp_path):
    data = byte_level([["a", "b"]])
    one = load_tokenizer(str(save(tmp_path / "one", data)))
    (tmp_path / "two").mkdir()
    for name, content in one.files.items():
        (tmp_path / "two" / name).write_bytes(content)
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "tokenizer.json").write_text(json.dumps(data, indent=4))
    same = [load_tokenizer(str(tmp_path / name)).fingerprint for name in ("two", "three")]
    assert all(same_tokenizer(one.fingerprint, other) for other in same) and same[0]["name"] != one.name
    other = load_tokenizer(str(save(tmp_path / "other", byte_level([["a", "c"]])))).fingerprint
    assert not same_tokenizer(one.fingerprint, other) and one.fingerprint["vocab_size"] == other["vocab_size"] == 258


# Unusable files


def unlike(**changes):
    return byte_level([["a", "b"]]) | changes


def model(**changes):
    return unlike(model=byte_level([["a", "b"]])["model"] | changes)


@pytest.mark.parametrize(
    "data, message",
    [
        ("", "empty file"),
        ("{", "not JSON"),
        ("\x80\x04\x95", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no model"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a WordPiece tokenizer; only byte-pair"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "a Unigram tokenizer; only byte-pair"),
        (model(vocab={"a": 0}), "not a usable tokenizer.json .'ab' is missing"),
        (model(vocab={"a": 0, "b": 0, "ab": 2}), "ids must be distinct"),
        (model(merges=[["a"]]), "not a usable tokenizer.json"),
        (model(vocab=[1, 2]), "not a usable tokenizer.json"),
        (unlike(pre_tokenizer={"type": "Nonsense"}), "not byte-level and without byte fallback"),
        (unlike(post_processor=template("<s>") | {"special_tokens": {}}), "'<s>' is missing"),
        (unlike(post_processor=template("<s>") | {"single": [{}]}), "'SpecialToken' is missing"),
        (unlike(post_processor=[1]), "not a usable tokenizer.json"),
        (unlike(post_processor={"type": "Sequence"}), "'processors' is missing"),
        (
            unlike(post_processor=template(END) | {"special_tokens": {END: {"ids": [9999]}}}),
            "its post_processor puts the unknown id 9999 before a text",
        ),
        (unlike(normalizer={"type": "Nonsense"}), "not a usable tokenizer.json"),
        (unlike(pre_tokenizer={"type": "Whitespace"}), "not byte-level and without byte fallback"),
    ],
)
def test_an_invalid_tokenizer_file_is_one_line(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(save(tmp_path, data)))
    assert "tokenizer.json" in str(error.value)


def test_a_missing_tokenizer_is_an_error(tmp_path):
    for name, message in (
        ("gtp2", "did you mean gpt2"),
        (str(tmp_path / "nowhere"), "no such tokenizer or file"),
        (str(tmp_path), "tokenizer.json: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(name)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(str(save(tmp_path, byte_level([]), config="{")))


def test_the_vocabulary_size_must_fit(tmp_path):
    folder = save(tmp_path, byte_level([["a", "b"]]))
    assert load_tokenizer(str(folder), 258).vocab_size == 258
    with pytest.raises(UserError, match="give --vocab_size=258 or a little more"):
        load_tokenizer(str(folder), 257)
    assert [token_dtype(n).itemsize for n in (2**16 - 1, 2**16, 2**16 + 1)] == [2, 2, 4]
