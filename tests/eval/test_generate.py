"""Generation: a row does not depend on the cache and on other rows. And the command."""

import io
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval.generate as command
from cfg.config import load_config
from data.tokenizers.fim import infill_prompt
from data.tokenizers.hf_json import _byte_letters
from data.tokenizers.load import load_tokenizer
from eval.generate import TOP_P_CANDIDATES, Sampling, candidates, decode_step, draw, generate, prefill
from model.formats.pretrained import load_model
from model.gpt import GPT, init_weights
from model.kv_cache import KVCache
from train.checkpoint_writer import CheckpointWriter
from train.evaluate import SAMPLING
from train.optim import make_optimizer
from util.errors import UserError
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--sequence_length=24", "--vocab_size=262", "--tie_embeddings=0"]
LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--n_kv_head=2"]
MODERN = [*LLAMA[:2], "--mlp=relu2", "--bias=0", "--n_kv_head=1", "--qk_norm=1", "--logit_softcap=15"]
# A short window, a head size that is not n_embd / n_head, biases of query, key and value only.
WINDOW = [*LLAMA, "--sliding_window=5", "--head_dim=12", "--qkv_bias=1", "--rope_scaling=llama3:8,1,4,16"]
FAMILIES = pytest.mark.parametrize("family", [[], LLAMA, MODERN, WINDOW], ids=["gpt2", "llama", "modern", "window"])
GREEDY = Sampling(temperature=0)
END, SPECIAL = 256, ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]


def make(*flags):
    """Returns a model whose output depends on earlier tokens, because its initial weights are ten times as large."""
    config = load_config([*SMALL, *flags], world_size=1)
    model = GPT(config)
    init_weights(model, 0, lambda parameter, value: parameter.copy_(value * 10 if value.dim() > 1 else value))
    return model


def tokens_of(length, seed=0):
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate_rows(*args, **kwargs):
    return [list(row) for row in zip(*generate(*args, **kwargs), strict=True)]


