"""The two styles of HellaSwag: encoding, accuracies, and the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.hellaswag import Example, read_hellaswag
from data.tokenizers.load import load_tokenizer
from eval import hellaswag
from eval.cli import write_results
from eval.encoding import text_encoder
from eval.hellaswag import (
    Question,
    accuracies,
    clean,
    lm_eval_question,
    make_questions,
    read_examples,
    to_record,
    to_requests,
)
from eval.reference import GPT2
from eval.scoring import Request, Score
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = ["is using wrap [substeps] to wrap skis.", "rips level  tiles off.", "holds a cube.", " starts [title] up."]
ROW = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ENDINGS,
    "label": 3,
}
WORDS = "a man sits on the roof of his house and rips level tiles off while two dogs bark at him".split()


def rows(count, seed=0):
    """Yields examples of random words, so that only chance is right."""
    generator = torch.Generator().manual_seed(seed)

    def text(low, high):
        n = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())

    for _ in range(count):
        first, second = text(3, 15), text(1, 4)
        yield {
            "activity_label": text(1, 3),
            "ctx_a": first,
            "ctx_b": second,
            "ctx": f"{first} {second}",
            "endings": [text(2, 9) for _ in range(4)],
            "label": int(torch.randint(4, (), generator=generator)),
        }


def write(path, examples):
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    return path


@pytest.fixture(scope="module")
def encode():
    return load_tokenizer().encode


def test_the_completion_style_encodes_texts_unchanged(encode, tmp_path):
    [example] = read_examples(write(tmp_path / "x.jsonl", [ROW]), 0)
    question = make_questions([example], text_encoder(load_tokenizer()))["completion"][0]
    assert question.request.context == encode("A man is sitting on a roof. he")
    assert question.request.continuations == [encode(" " + ending) for ending in ENDINGS]
    assert question.lengths == [len(encode(" " + ending)) for ending in ENDINGS]
    assert question.label == 3


def test_the_lm_eval_style_labels_capitalises_and_cleans(encode, tmp_path):
    [example] = read_examples(write(tmp_path / "x.jsonl", [ROW]), 0)
    question = lm_eval_question(example, encode, [0])
    assert question.request.context == encode("Roof shingle removal: A man is sitting on a roof. He")
    cleaned = ["is using wrap to wrap skis.", "rips level tiles off.", "holds a cube.", "starts. up."]
    assert [clean(ending) for ending in ENDINGS] == cleaned
    assert question.request.continuations == [encode(" " + clean(ending)) for ending in ENDINGS]
    assert question.lengths == [len(clean(ending)) for ending in ENDINGS]  # characters


def test_choices_by_sum_and_by_length():
    question = Question(Request([1], [[1]] * 4), [1, 2, 4, 0], label=2)
    scores = [Score(2.0, False), Score(2.0, False), Score(3.0, False), Score(9.0, False)]
    assert question.choices(scores) == {"acc": 0, "acc_norm": 2}  # ties: the first; an empty ending: never
    assert question.choices([*scores[:3], Score(math.nan, False)]) == {"acc": -1, "acc_norm": -1}


def test_accuracy_and_its_standard_error():
    questions = {s: [Question(Request([1], [[1]] * 4), [1] * 4, label=0)] * 8 for s in hellaswag.STYLES}
    right, wrong = ([Score(float(x), False) for x in losses] for losses in ((1, 2, 2, 2), (2, 1, 2, 2)))
    found = accuracies(questions, [right] * 2 + [wrong] * 6 + [right] * 8)
    # The standard deviation of a sample of 2 ones and 6 zeros, divided by the root of its size.
    deviation = torch.tensor([1.0] * 2 + [0.0] * 6).std().item()
    assert found["completion"]["acc"].value == 0.25
    assert found["completion"]["acc"].stderr == pytest.approx(deviation / math.sqrt(8))
    assert (found["lm_eval"]["acc_norm"].value, found["lm_eval"]["acc_norm"].stderr) == (1.0, 0.0)
    assert to_record(found) == {
        "hellaswag_acc": 0.25,
        "hellaswag_acc_norm": 0.25,
        "hellaswag_lm_eval_acc": 1.0,
        "hellaswag_lm_eval_acc_norm": 1.0,
    }
    shown = hellaswag.format_table("step 7", found)
    assert "0.2500 ± 0.1637" in shown
    assert all(r.name in shown for r in GPT2) and "0.2955" in shown and "0.5089" in shown


@pytest.mark.slow
def test_an_untrained_model_has_the_accuracy_of_chance(text_checkpoint, evaluate, tmp_path):
    path = write(tmp_path / "random.jsonl", rows(500))
    output = tmp_path / "out.json"
    shown = evaluate(hellaswag, f"--checkpoint={text_checkpoint}", f"--input={path}", f"--output={output}")
    results = json.loads(output.read_text())
    assert "500 examples" in shown and len(results["details"]) == 500
    for style in hellaswag.STYLES:
        for metric in hellaswag.METRICS:
            accuracy = results[style][metric]
            right = [row["label"] == row[style][metric] for row in results["details"]]
            assert accuracy["value"] == sum(right) / 500 == pytest.approx(0.25, abs=0.06)  # 3 standard errors


@pytest.mark.slow
def test_limit_batches_and_ranks_do_not_change_the_results(text_checkpoint, evaluate, tmp_path):
    path = write(tmp_path / "random.jsonl", rows(12))
    flags = [f"--checkpoint={text_checkpoint}", f"--input={path}", "--device=cpu"]
    evaluate(hellaswag, *flags, "--batch_tokens=300", f"--output={tmp_path}/alone.json")
    evaluate(hellaswag, *flags, "--batch_tokens=1", "--limit=5", f"--output={tmp_path}/small.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *torchrun,
        str(ROOT / "eval/hellaswag.py"),
        *flags,
        "--batch_tokens=300",
        f"--output={tmp_path}/ranks.json",
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("HellaSwag,") == 1  # only rank 0 prints
    alone, ranks, small = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "ranks", "small"))
    assert ranks == alone  # all digits
    assert small["examples"] == 5
    for a, b in zip(small["details"], alone["details"], strict=False):
        for style in hellaswag.STYLES:
            assert a[style]["losses"] == pytest.approx(b[style]["losses"], rel=1e-5)
            assert a[style]["acc"] == b[style]["acc"]


def test_user_errors(text_checkpoint, evaluate, tmp_path):
    def error(*flags):
        with pytest.raises(UserError) as caught:
            evaluate(hellaswag, *flags)
        return str(caught.value)

    good = write(tmp_path / "good.jsonl", rows(2))
    model = f"--checkpoint={text_checkpoint}"
    without = [{k: v for k, v in ROW.items() if k != "ctx_a"}]
    assert "line 2: no field 'ctx_a'" in error(model, f"--input={write(tmp_path / 'a.jsonl', [ROW, *without])}")
    assert "ctx_b is not text" in error(model, f"--input={write(tmp_path / 'b.jsonl', [{**ROW, 'ctx_b': 3}])}")
    (tmp_path / "empty.jsonl").touch()
    assert "contains no examples" in error(model, f"--input={tmp_path / 'empty.jsonl'}")
    assert "no such file" in error(model, f"--input={tmp_path / 'none.jsonl'}")
    assert "no such checkpoint" in error(f"--checkpoint={tmp_path / 'nowhere'}", f"--input={good}")
    assert "contains no checkpoint" in error(f"--checkpoint={tmp_path}", f"--input={good}")
    assert "no config.json" in error(f"--hf={tmp_path}", f"--input={good}")
    assert "no such folder" in error(f"--hf={tmp_path / 'nowhere'}", f"--input={good}")
    (tmp_path / "config.json").write_text("{}")
    assert "transformers cannot load it" in error(f"--hf={tmp_path}", f"--input={good}")
    assert "--limit=-1" in error(model, "--limit=-1", f"--input={good}")
    assert "--batch_tokens=-1" in error(model, "--batch_tokens=-1", f"--input={good}")
    assert "exists" in error(model, f"--input={good}", f"--output={good}")
    assert "cannot be written" in error(model, f"--input={good}", f"--output={tmp_path / 'no/where.json'}")
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000)
    assert "line 1: not JSON" in error(model, f"--input={deep}")
    assert "--checkpoint" in error(f"--input={good}")


def test_a_context_that_cleaning_has_emptied_becomes_end_of_text(encode):
    example = Example("x", ["a", "b", "c", "d"], 0, ("[x", "y]", ""))
    assert lm_eval_question(example, encode, [50256]).request.context == [50256]


def test_one_example_has_no_standard_error_and_results_are_written_without_a_terminal(text_checkpoint, tmp_path):
    path, output = write(tmp_path / "one.jsonl", [ROW]), tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "eval/hellaswag.py"), f"--checkpoint={text_checkpoint}", f"--input={path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    reading, writing = os.pipe()
    os.close(reading)  # as if the terminal were closed
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [*command, f"--output={output}"], env=env, stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 141 and "Traceback" not in done.stderr
    assert json.loads(output.read_text())["completion"]["acc"]["stderr"] is None
    again = subprocess.run([*command, f"--output={output}"], env=env, capture_output=True, text=True)
    assert again.returncode == 2 and "exists" in again.stderr


def test_results_do_not_overwrite_a_file_created_since_the_start(tmp_path, capsys):
    output = tmp_path / "out.json"
    output.write_text("mine")
    write_results(output, {"loss": float("inf")}, "shown")
    assert output.read_text() == "mine" and json.loads((tmp_path / "out_.json").read_text()) == {"loss": None}
    assert "out_.json" in capsys.readouterr().out


def test_the_fields_of_lm_eval_are_read_on_request(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW])
    assert next(read_hellaswag(path)).parts is None
    assert next(read_hellaswag(path, with_parts=True)) == Example(
        ROW["ctx"], ENDINGS, 3, ("Roof shingle removal", "A man is sitting on a roof.", "he")
    )
    assert to_requests({s: [] for s in hellaswag.STYLES}) == []
