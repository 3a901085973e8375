"""lm-evaluation-harness on a checkpoint, and eval/hellaswag.py: the results equal the library's for transformers."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval.hellaswag as hellaswag
import eval.lm_eval as command
from cfg.config import load_config
from data.tokenizers.hf_json import _byte_letters
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import END_OF_TEXT
from eval.generate import Sampling
from model.gpt import GPT
from train.checkpoint_writer import CheckpointWriter
from train.optim import make_optimizer
from util.errors import UserError
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
POSITIONS, EMBD, LAYERS, HEADS = 48, 16, 2, 2
WORDS = "a the boy mixes flour and Water in red bowl, then He puts it away. don't naïve 3 “so” [x] ALL of it".split()
MARKS = ["[header]", " [title]", "[substeps]", "[step]", " ", "  ", "...", "\n"]

HELLASWAG = """
task: like_hellaswag
output_type: multiple_choice
process_docs: !function utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAMBADA = """
task: like_lambada
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
"""
WIKITEXT = """
task: like_wikitext
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = """
task: like_answers
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [STOPS], max_gen_toks: 14, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
BLIMP = """
task: like_blimp
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[text, text.lower()]}}"
metric_list: [{metric: acc}]
"""


# The tasks


def words(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def marked(rng, low, high):
    return words(rng, low, high) + rng.choice(MARKS) + words(rng, 1, 4)


def hellaswag_row(rng):
    """Returns an example like the official ones: with WikiHow markup or not, longer than the context or not."""
    first, second = marked(rng, 1, 50), rng.choice(["", words(rng, 1, 3).upper(), marked(rng, 1, 5)])
    return {
        "activity_label": rng.choice(["Baking cookies", "How to [substeps] be", "x"]),
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}".strip(),
        "endings": [rng.choice(["", "[step] "]) + marked(rng, 1, 9) for _ in range(4)],
        "label": rng.randrange(4),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each kind and its data."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    texts = [{"text": marked(rng, 3, length)} for length in (4, 5, 6, 8, 30, 60, 200)]
    (folder / "utils.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    rows = {HELLASWAG: [hellaswag_row(rng) for _ in range(24)], LAMBADA: texts, WIKITEXT: texts, ANSWERS: texts}
    for yaml, examples in (rows | {BLIMP: texts[:5]}).items():
        name = yaml.split()[1]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
        where = {"cache_dir": str(folder / "cache"), "data_files": {"validation": str(folder / f"{name}.jsonl")}}
        common = f"dataset_path: json\ndataset_kwargs: {json.dumps(where)}\nvalidation_split: validation\n"
        (folder / f"{name}.yaml").write_text(common + yaml.replace("STOPS", '"\\n", "sh", "ic"'))
    return folder


TASKS = [yaml.split()[1] for yaml in (HELLASWAG, LAMBADA, WIKITEXT, ANSWERS, BLIMP)]


# The models: the same weights for transformers and for rawgpt


def merges_of(ranks):
    """Yields the pair that each token of several bytes is merged from, by applying the earlier merges to its bytes."""
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            found = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            best, at = min(found)
            assert best < rank
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder, ranks = tmp_path_factory.mktemp("hf"), load_tokenizer().ranks
    letters = {b: letter for letter, b in _byte_letters().items()}
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    bpe = tokenizers.models.BPE(
        {spell(t): i for t, i in ordered}, [(spell(a), spell(b)) for a, b in merges_of(dict(ordered))]
    )
    library = tokenizers.Tokenizer(bpe)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    end = dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
    PreTrainedTokenizerFast(tokenizer_object=library, clean_up_tokenization_spaces=False, **end).save_pretrained(folder)
    model = GPT2LMHeadModel(GPT2Config(n_positions=POSITIONS, n_embd=EMBD, n_layer=LAYERS, n_head=HEADS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("ln_" in name and "weight" in name))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(hf_folder, tmp_path_factory):
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("run")
    shape = [f"--n_embd={EMBD}", f"--n_layer={LAYERS}", f"--n_head={HEADS}", f"--sequence_length={POSITIONS}"]
    config = load_config([*shape, "--vocab_size=50257", f"--output_dir={folder}", "--device=cpu"], world_size=1)
    ours, source = GPT(config), GPT2LMHeadModel.from_pretrained(hf_folder).transformer.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            value = source[name].t() if name.endswith("weight") and "c_" in name else source[name]
            parameter[: len(value)] = value  # the vocabulary is padded
    saver = CheckpointWriter(config, Ranks(0, 0, 1, torch.device("cpu")))
    saver.save(1, ours, make_optimizer(ours, config, 1), {"tokenizer": load_tokenizer().fingerprint})
    return folder


@pytest.fixture(scope="module")
def theirs(hf_folder, tasks):
    """The library's results for its Hugging Face model, one example at a time."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = HFLM(str(hf_folder), device="cpu", dtype="float32", batch_size=1)
    return simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)


def run(*flags):
    args = command.parser().parse_args([*map(str, flags), "--device=cpu"])
    command.check(args)
    command.main(args)


@pytest.fixture(scope="module")
def found(checkpoint, tasks, tmp_path_factory):
    """The results of the command for the same weights."""
    import lm_eval.evaluator

    output = tmp_path_factory.mktemp("found") / "found.json"
    evaluate = lm_eval.evaluator.evaluate
    with pytest.MonkeyPatch.context() as patch:  # the bootstrap of the perplexities is slow
        patch.setattr(lm_eval.evaluator, "evaluate", lambda **kw: evaluate(**kw | {"bootstrap_iters": 0}))
        run(
            f"--checkpoint={checkpoint}",
            f"--tasks={','.join(TASKS)}",
            f"--include_path={tasks}",
            "--log_samples",
            f"--output={output}",
        )
    return json.loads(output.read_text())


def resps(results, task):
    """Returns the answers of the model to each example, in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [[answer for request in sample["resps"] for answer in request] for sample in samples]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_equal_those_of_the_librarys_model(task, found, theirs):
    ours, reference = ({k: v for k, v in r["results"][task].items() if isinstance(v, float)} for r in (found, theirs))
    assert len(ours) >= 1 and ours == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_answer_equals_that_of_the_librarys_model(task, found, theirs):
    mine, its = resps(found, task), resps(theirs, task)
    assert len(mine) == len(its) > 4
    for ours, reference in zip(mine, its, strict=True):
        if task == "like_answers":
            assert ours == reference
        elif task == "like_wikitext":
            assert ours == pytest.approx(reference, rel=1e-5)
        else:
            assert [a[0] for a in ours] == pytest.approx([a[0] for a in reference], rel=1e-5)
            assert [a[1] for a in ours] == [a[1] for a in reference]


def test_the_tasks_cover_the_interesting_cases(theirs, tasks):
    """Contexts that fit or not, answers that end at a stop string or not."""
    encode = load_tokenizer().encode
    lengths = [len(encode(a[0])) for s in theirs["samples"]["like_hellaswag"] for a in s["arguments"]]
    assert min(lengths) + 15 < POSITIONS < max(lengths)
    lengths = sorted(len(encode(answer)) for (answer,) in resps(theirs, "like_answers"))
    assert 0 < lengths[0] < lengths[-1] == 14


@pytest.mark.parametrize("flag", ["hf", "checkpoint"])
def test_our_hellaswag_equals_the_librarys_example_by_example(flag, request, tasks, theirs, tmp_path):
    folder = request.getfixturevalue("hf_folder" if flag == "hf" else flag)
    args = hellaswag.parser().parse_args(
        [f"--{flag}={folder}", f"--input={tasks}/like_hellaswag.jsonl", f"--output={tmp_path}/x.json"]
    )
    hellaswag.main(args)
    ours = json.loads((tmp_path / "x.json").read_text())
    samples = sorted(theirs["samples"]["like_hellaswag"], key=lambda sample: sample["doc_id"])
    for detail, sample in zip(ours["details"], samples, strict=True):
        values = [value for ((value, _),) in sample["resps"]]
        assert [-loss for loss in detail["lm_eval"]["losses"]] == pytest.approx(values, abs=1e-4)
        per_character = [v / len(choice) for v, choice in zip(values, sample["doc"]["choices"], strict=True)]
        assert detail["lm_eval"]["acc"] == values.index(max(values))
        assert detail["lm_eval"]["acc_norm"] == per_character.index(max(per_character))
        assert (detail["lm_eval"]["acc"] == detail["label"]) == sample["acc"]
        assert (detail["lm_eval"]["acc_norm"] == detail["label"]) == sample["acc_norm"]
    for metric in ("acc", "acc_norm"):
        assert ours["lm_eval"][metric]["value"] == theirs["results"]["like_hellaswag"][f"{metric},none"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([*MARKS, *WORDS, "[", "]", "\t", "\xa0"]), st.text(max_size=5))).map("".join))
@example(" [title] x [title]  [header]  y\n[a\nb] [[c] ]")
def test_cleaning_equals_the_librarys(text):
    from lm_eval.tasks.hellaswag.utils import preprocess

    assert hellaswag.clean(text) == preprocess(text)


# Log-likelihoods


ids = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(st.lists(st.tuples(ids, ids), max_size=40))
def test_groups_contain_every_pair(pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "MAX_SHARED", 9)
        requests, places = command.group(pairs)
    assert [(requests[r].context, requests[r].continuations[e]) for r, e in places] == pairs
    assert sum(len(request.continuations) for request in requests) == len(pairs)
    for request in requests:
        assert sum(map(len, request.continuations)) <= 9 and (
            len(request.context) > 1 or len(request.continuations) == 1
        )
    roomy = Counter(tuple(context) for context, _ in pairs if len(context) > 1)
    assert len(command.group(pairs)[0]) == len(roomy) + sum(len(context) == 1 for context, _ in pairs)


@pytest.fixture(scope="module")
def model(checkpoint):
    return command.load_eval_model(
        command.parser().parse_args([f"--checkpoint={checkpoint}", "--tasks=x", "--device=cpu"])
    )


def test_a_batch_does_not_change_log_likelihoods(model):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(50257, (n,), generator=generator).tolist()  # noqa: E731
    contexts = [draw(n) for n in (0, 1, 2, 20, 47, 100)]
    pairs = [(contexts[i % 6], draw(1 + i % 7)) for i in range(40)] + [(contexts[3], []), ([], draw(60))]
    together = command.loglikelihoods(model, pairs)
    alone = [command.loglikelihoods(model, [pair])[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert together[-2] == (0.0, True)
    end = model.text.end_of_text
    after_end = command.loglikelihoods(model, [([end], pairs[0][1])])
    assert together[0] == pytest.approx(after_end[0], abs=1e-4)
    assert command.loglikelihoods(model, []) == [] and command.text_loglikelihoods(model, [""]) == [0.0]


# Answers


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (Sampling(0.0, 50, 1.0), (), 256)),
        ({"until": "\n", "max_gen_toks": 5, "max_tokens": 9}, (Sampling(0.0, 50, 1.0), ("\n",), 5)),
        ({"until": ["a", "", "b"], "max_new_tokens": "7"}, (Sampling(0.0, 50, 1.0), ("a", "b"), 7)),
        ({"do_sample": False, "temperature": 1}, (Sampling(0.0, 50, 1.0), (), 256)),
        ({"temperature": 0.5, "top_p": 0.9, "until": None}, (Sampling(0.5, 50, 0.9), (), 256)),
        ({"do_sample": True, "temperature": 1.0, "top_k": 0, "num_beams": 1}, (Sampling(1.0, 0, 1.0), (), 256)),
    ],
)
def test_generation_kwargs(options, expected):
    assert command.generation_settings(options) == command.GenerationSettings(*expected)