@torch.no_grad()
def cacheless(model, prompt, count):
    """Continues a prompt with the usual greedy loop, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids[-model.config.n_positions :]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@FAMILIES
@pytest.mark.parametrize("flash", [0, 1])
def test_greedy_equals_the_loop_without_a_cache(family, flash):
    """One row and a batch; shorter and longer than the context."""
    model = make(*family, f"--flash={flash}").eval()
    prompts = [tokens_of(n, seed=n) for n in (3, 1, 17, 12, 24, 40)]
    expected = [cacheless(model, prompt, 14) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == len(expected) and len(set(expected[0])) > 3
    assert generate_rows(model, prompts, 14, GREEDY) == expected
    assert [generate_rows(model, [prompt], 14, GREEDY)[0] for prompt in prompts] == expected


@FAMILIES
def test_a_row_does_not_depend_on_other_rows(family):
    model, sampling = make(*family), Sampling(2.0, top_k=100, top_p=0.98)
    a, b, c = (tokens_of(n, seed=n) for n in (5, 9, 14))
    together = generate_rows(model, [a, b, c], 16, sampling, seed=3, samples=3)
    assert len({tuple(row) for row in together}) == 9
    assert generate_rows(model, [a], 16, sampling, seed=3) == together[:1]
    assert generate_rows(model, [c, b], 16, sampling, seed=3, samples=2)[2:] == together[3:5]
    assert generate_rows(model, [a], 7, sampling, seed=3, samples=4)[:3] == [row[:7] for row in together[:3]]
    assert generate_rows(model, [a], 16, sampling, seed=4)[0] != together[0]
    first, second = generate_rows(model, [a, a], 16, sampling, seed=3)
    assert first == together[0] != second


def test_a_step_computes_one_position_per_row_until_the_context_is_full():
    model, shapes = make(), []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    generate_rows(model, [tokens_of(20), tokens_of(22)], 6, GREEDY, samples=2)
    # The prompts of 20 and 22 tokens, then one token per row. The longer rows fill the context of 24 first.
    assert shapes == [(2, 22), (4, 1), (4, 1), (2, 1), (2, 24), (2, 1), (2, 24), (4, 24)]


def test_training_mode_and_gradients_are_restored_between_steps():
    model = make("--dropout=0.5").train()
    steps = generate(model, [[1, 2]], 5, GREEDY)
    first = [next(steps), next(steps)]
    assert model.training and model.h[1].attn.training and torch.is_grad_enabled()
    steps.close()
    assert [row for [row] in first] == cacheless(model.eval(), [1, 2], 2)
    assert list(generate(model, [[1, 2]], 2, GREEDY)) == first and not model.training
    assert list(generate(model, [[1, 2]], 0, GREEDY)) == []

    def fail(module, inputs):
        raise RuntimeError("in the middle")

    model.train().ln_f.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        next(generate(model, [[1, 2]], 5, GREEDY))
    assert model.training and torch.is_grad_enabled()


@FAMILIES
def test_bfloat16_under_autocast(family):
    """Logits with and without cache differ by rounding only, which is much less than between tokens."""
    model, texts = make(*family), [tokens_of(n, seed=n) for n in (11, 6)]
    cache = KVCache(24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = prefill(model, [text[:-1] for text in texts], cache)
        assert {t.dtype for kv in cache._layers.values() for t in kv} == {torch.bfloat16}
        cached, whole = decode_step(model, texts, cache), prefill(model, texts)
        assert len(generate_rows(model, texts, 20, Sampling(top_p=0.9), samples=2)) == 4
    exact = prefill(model, texts)
    assert cached.dtype == whole.dtype == torch.float32
    assert (cached - whole).abs().max() < 0.1 * (exact - first).abs().max()


def test_a_full_cache_is_an_error():
    model, cache = make(), KVCache(4)
    prefill(model, [[1, 2, 3]], cache)
    decode_step(model, [[1, 2, 3, 4]], cache)
    with pytest.raises(ValueError, match="space for 4"):
        decode_step(model, [[1, 2, 3, 4, 5]], cache)


def test_an_empty_prompt_and_logits_that_are_not_finite_are_errors():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(make(), [[1], []], 1, GREEDY))
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError):
            draw(torch.tensor([[0.0, bad]]), GREEDY, [torch.Generator()])


def probabilities(logits, sampling):
    """Returns the probability of each token, in the order of ids."""
    ids, weights = candidates(logits, sampling)
    assert (ids.diff(dim=-1) > 0).all()
    found = torch.zeros(logits.shape, dtype=torch.float64).scatter_(-1, ids, weights)
    return found / found.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("spread", [0.01, 5.0])
def test_top_p_in_a_large_vocabulary(spread):
    logits = torch.randn(2, 3 * TOP_P_CANDIDATES, generator=torch.Generator().manual_seed(1)) * spread
    best, ids = logits.double().softmax(-1).sort(dim=-1, descending=True)
    best[best.cumsum(-1) - best >= 0.9] = 0
    assert ((best > 0).sum(-1) > TOP_P_CANDIDATES).all() == (spread < 1)  # more than it looks at first, or fewer
    expected = torch.zeros_like(best).scatter_(-1, ids, best / best.sum(-1, keepdim=True))
    assert torch.allclose(probabilities(logits, Sampling(top_p=0.9)), expected, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.001, 1.0),
)
def test_temperature_top_k_and_top_p(logits, temperature, top_k, top_p):
    full = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0)
    got = probabilities(torch.tensor([logits]), Sampling(temperature, top_k, top_p))[0]
    kept, left_out = full[got > 0], full[got == 0]
    assert got.sum().item() == pytest.approx(1.0)
    assert torch.allclose(got[got > 0], kept / kept.sum())  # in proportion
    assert not left_out.numel() or left_out.max() <= kept.min() * (1 + 1e-12)  # the most likely stay
    assert len(kept) <= (top_k or len(logits))
    share = full / full.topk(min(top_k or len(logits), len(logits))).values.sum()  # of the tokens that top_k keeps
    assert share[got > 0].sum() >= top_p - 1e-9  # enough tokens
    assert share[got > 0].sum() - share[got > 0].min() < top_p + 1e-9  # and none could be left out
    if top_p == 1.0:
        assert len(kept) == min(top_k or len(logits), len(logits))


def test_extremes_of_temperature():
    logits = torch.tensor([[1.0, 3.0, 2.999]])
    assert probabilities(logits, Sampling(1e-310)).tolist() == [[0.0, 1.0, 0.0]]
    assert torch.allclose(probabilities(logits, Sampling(1e300)), torch.full((1, 3), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 4), Sampling(1.5, 0, 0.8)], ids=str)
def test_tokens_are_drawn_with_their_probability(sampling):
    logits, count = torch.tensor([[0.0, 2.0, -9.0, 1.0, 1.5, 0.5, -30.0]]), 20_000
    expected = probabilities(logits, sampling)[0]
    drawn = draw(logits.expand(count, -1), sampling, [torch.Generator().manual_seed(5)] * count)
    frequency = torch.bincount(torch.tensor(drawn), minlength=7) / count
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


# The command


def save_tokenizer(file):
    """Writes a tokenizer.json with a token per byte, end-of-text and the fill-in-the-middle tokens."""
    added = [{"id": END + i, "content": name, "special": True} for i, name in enumerate(SPECIAL)]
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": dict(_byte_letters()), "merges": []}
    file.write_text(json.dumps({"added_tokens": added, "pre_tokenizer": pre, "model": model}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory of a tiny model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    save_tokenizer(folder / "tokenizer.json")
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    flags = [f"--output_dir={folder}/run", f"--tokenizer={folder}/tokenizer.json", "--sequence_length=64"]
    config = load_config([*SMALL, *flags], world_size=1)
    model = make("--sequence_length=64")
    state = {"record": {"step": 1}, "tokenizer": tokenizer.fingerprint}
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    saver = CheckpointWriter(config, ranks)
    saver.save(1, model, make_optimizer(model, config, 1), state, tokenizer.files)
    return folder / "run", tokenizer


@pytest.fixture
def run(saved, monkeypatch, capsys):
    """Runs the command with flags and returns its output."""

    def of(*flags, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["generate.py", f"--checkpoint={saved[0]}", "--device=cpu", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert command.main(command.read_flags()) is None
        return capsys.readouterr().out

    return of


@pytest.fixture
def scripted(monkeypatch):
    """Makes the model generate these texts, row by row. \\0 is end-of-text. Returns the list of steps made so far."""

    def script(*texts):
        rows = [[END if c == "\0" else b for c in text for b in c.encode()] for text in texts]
        steps = []

        def steps_of(model, prompts, max_new_tokens, sampling, seed, samples):
            assert len(prompts) * samples == len(rows)
            for step in islice(zip(*rows, strict=True), max_new_tokens):
                steps.append(step)
                yield list(step)

        monkeypatch.setattr(command, "generate", steps_of)
        return steps

    return script


def printed(*texts):
    return "".join(f"{text}\n{'-' * 40}\n" for text in texts)


def test_the_command_prints_prompts_and_continuations(run, saved, tmp_path):
    model, tokenizer = load_model(saved[0], torch.device("cpu"))[0], saved[1]

    def expected(texts, sampling, seed, samples):
        prompts = [tokenizer.encode(text) or [END] for text in texts]
        rows = generate_rows(model, prompts, 10, sampling, seed, samples)
        return printed(*(texts[i // samples] + tokenizer.decode(row) for i, row in enumerate(rows)))

    few = ["--max_new_tokens=10", "--ignore_eot"]
    (tmp_path / "naïve").write_text("é from a file\n")
    greedy = run(*few, "--prompt=ROMEO:", "--temperature=0")
    assert greedy == expected(["ROMEO:"], GREEDY, 0, 1) and greedy.startswith("ROMEO:")
    assert run(*few) == run(*few, "--prompt=") == expected([""], SAMPLING, 0, 1)  # as a run samples
    several = ["--prompt=a", f"--prompt_file={tmp_path}/naïve", "--prompt_file=-"]
    flags = ["--num_samples=2", "--seed=5", "--top_k=9", "--top_p=0.7", "--temperature=2"]
    texts = ["a", "é from a file\n", "東 stdin"]
    assert run(*few, *several, *flags, stdin="東 stdin".encode()) == expected(texts, Sampling(2, 9, 0.7), 5, 2)


def test_every_place_of_a_run_names_its_newest_checkpoint(saved, tmp_path, capsys):
    """The run, its checkpoints, the file `latest`, a single checkpoint, and copies of these under other names."""
    folder = saved[0] / "checkpoints"
    assert (folder / "latest").read_text() == "step_00000001\n"
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder / "step_00000001", tmp_path / "one")
    places = [saved[0], folder, folder / "latest", folder / "step_00000001"]
    places += [tmp_path / "copy", tmp_path / "copy" / "latest", tmp_path / "one"]
    texts = set()
    for place in places:
        flags = [f"--checkpoint={place}", "--device=cpu", "--prompt=x", "--max_new_tokens=9"]
        command.main(command.parser().parse_args(flags))
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_tokens_before_and_in_prompts(run, saved, monkeypatch):
    """Compares the ids of a prompt under all values of --bos and --special_tokens."""
    _, tokenizer = saved
    seen = []
    monkeypatch.setattr(command, "generate", lambda model, prompts, *_: seen.extend(prompts) or iter([]))
    text = "a<|endoftext|>b<|fim_"
    ids = [tokenizer.encode("a")[0], END, *tokenizer.encode("b<|fim_")]
    for flags in ([], ["--bos=1"], ["--bos=0"], ["--special_tokens=0"], ["--bos=0", "--prompt="]):
        assert run(f"--prompt={text}", *flags).startswith(text)
    assert seen == [ids, [END, *ids], ids, tokenizer.encode(text), ids, [END]]
    with_bos = replace(tokenizer, prefix=[END + 1])
    monkeypatch.setattr(command, "load_model_tokenizer", lambda *_: with_bos)
    seen.clear()
    for flags in ([], ["--bos=1"], ["--bos=0"]):
        run(f"--prompt={text}", *flags)
    assert seen == [[END + 1, *ids], [END + 1, *ids], ids]


def test_text_ends_with_the_document_or_a_stop_string(run, scripted):
    scripted("to be\0 or not")
    assert run("--prompt=x ") == printed("x to be")
    assert run("--prompt=x ", "--ignore_eot") == printed("x to be<|endoftext|> or not")
    scripted("to be\n\nor not")
    assert run("--stop=\n\n", "--stop=not") == printed("to be")
    assert run("--max_new_tokens=6", "--stop=\n\n") == printed("to be\n")  # held back to the end


def test_rows_are_printed_in_order_and_no_extra_step_is_made(run, scripted):
    steps = scripted("first\0 ........", "no\0............", "東京 \0...abcdef"[:11])
    assert run("--prompt=1 ", "--prompt=2 ", "--prompt=3 ") == printed("1 first", "2 no", "3 東京 ")
    assert len(steps) == 8


def test_text_is_printed_while_it_is_generated(run, scripted, monkeypatch):
    shown = []
    scripted("a東\nb\n\n.")
    monkeypatch.setattr(command, "print", lambda text, end="\n", flush=False: shown.append((text + end, flush)), False)
    run("--prompt=x", "--stop=\n\n")
    assert [text for text, _ in shown if text] == ["x", "a", "東", "\nb", "\n" + "-" * 40 + "\n"]
    assert all(flush for _, flush in shown)


def test_infill_fills_the_holes(run, scripted, saved):
    scripted("1 + 2\0...", "3\0.......")
    prompts = ["--prompt=a = <FILL_ME>;", "--prompt=b = <FILL_ME>\n"]
    assert run("--infill", *prompts, "--max_new_tokens=20") == printed("a = 1 + 2;", "b = 3\n")
    scripted("1 + 2\0")
    assert run("--infill", prompts[0], "--max_new_tokens=20", "--stop= + ") == printed("a = 1;")


def test_infill_uses_the_prompt_format_of_training(run, saved):
    model, tokenizer = load_model(saved[0], torch.device("cpu"))[0], saved[1]
    [row] = generate_rows(model, [[END, *infill_prompt("a(", ")", tokenizer)]], 8, GREEDY)
    middle = tokenizer.decode(row[: row.index(END)] if END in row else row)
    flags = ["--prompt=a(<FILL_ME>)", "--max_new_tokens=8", "--temperature=0"]
    assert run("--infill", *flags) == printed(f"a({middle})")


def test_bfloat16_by_flag(run):
    text = run("--dtype=bfloat16", "--prompt=x", "--max_new_tokens=80", "--ignore_eot", "--num_samples=2")
    assert text.count("-" * 40) == 2 and text.startswith("x")


def test_a_diverged_model_is_a_user_error(run, saved, monkeypatch):
    model, *others = load_model(saved[0], torch.device("cpu"))
    model.ln_f.weight.data.fill_(math.nan)
    monkeypatch.setattr(command, "load_model", lambda path, device: (model, *others))
    with pytest.raises(UserError, match="step_00000001: the model's logits are not finite in float16; try"):
        run("--dtype=float16")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt_file=nowhere"], "--prompt_file=nowhere: No such file"),
        (["--prompt_file={tmp_path}"], "Is a directory"),
        (["--prompt_file={tmp_path}/empty"], "empty: empty file; leave out the flag"),
        (["--prompt_file={tmp_path}/latin"], "not UTF-8 at byte 3; convert it first"),
        (["--prompt_file=-"], "--prompt_file=-: empty"),
        (["--prompt=\udce9"], "--prompt: not UTF-8"),
        (["--stop="], "--stop: an empty string"),
        (["--top_p=0"], "--top_p=0.0 must be above 0"),
        (["--top_p=1.01"], "--top_p=1.01 must be above 0 and at most 1"),
        (["--top_p=nan"], "--top_p=nan"),
        (["--top_k=-1"], "--top_k=-1 must be at least 0"),
        (["--temperature=inf"], "--temperature"),
        (["--max_new_tokens=0"], "--max_new_tokens=0 must be at least 1"),
        (["--seed=-1"], "--seed=-1 must be at least 0"),
        (["--dtype=int8"], "--dtype"),
        (["--infill", "--prompt=<FILL_ME> <FILL_ME>"], "has 2"),
        (["--infill", "--prompt=<FILL_ME>", "--ignore_eot"], "leave out --ignore_eot"),
        (["--infill", "--prompt=<FILL_ME>", "--max_new_tokens=61"], "exceed the model's context of 64"),
    ],
)
def test_user_errors(run, tmp_path, flags, message):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError) as error:
        run(*(flag.format(tmp_path=tmp_path) for flag in flags))
    assert message in str(error.value)


@pytest.fixture
def endless(saved):
    """The command as a process that generates until it is stopped."""
    flags = [f"--checkpoint={saved[0]}", "--device=cpu", "--prompt=ROMEO:", "--max_new_tokens=1000000", "--ignore_eot"]
    words = [sys.executable, "eval/generate.py", *flags]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_ends_the_command_after_the_printed_text(endless):
    start = endless.stdout.read(40)  # printed long before the end
    endless.send_signal(signal.SIGINT)
    rest, err = endless.communicate(timeout=60)
    assert endless.returncode == 130 and err == b"interrupted\n"
    assert start.startswith(b"ROMEO:") and b"-" * 40 not in start + rest


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command(endless):
    endless.stdout.read(40)
    endless.stdout.close()
    assert endless.wait(timeout=60) == 141
    assert endless.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_sample_of_a_sharded_model_equals_one_of_a_single_process(trainer, tmp_path, stage):
    flags = [f"--zero_stage={stage}", "--num_iterations=2", "--sample_every=1", "--sample_tokens=50", "--seed=9"]
    trainer.run(tmp_path / "run", *flags, ranks=2)
    model, *_ = load_model(tmp_path / "run", torch.device("cpu"))
    [row] = generate_rows(model, [[0]], 50, Sampling(0.8, top_k=50), seed=9 + 2)
    assert (tmp_path / "run" / "samples" / "step_00000002.txt").read_text() == " ".join(map(str, row)) + "\n"
