"""Perplexity: every token is scored once with enough context, as a plain scorer does. And the command."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows

from data.documents import document_positions
from data.loader import Loader
from data.prepare.inputs import ReadOptions
from data.shards import open_shard, write_shard
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import NAMED_FINGERPRINTS
from eval import lm_eval, perplexity, texts
from eval.model import load_eval_model
from eval.perplexity import measure, segments, split_by_document, strided_windows, to_requests
from eval.texts import Text, count_bytes, open_texts, truncate
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EOT = 50256
STORY = "Once upon a time,\r\nthere was naïve 東京 🙂.\n\n" * 4
unhurried = settings(deadline=None)
LENGTHS = st.integers(2, 80)


@st.composite
def windows_and_strides(draw):
    window = draw(st.integers(1, 20))
    return window, draw(st.integers(1, window))


def text_of(ids):
    ids = np.array(ids, np.int32)
    return Text(len(ids), lambda start, stop: ids[start:stop])


def load(run, *flags, needs_tokenizer=False):
    args = perplexity.parser().parse_args([f"--checkpoint={run}", "--input=x", "--device=cpu", *flags])
    return load_eval_model(args, needs_tokenizer)


@pytest.fixture(scope="module")
def model(text_checkpoint):
    return load(text_checkpoint, needs_tokenizer=True)


@pytest.fixture(scope="module")
def model_251(checkpoint):
    return load(checkpoint)


# Windows


@unhurried
@given(length=LENGTHS, sizes=windows_and_strides())
def test_every_token_but_the_first_is_scored_once_with_its_context(length, sizes):
    window, stride = sizes
    found = list(strided_windows(length, window, stride))
    assert [t for _, first, end in found for t in range(first, end)] == list(range(1, length))
    for start, first, end in found:
        assert end - start <= window + 1 and first - start >= min(first, window - stride + 1)


@unhurried
@given(length=LENGTHS, window=st.integers(1, 20))
def test_a_stride_of_the_window_equals_lm_evals_rolling_windows(length, window):
    ids = list(range(1000, 1000 + length))
    theirs = get_rolling_token_windows(ids[1:], prefix_token=ids[0], max_seq_len=window, context_len=1)
    scored = [(inputs[: len(inputs) - len(targets) + 1], targets) for inputs, targets in theirs]
    assert [(r.context, *r.continuations) for r in to_requests(text_of(ids), window, window, None)] == scored


@unhurried
@given(
    ids=st.lists(st.integers(0, 3), min_size=2, max_size=80),
    sizes=windows_and_strides(),
    masked=st.booleans(),
    segment=st.integers(1, 200),
    block=st.integers(1, 30),
)
def test_segments_and_documents_skip_no_token(ids, sizes, masked, segment, block):
    window, stride = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "BLOCK", block)
        requests = list(to_requests(text_of(ids), window, stride, 0 if masked else None))
    assert [r for part in segments(requests, segment) for r in part] == requests
    assert [i for r in requests for i in r.continuations[0]] == ids[1:]
    at = 1
    for r in requests:
        assert r.context == ids[at - len(r.context) : at] and len(r.context) - 1 + len(r.continuations[0]) <= window
        begins = max((i for i in range(at) if ids[i] == 0), default=0) if masked else 0
        assert len(r.context) >= min(at - begins, window - stride + 1)
        if masked:
            assert 0 not in r.context[1:] and 0 not in r.continuations[0][:-1]
        at += len(r.continuations[0])


def test_a_window_is_split_by_document():
    ids = np.array([5, 0, 6, 7, 0, 0, 8, 0])
    cut_up = [(r.context, *r.continuations) for r in split_by_document(ids, 3, 0)]
    assert cut_up == [([0, 6], [7, 0]), ([0], [0]), ([0], [8, 0])]


@unhurried
@given(lengths=st.lists(st.integers(0, 9), max_size=5), limit=st.integers(0, 30))
def test_max_tokens_keeps_the_first_tokens(lengths, limit):
    kept = truncate([text_of(range(n)) for n in lengths], limit)
    scored = sum(max(0, n - 1) for n in lengths)
    assert sum(t.length - 1 for t in kept) == (min(limit, scored) if limit else scored)
    assert all(t.length > 1 for t in kept)


def test_bytes_are_counted_from_files_or_from_tokens():
    whole = replace(text_of([9, 1, 2, 3]), bytes=100)
    lengths = np.arange(10)
    assert count_bytes([whole, text_of([9, 1, 2])], lengths) == 103
    assert count_bytes([whole], None) == 100 and count_bytes([whole, text_of([9, 1])], None) is None
    assert count_bytes(truncate([whole], 2), lengths) == 3 and count_bytes(truncate([whole], 2), None) is None


# Losses


def plain_sum(model, ids, window, stride, losses):
    """Sums the losses of the new tokens of each window, with one forward pass per window."""
    total, first, end = 0.0, 1, min(window + 1, len(ids))
    while first < len(ids):
        total += float(losses(model, ids[max(0, end - window - 1) : end])[0][first - end :].sum())
        first, end = end, min(end + stride, len(ids))
    return total


@pytest.fixture(scope="module")
def ids():
    return [EOT, *np.random.default_rng(0).integers(0, EOT, 99).tolist()]


@pytest.mark.parametrize("window, stride", [(24, 24), (24, 12), (24, 1), (7, 3)])
def test_losses_equal_those_of_a_plain_scorer(model, ids, window, stride, plain_losses):
    expected = plain_sum(model.checkpoint.gpt, ids, window, stride, plain_losses)
    assert measure(model, [text_of(ids)], window, stride) == (pytest.approx(expected, rel=1e-6), 99)


def test_losses_do_not_depend_on_batches_and_segments(model, ids):
    texts = [text_of(ids), text_of(ids[:5]), text_of(ids[::-1])]
    expected, tokens = measure(model, texts, 24, 9)
    for batch_tokens, segment in ((1, 2**22), (100, 1), (4096, 200)):
        found = measure(replace(model, batch_tokens=batch_tokens), texts, 24, 9, segment)
        assert found == (pytest.approx(expected, rel=1e-7), tokens)


@pytest.mark.parametrize("stride", [24, 5])
def test_attention_stays_within_documents_if_it_did_in_training(model, stride, plain_losses):
    ids = np.random.default_rng(1).integers(0, EOT, 80)
    ids[[0, 3, 4, 40, 77]] = EOT
    ids, expected = ids.tolist(), 0.0
    for start, first, end in strided_windows(80, 24, stride):
        for t in range(first, end):  # one token at a time, given its context
            begins = max((i for i in range(start, t) if ids[i] == EOT), default=start)
            expected += float(plain_losses(model.checkpoint.gpt, ids[begins : t + 1])[0][-1])
    masked = replace(model, document_separator=EOT)
    assert measure(masked, [text_of(ids)], 24, stride) == (pytest.approx(expected, rel=1e-6), 79)
    assert measure(model, [text_of(ids)], 24, stride)[0] != pytest.approx(expected, rel=1e-4)


# The command


def read(path):
    return json.loads(Path(path).read_text())


WHOLE = ["--stride=32", "--max_tokens=2976"]  # 93 windows of 32 without overlap


@pytest.mark.parametrize("doc_mask", [False, True])
def test_a_stride_of_the_window_equals_validation(model_251, shards, doc_mask):
    paths = sorted(shards.glob("*_val_*.bin"))
    rows = Loader([open_shard(path, 251) for path in paths], 32, 1, 0, False, "x").gather(list(range(93))).long()
    model = replace(model_251, document_separator=7 if doc_mask else None)
    positions = document_positions(rows[:, :-1], 7) if doc_mask else None
    with torch.no_grad():
        loss, count = model.checkpoint.gpt.loss(rows[:, :-1], rows[:, 1:], positions)
    texts = truncate(open_texts(paths, [], ReadOptions(), model, Counter()), 2976)
    assert measure(model, texts, 32, 32) == (pytest.approx(loss.item(), rel=1e-6), count.item())


@pytest.mark.slow
def test_a_stride_of_the_window_gives_the_validation_loss_of_the_run(trainer, shards, metrics, evaluate, tmp_path):
    trainer.run(tmp_path / "run", "--val_max_steps=1000")
    flags = [f"--checkpoint={tmp_path}/run", f"--input={shards}/*_val_*.bin", f"--output={tmp_path}/o.json", *WHOLE]
    evaluate(perplexity, *flags)
    assert read(tmp_path / "o.json")["loss"] == pytest.approx(metrics(tmp_path / "run")[-1]["val_loss"], rel=1e-6)


def test_shards_without_a_tokenizer(checkpoint, model_251, shards, evaluate, tmp_path, plain_losses):
    flags = [f"--checkpoint={checkpoint}", "--input", f"{shards}/*_val_*.bin", *WHOLE]
    out = evaluate(perplexity, *flags, "--output", tmp_path / "out.json")
    found = read(tmp_path / "out.json")
    loss = plain_sum(model_251.checkpoint.gpt, (np.arange(2977) % 251).tolist(), 32, 32, plain_losses) / 2976
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["bits_per_byte"] is found["bytes"] is None
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5) and found["tokens"] == 2976
    assert f"loss {loss:.4f} nats" in out and "bits per byte unknown" in out and "window 32, stride 32" in out


def test_a_line_says_that_masks_beside_the_shards_are_ignored(checkpoint, evaluate, tmp_path):
    write_shard(tmp_path / "a_val_000.bin", np.arange(40), 251)
    flags = [f"--checkpoint={checkpoint}", f"--input={tmp_path}/a_val_000.bin", *WHOLE]
    assert "are not read" not in evaluate(perplexity, *flags)
    (tmp_path / "a_val_000.mask").write_bytes(bytes(40))
    assert "39 tokens" in (out := evaluate(perplexity, *flags)) and "the masks of the shards are not read" in out


def test_shards_are_one_text_and_their_bytes_are_counted(text_checkpoint, evaluate, tmp_path, plain_losses, model):
    tokenizer = load_tokenizer()
    ids = [
        token for document in ("A first one.", "Zweites 東京", "third") for token in (EOT, *tokenizer.encode(document))
    ]
    write_shard(tmp_path / "a_000.bin", np.array(ids[:7]), 50257)
    write_shard(tmp_path / "a_001.bin", np.array(ids[7:]), 50257)
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": NAMED_FINGERPRINTS["gpt2"]}))
    evaluate(
        perplexity, f"--checkpoint={text_checkpoint}", f"--input={tmp_path}/a_*.bin", f"--output={tmp_path}/o.json"
    )
    found = read(tmp_path / "o.json")
    total, size = (
        plain_sum(model.checkpoint.gpt, ids, 24, 12, plain_losses),
        len("A first one.Zweites 東京third".encode()),
    )
    assert (found["tokens"], found["bytes"], found["window"], found["stride"]) == (len(ids) - 1, size, 24, 12)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-6)


def test_a_folder_stands_for_its_validation_shards_and_each_shard_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x_train_000001.bin", "x_val_000000.bin", "manifest.json"):
        (tmp_path / name).touch()
    (tmp_path / "link.bin").symlink_to("x_val_000000.bin")
    val = tmp_path / "x_val_000000.bin"
    assert texts.find_inputs([str(tmp_path)], "") == ([val], [])
    assert texts.find_inputs([str(val), "x_val_*.bin", "link.bin", str(tmp_path)], "") == ([val], [])
    val.unlink()
    with pytest.raises(UserError, match=f"--input={tmp_path} matches no file"):
        texts.find_inputs([str(tmp_path)], "")


def test_text_files_and_lines_are_documents(text_checkpoint, evaluate, tmp_path, plain_losses, model):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf" + STORY.encode())  # with \r\n, as Windows writes text
    lines = [json.dumps({"body": text}) for text in ("one\u2028two", "", "three")] + ["bad"]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    inputs = ["--input", tmp_path / "a.md", tmp_path / "b.jsonl", "--text_key=body"]
    flags = [f"--checkpoint={text_checkpoint}", f"--output={tmp_path}/o.json", "--stride=8", "--skip_bad"]
    assert evaluate(perplexity, *flags, *inputs).count("stride 8, 1 bad and 1 empty skipped\n") == 1
    documents = (STORY.replace("\r\n", "\n"), "one\u2028two", "three")
    rows = [[EOT, *load_tokenizer().encode(text)] for text in documents]
    found = read(tmp_path / "o.json")
    assert found["tokens"] == sum(map(len, rows)) - 3 and found["bytes"] == sum(len(t.encode()) for t in documents)
    expected = sum(plain_sum(model.checkpoint.gpt, row, 24, 8, plain_losses) for row in rows) / found["tokens"]
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_hugging_face_folder_on_text(hf_folder, evaluate, tmp_path, plain_losses):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "a.txt").write_text(STORY, newline="")
    evaluate(perplexity, f"--hf={hf_folder}", f"--input={tmp_path}/a.txt", f"--output={tmp_path}/o.json")
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    text = STORY.replace("\r\n", "\n")
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    expected = plain_sum(AutoModelForCausalLM.from_pretrained(hf_folder).eval(), ids, 20, 10, plain_losses)
    found = read(tmp_path / "o.json")
    assert found["bytes"] == len(text.encode()) and found["window"] == 20
    assert found["loss"] * found["tokens"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "generation_config.json"])
def test_every_command_begins_a_text_with_the_models_own_token(hf_folder, evaluate, tmp_path, where):
    """Uses a tokenizer like SmolLM2-Instruct's: BOS is not end-of-text, and nothing is put before a text."""
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder, folder)
    data = read(folder / "tokenizer.json")
    bos = len(data["model"]["vocab"])
    data["added_tokens"].append({**data["added_tokens"][0], "id": bos, "content": "<|im_start|>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    config |= {"bos_token": "<|im_start|>"} if where == "tokenizer_config.json" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": 0}))
    (tmp_path / "a.txt").write_text("the cat sat on the mat, the dog on the log")
    found = []
    for model in (f"--checkpoint=hf:{folder}", f"--hf={folder}"):
        output = tmp_path / f"{len(found)}.json"
        evaluate(perplexity, model, f"--input={tmp_path}/a.txt", f"--output={output}")
        found.append(read(output)["bits_per_byte"])
    flags = [f"--checkpoint=hf:{folder}", "--tasks=x", "--device=cpu"]
    loaded = load_eval_model(lm_eval.parser().parse_args(flags))
    assert loaded.text.bos_tokens == [bos] == [lm_eval.adapter(loaded, torch.float32).prefix_token_id]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    tokenizer = loaded.checkpoint.tokenizer
    assert (tokenizer.document_prefix, tokenizer.encode_whole("a")) == ([0, bos], tokenizer.encode("a"))
    for name, content in tokenizer.files.items():  # the copy in a checkpoint
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(str(tmp_path)).document_prefix == [0, bos]


