"""Fill-in-the-middle: a document is kept completely, the rates hold, and the result depends on the text alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepare.inputs import ReadOptions
from data.prepare.job import prepare
from data.prepare.sources import plan
from data.tokenizers.fim import infill_prompt, rearrange, sentinels
from util.errors import UserError

few = settings(max_examples=150, deadline=None)
unicode_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=100)


def original(parts, tokenizer):
    """Returns the document that the parts came from, and their order."""
    pre, mid, suf = sentinels(tokenizer)
    if len(parts) == 1:
        return parts[0], "plain"
    if parts[1] == suf:  # SPM: suffix first, the prefix is followed by the middle
        assert parts[0] == pre and parts[3] == mid
        return parts[4] + parts[5] + parts[2], "spm"
    assert (parts[0], parts[2], parts[4]) == (pre, suf, mid)
    return parts[1] + parts[5] + parts[3], "psm"


@few
@given(text=unicode_text, spm=st.floats(0, 1))
def test_the_parts_reassembled_are_the_document(fim_tokenizer, text, spm):
    parts = rearrange(text, 1.0, spm, fim_tokenizer)
    assert original(parts, fim_tokenizer)[0] == text
    assert rearrange(text, 1.0, spm, fim_tokenizer) == parts
    assert rearrange(text, 0.0, spm, fim_tokenizer) == [text]


@pytest.mark.parametrize("rate, spm", [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (1.0, 1.0), (0.1, 1.0)])
def test_rates_are_kept(fim_tokenizer, rate, spm):
    n = 4000
    orders = [original(rearrange(f"document {i}", rate, spm, fim_tokenizer), fim_tokenizer)[1] for i in range(n)]
    for order, share in {"plain": 1 - rate, "psm": rate * (1 - spm), "spm": rate * spm}.items():
        assert abs(orders.count(order) - n * share) <= 4 * (n * share * (1 - share)) ** 0.5


def test_cuts_are_spread_over_the_whole_document(fim_tokenizer):
    parts = [rearrange("x" * 100 + str(i), 1.0, 0.0, fim_tokenizer) for i in range(3000)]
    prefix, suffix = np.array([[len(p[1]), len(p[3])] for p in parts]).T
    middle = np.array([len(p[5]) for p in parts])
    assert all(30 < lengths.mean() < 38 for lengths in (prefix, middle, suffix))  # a third each
    assert min(prefix.min(), middle.min(), suffix.min()) == 0


def test_a_prompt_is_a_prefix_of_a_training_document(fim_tokenizer):
    pre, mid, suf = sentinels(fim_tokenizer)
    for i in range(5):
        parts = rearrange(f"some text number {i}", 1.0, 0.0, fim_tokenizer)
        trained = sum(([p] if isinstance(p, int) else fim_tokenizer.encode(p) for p in parts), [])
        prompt = infill_prompt(parts[1], parts[3], fim_tokenizer)
        assert trained[: len(prompt)] == prompt and prompt[0] == pre and prompt[-1] == mid and suf in prompt


def test_a_tokenizer_without_sentinels_is_an_error_before_anything_is_written(tmp_path, make_job, write_input):
    units = plan([str(write_input(tmp_path, ".jsonl", ["a", "b"]))], ReadOptions())
    with pytest.raises(UserError, match="gpt2 has no <|fim_prefix|>.*gpt2-fim"):
        prepare(make_job(tmp_path / "out", fim_rate=0.5), units * 2)
    assert not (tmp_path / "out").exists()


def test_shards_contain_the_rearranged_documents(tmp_path, make_job, write_input, whole, fim_tokenizer):
    documents = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
    path = write_input(tmp_path, ".jsonl", documents)
    made = prepare(
        make_job(tmp_path / "out", fim_tokenizer, fim_rate=0.7, val_tokens=50), plan([str(path)], ReadOptions())
    )
    expected = []
    for document in documents:
        expected.append(fim_tokenizer.end_of_text)
        for part in rearrange(document, 0.7, 0.0, fim_tokenizer):
            expected += [part] if isinstance(part, int) else fim_tokenizer.encode(part)
    assert whole(tmp_path / "out") == expected and sentinels(fim_tokenizer)[0] in expected
    assert (made["tokens"], made["documents"]) == (len(expected), 60)
    assert made["text_bytes"] == sum(map(len, documents))  # sentinels count 0
