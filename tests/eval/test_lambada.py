"""LAMBADA: the split of a passage as in lm-evaluation-harness, and scores equal to a plain forward pass."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers.load import load_tokenizer
from eval import lambada
from eval.lambada import Example, read_lambada, summarize, to_example
from eval.reference import LAMBADA_GPT2
from eval.scoring import Score
from util.errors import UserError

EOT = 50256
PASSAGES = [
    ("He looked at the clear stone and said that he would not care about", "signs"),
    ('She gripped his arm. "I can make it there on my own,', "Shane"),
    (
        "A passage that is longer than the model sees at once: " + "one and two and three " * 8 + "and",
        "supercalifragilistic",
    ),
    ("It ends with a space ", "here"),
    ("", "alone"),
]


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "lambada.jsonl"
    rows = [{"context": context, "continuation": word} for context, word in PASSAGES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def known_passage(model):
    """Returns a passage whose last word is one token, the most likely one."""
    tokenizer = load_tokenizer()
    for n in range(1000):
        context = f"After {n} comes"
        ids = tokenizer.encode(context)
        word = tokenizer.decode([int(model(torch.tensor([ids]))[0, -1].argmax())])
        if word[:1] == " " and word[1:].isalpha() and tokenizer.encode(context + word)[:-1] == ids:
            return context, word[1:]
    raise AssertionError("no such passage")


def test_the_scores_of_the_command_equal_a_plain_forward_pass(
    text_checkpoint, passages, gpt_of, plain_losses, evaluate, tmp_path
):
    model, encode, losses = gpt_of(text_checkpoint), load_tokenizer().encode, []
    known = known_passage(model)
    with passages.open("a") as f:
        f.write(json.dumps({"text": " ".join(known)}) + "\n")
    out = evaluate(
        lambada,
        f"--checkpoint={text_checkpoint}",
        f"--input={passages}",
        f"--output={tmp_path}/o.json",
        "--batch_tokens=60",
    )
    found = json.loads((tmp_path / "o.json").read_text())
    for (context, word), detail in zip([*PASSAGES, known], found["details"], strict=True):
        first, both = encode(context.rstrip()), encode(f"{context} {word}")
        ids = ([] if first else [EOT]) + both
        each, likeliest = plain_losses(model, ids[-25:])  # 24 positions
        scored = len(both) - len(first)
        losses.append(float(each[-scored:].sum()))
        assert detail == {"loss": pytest.approx(losses[-1], rel=1e-5), "greedy": bool(likeliest[-scored:].all())}
    assert found["details"][-1]["greedy"] and found["accuracy"] == pytest.approx(1 / 6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 6), rel=1e-4)
    assert found["examples"] == 6 and "6 examples of lambada.jsonl" in out
    assert f"{LAMBADA_GPT2[0].name:24}0.3256            40.06" in out and "all 5,153 examples" in out


def test_accuracy_and_its_standard_error():
    found = summarize([Score(1.0, True), Score(2.0, False), Score(3.0, True), Score(4.0, True)])
    assert (found.accuracy, found.perplexity) == (0.75, math.exp(2.5))
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert math.isnan(summarize([Score(1.0, True)]).stderr)


@settings(deadline=None)
@given(text=st.text(alphabet="ab \n.é", min_size=1).filter(lambda text: text.split(" ")[-1].strip()))
def test_a_text_is_split_at_the_last_space(text):
    words = text.split(" ")  # like the template of the task
    assert to_example({"text": text}, "here") == Example(" ".join(words[:-1]), words[-1])


def test_limit_reads_the_first_examples(passages):
    assert [e.word for e in read_lambada(passages, 2)] == ["signs", "Shane"]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "contains no examples"),
        ("\n", "contains no examples"),
        ('{"text": "a b"}\n{"context": "a"}\n', "line 2: not an object with `text`, or with"),
        ('{"context": 1, "continuation": "b"}\n', "line 1: not an object with text in a field 'context'"),
        ('{"text": "a b "}\n', "line 1: the last word is missing"),
        ('{"text": "a b"\n', "line 1: not JSON"),
        ("[1]\n", "line 1: not an object"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_user_errors_name_file_and_line(tmp_path, content, complaint):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=f"x.jsonl.*{complaint}"):
        read_lambada(path)


@pytest.mark.parametrize(
    "flags, complaint",
    [(["--input=nowhere.jsonl"], "nowhere.jsonl: No such file"), (["--input=x", "--limit=-1"], "--limit=-1")],
)
def test_user_errors_in_flags(evaluate, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate(lambada, "--checkpoint=nowhere", *flags)


def test_an_existing_results_file_is_kept(passages, evaluate):
    with pytest.raises(UserError, match="exists; choose another name"):
        evaluate(lambada, "--checkpoint=x", f"--input={passages}", f"--output={passages}")
    assert Path(passages).read_text().count("\n") == 5