@pytest.mark.parametrize("options, name", [({"num_beams": 4}, "num_beams"), ({"penalty_alpha": 1}, "penalty_alpha")])
def test_unknown_generation_kwargs_are_an_error(options, name):
    with pytest.raises(UserError, match=f"--tasks: a task has {name} in its generation_kwargs"):
        command.generation_settings(options)


def test_answers_do_not_depend_on_their_batch(model):
    texts = ["", "a", "the boy mixes flour and", "Water in red bowl, then He", "x " * 60, "x " * 30]
    greedy, sampled = {"max_gen_toks": 10}, {"max_gen_toks": 10, "temperature": 1.0}
    requests = [(text, greedy) for text in texts]
    together = command.answers(model, requests, torch.float32)
    assert together == [command.answers(model, [one], torch.float32)[0] for one in requests]
    drawn = command.answers(model, [("a", sampled)] * 4 + requests, torch.float32)
    assert len(set(drawn[:4])) == 4 and drawn[4:] == together
    assert command.answers(model, [("a", sampled)] * 4, torch.float32) == drawn[:4]


def test_an_answer_longer_than_the_context(model):
    (text,) = command.answers(model, [("a b c", {"max_gen_toks": POSITIONS + 20})], torch.float32)
    (start,) = command.answers(model, [("a b c", {"max_gen_toks": POSITIONS - 10})], torch.float32)
    assert text.startswith(start) and len(text) > len(start)


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_batches_contain_every_prompt_and_keep_the_size_limit(model, size):
    prompts = [[1] * (n * 7 % 60 + 1) for n in range(30)]
    settings = command.GenerationSettings(Sampling(), (), 8)
    model = replace(model, batch_tokens=size)
    found = command.batches(list(range(30)), prompts, settings, model)
    assert sorted(i for batch in found for i in batch) == list(range(30))
    lengths = [[len(prompts[i]) for i in batch] for batch in found]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)
    assert all(len(batch) == 1 or len(batch) * (min(batch[0], 40) + 8) <= size for batch in lengths)
    assert len(found) == 30 if size == 1 else len(found) < 30