def test_a_bos_token_that_the_tokenizer_adds_is_not_added_twice(model):
    for prefix in ([EOT], []):
        encoder = replace(model.text, encode=lambda text, prefix=prefix: [*prefix, *map(ord, text)])
        text = texts.document_text("ab", encoder)
        assert text.read(0, text.length).tolist() == [EOT, 97, 98]


def test_the_manifest_of_shards_gives_the_bytes_of_tokens_for_a_hugging_face_model(model, tmp_path):
    write_shard(tmp_path / "a.bin", np.array([EOT, 1, 2]), 50257)
    foreign = replace(model, checkpoint=None, byte_lengths=None)
    shard = [tmp_path / "a.bin"]
    assert texts.byte_lengths_for(shard, foreign) is None
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": NAMED_FINGERPRINTS["gpt2"]}))
    assert (texts.byte_lengths_for(shard, foreign) == model.byte_lengths).all()
    bytewise = replace(model.text, encode_continuation=lambda text: list(text.encode()))
    with pytest.raises(UserError, match="which differs from the tokenizer of"):
        texts.byte_lengths_for(shard, replace(foreign, encoder=bytewise))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_bit_identical_results(checkpoint, shards, evaluate, tmp_path, ranks):
    flags = [f"--checkpoint={checkpoint}", f"--input={shards}/*_val_*.bin", "--batch_tokens=500"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, "eval/perplexity.py", *flags, f"--output={tmp_path}/{ranks}.json", "--device=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = evaluate(perplexity, *flags, f"--output={tmp_path}/1.json")
    torch.set_num_threads(threads)
    assert read(tmp_path / f"{ranks}.json") == read(tmp_path / "1.json")
    assert done.stdout.replace(f"{ranks}.json", "1.json") == out


def without_torch(*flags):
    """Runs the command in a process that cannot import torch."""
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['p', *{flags}]"
    code += "; runpy.run_path('eval/perplexity.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)


def test_help_and_user_errors_in_flags_need_no_torch():
    helped = without_torch("--help")
    assert helped.returncode == 0 and "--stride" in helped.stdout
    wrong = without_torch("--checkpoint=x", "--input=x", "--stride=5", "--window=4")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --stride=5 exceeds --window=4, so tokens would be skipped\n"


def damaged(folder):
    write_shard(folder / "damaged.bin", np.arange(9), 251)
    (folder / "damaged.bin").write_bytes((folder / "damaged.bin").read_bytes()[:-1])
    write_shard(folder / "foreign.bin", np.array([3, 300, 5]), 50257)
    write_shard(folder / "one.bin", np.array([3]), 251)
    (folder / "made").mkdir()
    write_shard(folder / "made" / "x.bin", np.arange(9), 251)
    (folder / "made" / "manifest.json").write_text(json.dumps({"tokenizer": NAMED_FINGERPRINTS["cl100k_base"]}))
    (folder / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


SHARD_ERRORS = {
    "none*.bin": "--input=.*none.*matches no file",
    "damaged.bin": "damaged.bin: truncated",
    "foreign.bin": "token id 300 at position 1 is not below",
    "one.bin": "too short",
    "made/x.bin": "made with tokenizer cl100k_base, but --tokenizer=gpt2",
    "pointer.bin": "pointer.bin: a Git LFS pointer, not the file itself; run `git lfs pull`",
}


@pytest.mark.parametrize("name", SHARD_ERRORS)
def test_user_errors_in_shards(checkpoint, evaluate, tmp_path, name):
    damaged(tmp_path)
    with pytest.raises(UserError, match=SHARD_ERRORS[name]):
        evaluate(perplexity, f"--checkpoint={checkpoint}", f"--input={tmp_path}/{name}")


TEXT_ERRORS = {
    "empty.txt": (b"", "too short"),
    "latin.txt": ("caf\xe9 x".encode("latin-1"), r"latin.txt: not UTF-8 text \(invalid continuation byte at byte 3\)"),
    "field.jsonl": (
        b'{"text": "a"}\n\n{"txt": "b"}\n',
        "field.jsonl: line 3 .*field 'text' .see --text_key.; repair",
    ),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl: line 1: "),
    "json.jsonl": (b'{"text": "a"}\n{"text\n', "json.jsonl: line 2 is not JSON"),
    "blank.jsonl": (b'{"text": ""}\n\n', "too short"),
}


@pytest.mark.parametrize("name", TEXT_ERRORS)
def test_user_errors_in_text(model, evaluate, tmp_path, name, monkeypatch):
    monkeypatch.setattr(perplexity, "load_eval_model", lambda args, needs_tokenizer: model)
    content, complaint = TEXT_ERRORS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        evaluate(perplexity, "--checkpoint=x", f"--input={tmp_path}/{name}")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--window=33"], "--window=33 exceeds the model's context of 32 tokens"),
        (["--stride=33"], "--stride=33 exceeds the window of 32"),
        (["--stride=0"], "--stride=0 must be at least 1$"),
        (["--window=-1"], "--window=-1 must be at least 1, or 0"),
        (["--max_tokens=-1"], "--max_tokens=-1"),
        (["--tokenizer=gpt3"], "--tokenizer=gpt3: no such tokenizer"),
        (["--tokenizer=gpt2"], "--tokenizer=gpt2 has 50,257 tokens"),
    ],
)
def test_user_errors_in_flags(checkpoint, shards, evaluate, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate(perplexity, f"--checkpoint={checkpoint}", f"--input={shards}/*_val_*.bin", *flags)


def test_text_needs_a_tokenizer(checkpoint, evaluate, tmp_path):
    (tmp_path / "a.txt").write_text("a b c")
    with pytest.raises(UserError, match="--tokenizer=gpt2 has 50,257 tokens"):
        evaluate(perplexity, f"--checkpoint={checkpoint}", f"--input={tmp_path}/a.txt")
