"""Exported tokenizers: `transformers` and rawgpt give equal ids for every character."""

import json
from dataclasses import replace

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from data.tokenizers.bpe import merge, merges
from data.tokenizers.export import tokenizer_files
from data.tokenizers.hf_json import SAME_CUTS, SAMPLE
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import CL100K_PATTERN, END_OF_TEXT, O200K_PATTERN
from util.errors import UserError

few = settings(max_examples=60, deadline=None)
TEXTS = [text.replace(END_OF_TEXT, "<|end|>").replace("</s>", "") for text in SAMPLE]
GAPS = {END_OF_TEXT: 3000, "<|fim_prefix|>": 3001, "<|endofprompt|>": 3020}
# Every class of character in the patterns, and corner cases of the two engines.
KINDS = "aſSéǅʰ字\u0301 1٣Ⅷ½'.{/\t\r\n\u00a0\u0085\u3000\x1c\u2028\u200b👩\U0010ffff"
rough = st.lists(st.sampled_from([*KINDS, "'s", "'LL", "'ſ", "  ", "\n\n", "\r\n", "12345"]), max_size=14).map("".join)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "cl100k", "o200k", "bytes"])
def named(request, tokenizer):
    """GPT-2, bytes, and the first 2000 tokens of GPT-2 with the other patterns and gaps before special ids."""
    if request.param == "gpt2":
        return tokenizer
    if request.param == "bytes":
        return load_tokenizer("bytes")
    pattern = {"cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN}[request.param]
    ranks = {token: i for token, i in tokenizer.ranks.items() if i < 2000}
    return replace(tokenizer, name="small", ranks=ranks, pattern=pattern, special=GAPS, end_of_text=3000)


@pytest.fixture(scope="module")
def folder(named, tmp_path_factory):
    return write(tmp_path_factory.mktemp("written"), tokenizer_files(named, 1024))


def test_the_written_tokenizer_is_read_back(named, folder):
    again = load_tokenizer(str(folder))
    assert (again.ranks, again.pattern, again.special) == (named.ranks, named.pattern, named.special)
    assert (again.end_of_text, again.vocab_size, again.prefix) == (named.end_of_text, named.vocab_size, [])
    assert tokenizer_files(again, 1024)["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_transformers_gives_our_ids(named, folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == named.encode(text) == theirs.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.convert_tokens_to_ids([*named.special]) == [*named.special.values()]
    assert (theirs.eos_token_id, theirs.bos_token_id) == (named.end_of_text, named.end_of_text)
    assert (theirs.model_max_length, len(theirs)) == (1024, len(named.ranks) + len(named.special))
    assert theirs.encode(f"a{END_OF_TEXT}") == [*named.encode("a"), named.end_of_text]


def tiktokens_cuts(pattern, text):
    """Returns the pieces that tiktoken splits a short text into. All parts are tokens, so each piece is one token."""
    parts = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {part: 256 + i for i, part in enumerate(sorted(parts - ranks.keys()))}
    core = tiktoken.Encoding("cuts", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [core.decode_single_token_bytes(i).decode() for i in core.encode_ordinary(text)]


@pytest.mark.parametrize("theirs", SAME_CUTS, ids=["gpt2", "cl100k", "gpt4", "o200k"])
@few
@given(text=rough)
@example(text="a \n \n ")
@example(text="\n\n  \n  ")
@example(text=" 12345\r\n\r\n 'S x'ſ\n")
def test_both_engines_split_alike(theirs, text):
    """`tokenizers` splits by the written pattern as tiktoken splits by its pattern."""
    cuts = [piece for piece, _ in Split(Regex(theirs), "isolated").pre_tokenize_str(text)]
    assert cuts == tiktokens_cuts(SAME_CUTS[theirs], text)


def test_gpt4s_pattern_alone_is_not_cl100ks():
    assert len({tuple(tiktokens_cuts(ours, "a \n \n ")) for ours in SAME_CUTS.values()}) > 1


CLASSES = [r"\p{L}", r"\p{N}", r"\s", "(?i:[sdmt])", "(?i:[lver])", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"]
CLASSES += [r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"]


@pytest.mark.parametrize("end", [0x3400, pytest.param(0x110000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CLASSES)
def test_both_engines_know_the_same_characters(kind, end):
    """The patterns use only these classes of characters."""
    characters = "".join(chr(i) for i in range(end) if not 0xD800 <= i < 0xE000)
    core = tiktoken.Encoding(
        "class", pat_str=kind, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    found = Split(Regex(kind), "removed", invert=True).pre_tokenize_str(characters)
    assert "".join(c for c, _ in found) == core.decode(core.encode_ordinary(characters)) != ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_named_tokenizers_on_every_character(name, tmp_path):
    """Checks also that merging makes all their tokens, so that no piece must be looked up."""
    ours = load_tokenizer(name)
    files = tokenizer_files(ours)
    model = json.loads(files["tokenizer.json"])["model"]
    assert len(model["merges"]) == len(ours.ranks) - 256 and not model["ignore_merges"]
    library = load_tokenizer_by_the_library(write(tmp_path, files))
    for start in range(0, 0x110000, 0x1000):
        characters = [chr(i) for i in range(start, start + 0x1000) if not 0xD800 <= i < 0xE000]
        texts = [f" a{c}'d!{c}'d 1{c} {c}x\n{c}\n" for c in characters]
        assert library.encode_ordinary_batch(texts) == [ours.encode(text) for text in texts], hex(start)


def load_tokenizer_by_the_library(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizers.hf_json._same_cuts", lambda _: False)
        return load_tokenizer(str(folder)).encoding


# Merges


def test_merging_is_tiktokens(tokenizer):
    for word in ("Hello", " indistinguishable", "aaaaaaa", "                 ", "東京"):
        core = [tokenizer.decode_bytes([i]) for i in tokenizer.encode(word)]
        assert merge(word.encode(), tokenizer.ranks) == core


def test_merges_finds_the_pair_of_each_token():
    ranks = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5, "abd": 6, "aab": 7, "cabc": 8}
    pairs = merges(ranks)
    assert pairs == [("b", "c"), ("a", "b"), ("a", "bc"), ("a", "ab"), ("c", "abc")]  # d is missing
    assert merges({"a": 0, "b": 1, "abab": 2}) == []  # four parts are left


# From a tokenizer.json


def test_an_export_keeps_the_file_and_a_part_of_the_config(tmp_path, tokenizer):
    content = tokenizer_files(replace(tokenizer, ranks={t: i for t, i in tokenizer.ranks.items() if i < 300}))
    data = json.loads(content["tokenizer.json"])
    data["pre_tokenizer"]["add_prefix_space"] = True
    config = {"eos_token": END_OF_TEXT, "bos_token": {"content": END_OF_TEXT, "lstrip": False}, "unk_token": None}
    config |= {"pad_token": "[PAD]", "chat_template": "{{ messages }}", "add_bos_token": True, "eggs": 3}
    original = json.dumps(data, indent=2).encode()
    write(tmp_path / "a", {"tokenizer.json": original, "tokenizer_config.json": json.dumps(config).encode()})
    ours = load_tokenizer(str(tmp_path / "a"))
    files = tokenizer_files(load_tokenizer(str(write(tmp_path / "b", ours.files))))
    assert files["tokenizer.json"] == original
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "chat_template": "{{ messages }}",  # the padding token has no id in the file
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,  # which `transformers` 4 would otherwise set to False
    }
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write(tmp_path / "c", files), local_files_only=True)
    assert theirs.encode("the cat") == ours.encode("the cat") == load_tokenizer(str(tmp_path / "c")).encode(" the cat")


def test_a_tokenizer_of_the_hub(tokenizer, tmp_path, monkeypatch):
    """hf:FOLDER is a local folder. A name that is not in the hub's cache is a one-line error."""
    ranks = {token: i for token, i in tokenizer.ranks.items() if i < 2000}
    write(tmp_path, tokenizer_files(replace(tokenizer, ranks=ranks, special=GAPS, end_of_text=3000)))
    assert load_tokenizer(f"hf:{tmp_path}").fingerprint == load_tokenizer(str(tmp_path)).fingerprint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--tokenizer=hf:nobody/nothing: .* cannot be reached"):
        load_tokenizer("hf:nobody/nothing")


def test_the_export_of_a_named_tokenizer_has_its_fingerprint(tokenizer, tmp_path):
    """Shards that were made with one can be read with the other."""
    folder = write(tmp_path, tokenizer_files(tokenizer))
    assert load_tokenizer(str(folder)).fingerprint == {**tokenizer.fingerprint, "name": str(folder)}