def test_an_answer_ends_at_a_stop_string_or_end_of_text(model, monkeypatch):
    encode, end = model.checkpoint.tokenizer.encode, model.text.end_of_text
    written = [encode("one. two") + [end] + encode(" more"), encode("one two") + [60000] + encode("? three? fo")]
    length = max(map(len, written))
    steps = zip(*[row + [13] * (length - len(row)) for row in written], strict=True)
    monkeypatch.setattr(command, "generate", lambda *_: map(list, steps))
    texts = command.answers(model, [("b", {"until": ["? fo", "ee"]}), ("a", {"until": ["? fo", "ee"]})], torch.float32)
    assert texts == ["one. two", "one two�? thr"]


# The command


def test_the_printed_table_and_the_results_file(checkpoint, tasks, tmp_path, capsys):
    flags = [f"--checkpoint={checkpoint}", f"--include_path={tasks}", "--tasks=like_hellaswag, like_blimp"]
    run(*flags, "--limit=3", "--num_fewshot=1", f"--output={tmp_path}/x.json")
    out = capsys.readouterr().out
    assert "step_00000001, float32, the first 3 examples" in out and "|like_hellaswag|" in out and "acc_norm" in out
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["n-samples"]["like_hellaswag"]["effective"] == 3 and "samples" not in results
    assert results["n-shot"]["like_hellaswag"] == 1
    assert results["config"]["step"] == 1 and results["config"]["checkpoint"].startswith(str(checkpoint))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=,"], "--tasks is empty"),
        (["--tasks=x", "--limit=-1"], "--limit=-1"),
        (["--tasks=x", "--limit=1.5"], "--limit: invalid int value"),
        (["--tasks=x", "--num_fewshot=-1"], "--num_fewshot=-1"),
        (["--tasks=x", "--include_path=nowhere"], "--include_path=nowhere: no such folder"),
        (["--tasks=x", "--log_samples"], "--log_samples: name a file for the samples with --output"),
        (["--tasks=x", "--hf=gpt2"], "--hf=gpt2: only --checkpoint is supported; use `lm_eval --model hf"),
        ([], "--tasks"),
    ],
)
def test_user_errors_in_flags(flags, message):
    with pytest.raises(UserError, match=message.replace("--", "(--)?", 1)):
        command.check(command.parser().parse_args(["--checkpoint=run", *flags]))


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="start it with python instead of torchrun"):
        command.check(command.parser().parse_args(["--checkpoint=run", "--tasks=x"]))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm-eval is not installed; pip install"):
        command.check(command.parser().parse_args(["--checkpoint=run", "--tasks=x"]))


