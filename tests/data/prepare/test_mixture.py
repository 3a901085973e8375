"""Mixtures have the shares of their weights, are deterministic, and errors name the key in the file."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare import workers
from data.prepare.mixture import Mixture, mix, read_mixture
from util.errors import UserError

few = settings(max_examples=25, deadline=None)


def write_sources(folder, write_input, **texts):
    """Writes a .jsonl per source and returns the paths."""
    paths = {}
    for name, documents in texts.items():
        (folder / name).mkdir()
        paths[name] = str(write_input(folder / name, ".jsonl", documents))
    return paths


def mixture_of(paths, tokens, **weights):
    rows = {name: {"input": paths[name], "weight": weight} for name, weight in weights.items()}
    total = sum(weights.values())
    mixture = Mixture(tokens=tokens, sources=rows)
    for source in mixture.sources.values():
        source.weight /= total
    return mixture


@few
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    tokens=st.integers(1, 1500),
)
def test_shares_are_within_a_document_of_the_weights(
    tmp_path_factory, make_job, write_input, tokens_of, weights, lengths, tokens
):
    folder = tmp_path_factory.mktemp("mix")
    texts = {f"s{i}": [" word" * (j % lengths[i] + 1) for j in range(30)] for i in range(len(weights))}
    paths = write_sources(folder, write_input, **texts)
    mixture = mixture_of(paths, tokens, **{f"s{i}": weight for i, weight in enumerate(weights)})
    made = mix(make_job(folder / "out", val_tokens=10, shard_size=500), mixture)
    assert made["tokens"] == tokens == sum(map(len, tokens_of(folder / "out", "*.bin")))
    assert tokens == sum(row["tokens"] for row in made["sources"].values())
    longest = max(lengths) + 1
    for name, row in made["sources"].items():
        excess = row["tokens"] - mixture.sources[name].weight * tokens
        assert -longest * (len(weights) - 1) - 1 <= excess <= longest


def test_documents_are_complete_and_in_order_and_a_source_that_ends_starts_again(
    tmp_path, make_job, write_input, whole, documents_in
):
    texts = {"a": [f"a{i}" for i in range(7)], "b": [f"b{i} and so on and on" for i in range(50)]}
    paths = write_sources(tmp_path, write_input, **texts)
    made = mix(make_job(tmp_path / "out", val_tokens=10), mixture_of(paths, 300, a=3, b=1))
    documents = documents_in(whole(tmp_path / "out"))[:-1]  # the last one is truncated
    for name, row in made["sources"].items():
        drawn = [text for text in documents if text[0] == name]
        assert row["documents"] - len(drawn) in (0, 1)
        assert drawn == [texts[name][i % len(texts[name])] for i in range(len(drawn))]
        assert row["passes"] == -(-row["documents"] // len(texts[name]))
    assert made["sources"]["a"]["passes"] > 5 and made["sources"]["b"]["passes"] == 1
    assert made["documents"] == len(documents) + 1
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "x_train_000001.bin", "x_val_000000.bin"]
    first_half = documents[: len(documents) // 2]  # sources alternate from the start
    assert {text[0] for text in first_half} == {"a", "b"}


def test_the_same_mixture_a_second_time_does_nothing(tmp_path, make_job, write_input, content):
    paths = write_sources(tmp_path, write_input, a=["one", "two three"], b=["four"] * 9)
    for out in ("x", "y"):
        made = mix(make_job(tmp_path / out, val_tokens=5), mixture_of(paths, 100, a=1, b=1))
    assert content(tmp_path / "x") == content(tmp_path / "y")
    assert made["recipe"]["mixture"]["sources"]["a"]["source"][0]["name"] == "docs.jsonl"
    assert mix(make_job(tmp_path / "x", val_tokens=5), mixture_of(paths, 100, a=1, b=1)) is None
    with pytest.raises(UserError, match="other input or options .mixture."):
        mix(make_job(tmp_path / "x", val_tokens=5), mixture_of(paths, 100, a=1, b=2))


@pytest.mark.parametrize("nth", range(12))
def test_an_interrupted_mixture_gives_the_same_bytes(tmp_path, monkeypatch, make_job, write_input, content, nth):
    paths = write_sources(tmp_path, write_input, a=["one", "two three"], b=["four"] * 9)
    mixture = mixture_of(paths, 100, a=1, b=1)
    job = make_job(tmp_path / "whole", val_tokens=5, shard_size=60)
    mix(job, mixture)
    out, calls, real = make_job(tmp_path / "out", val_tokens=5, shard_size=60), [], os.replace

    def interrupt(*args):
        calls.append(args)
        if len(calls) > nth:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt)
        mix(out, mixture)
    mix(out, mixture)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_settings_of_a_source_override_the_flags(tmp_path, quick, write_input, whole, documents_in, fim_tokenizer):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a = write_input(tmp_path / "a", ".jsonl", ["from the flags"] * 5, key="body")
    b = write_input(tmp_path / "b", ".jsonl", ["of its own"] * 5, key="content")
    rows = {"a": {"input": str(a), "weight": 1}, "b": {"input": str(b), "weight": 1, "text_key": "content"}}
    rows["b"]["fim_rate"] = 0
    (tmp_path / "m.yaml").write_text(json.dumps({"tokens": 60, "sources": rows}))
    quick(
        "--mixture", tmp_path / "m.yaml", "--output_dir", tmp_path / "out", "--text_key=body", "--fim_rate=1",
        "--tokenizer=gpt2-fim", "--val_tokens=0",
    )  # fmt: skip
    documents = fim_tokenizer.decode(whole(tmp_path / "out")).split("<|endoftext|>")[1:-1]
    assert {text == "of its own" for text in documents} == {True, False}
    assert all(text == "of its own" or text.startswith("<|fim_prefix|>") for text in documents)


MISTAKES = {
    "missing": (None, "No such file"),
    "empty": ("", "must hold `tokens:` and `sources:`"),
    "no yaml": ("a: [", "expected"),
    "a list": ("- a", "must hold `tokens:` and `sources:`"),
    "no tokens": ("sources: {a: {input: x, weight: 1}}", "tokens: Field required"),
    "zero tokens": ("{tokens: 0, sources: {a: {input: x, weight: 1}}}", "tokens: Input should be greater"),
    "no source": ("{tokens: 5, sources: {}}", "sources: Dictionary should have at least 1 item"),
    "weight": ("{tokens: 5, sources: {a: {input: x, weight: 0}}}", "sources.a.weight: Input should be greater"),
    "infinite": ("{tokens: 5, sources: {a: {input: x, weight: .inf}}}", "sources.a.weight: "),
    "misspelled": ("{tokens: 5, sources: {a: {input: x, wieght: 1}}}", "sources.a.wieght: Extra inputs"),
    "path": ("{tokens: 5, sources: {a/b: {input: x, weight: 1}}}", "'a/b' must be a name"),
    "rate": ("{tokens: 5, sources: {a: {input: x, weight: 1, fim_rate: 2}}}", "sources.a.fim_rate: "),
}


@pytest.mark.parametrize("content, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_file_are_named(tmp_path, content, message):
    path = tmp_path / "m.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_mixture(path)
    assert str(caught.value).startswith(f"--mixture={path}: ") and message in str(caught.value)


def test_weights_are_scaled_to_a_sum_of_one(tmp_path):
    (tmp_path / "m.yaml").write_text(
        "{tokens: 1_000, sources: {a: {input: x, weight: 3}, b: {input: [y, z], weight: 1}}}"
    )
    mixture = read_mixture(tmp_path / "m.yaml")
    assert mixture.tokens == 1000 and [s.weight for s in mixture.sources.values()] == [0.75, 0.25]


def test_a_source_that_is_complete_is_kept_when_another_is_repaired(tmp_path, quick, write_input, monkeypatch, capsys):
    write_input(tmp_path, ".jsonl", ["a document of source a"] * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\noops\n')
    sources = {"a": {"input": str(tmp_path / "docs.jsonl"), "weight": 1}, "b": {"input": str(tmp_path / "b.jsonl")}}
    sources["b"]["weight"] = 1
    (tmp_path / "m.yaml").write_text(json.dumps({"tokens": 50, "sources": sources}))
    mixture = ["--mixture", tmp_path / "m.yaml", "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="line 2 is not JSON"):
        quick(*mixture)
    encoded, real = [], workers.encode_unit
    monkeypatch.setattr(workers, "encode_unit", lambda unit, *args: encoded.append(unit.path) or real(unit, *args))
    quick(*mixture, "--skip_bad")
    assert {os.path.basename(path) for path in encoded} == {"b.jsonl"}
    assert "1 bad skipped" in capsys.readouterr().out


def test_a_source_without_text_or_file_is_named(tmp_path, make_job, write_input):
    paths = write_sources(tmp_path, write_input, a=["one"], hollow=[""])
    with pytest.raises(UserError, match="hollow: this source of the mixture contains no text"):
        mix(make_job(tmp_path / "out"), mixture_of(paths, 50, a=1, hollow=1))
    with pytest.raises(UserError, match="nowhere.txt: no such file"):
        mix(make_job(tmp_path / "out2"), mixture_of({"a": "nowhere.txt"}, 50, a=1))