@pytest.fixture
def few_tasks(monkeypatch):
    """The library without its built-in tasks, which take ten seconds to list."""
    from lm_eval import tasks

    real = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path, **_: real(include_path=include_path, include_defaults=False)
    )


def test_tasks_by_name_and_pattern(few_tasks, tasks):
    def find(names):
        flags = ["--checkpoint=x", f"--tasks={names}", f"--include_path={tasks}"]
        return command.find_tasks(command.parser().parse_args(flags))[0]

    assert find("like_blimp,like_answers") == ["like_blimp", "like_answers"]
    assert find("like_w*,like_b*") == ["like_blimp", "like_wikitext"]
    with pytest.raises(UserError, match="lm-eval has no task like_hellaswg; did you mean like_hellaswag?"):
        find("like_blimp,like_hellaswg")


@pytest.mark.parametrize(
    "yaml, message",
    [
        (
            "dataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}",
            "FileNotFoundError.*nowhere.*its data must be on this machine",
        ),
        (
            "dataset_path: nobody/nothing",
            "Couldn't reach 'nobody/nothing' on the Hub.*its data must be on this machine",
        ),
        ("dataset_path: json\nunsafe_code: true", "marked as unsafe"),
    ],
)
def test_a_task_that_cannot_be_prepared_is_a_user_error(yaml, message, model, tasks, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if "unsafe" in yaml:
        yaml = (tasks / "like_answers.yaml").read_text().replace("task: like_answers", "task: mine\nunsafe_code: true")
    else:
        yaml = f"task: mine\noutput_type: loglikelihood_rolling\n{yaml}\n"
    (tmp_path / "mine.yaml").write_text(yaml)
    with pytest.raises(UserError, match=message) as caught:
        run(f"--checkpoint={checkpoint}", "--tasks=mine", f"--include_path={tmp_path}")
    assert str(caught.value).startswith("--tasks=mine: lm-eval cannot prepare it (")


def test_a_diverged_model_is_a_user_error(tasks, checkpoint, monkeypatch):
    def fail(*_):
        raise FloatingPointError("the model's logits are not finite")

    monkeypatch.setattr(command, "generate", fail)
    with pytest.raises(UserError, match="step_00000001: the model's logits are not finite in float32; try --dtype"):
        run(f"--checkpoint={checkpoint}", "--tasks=like_answers", f"--include_path={tasks}")


def test_an_internal_error_keeps_its_traceback(model, tasks, checkpoint, monkeypatch):
    monkeypatch.setattr(command, "loglikelihoods", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(f"--checkpoint={checkpoint}", "--tasks=like_blimp", f"--include_path={tasks}")


@pytest.mark.slow
def test_the_command_file_does_not_hide_the_library_of_the_same_name(tasks, tmp_path):
    flags = ["--checkpoint=nowhere", "--tasks=like_blimp", f"--include_path={tasks}"]
    done = subprocess.run([sys.executable, ROOT / "eval/lm_eval.py", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: nowhere: no such checkpoint or run directory\n")
