"""Conversations: the ids of each turn, the cache between turns, what no longer fits, and the command."""

import io
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval.chat as command
import eval.conversation as conversations
import eval.generate as generating
from cfg.config import load_config
from data.prepare.conversations import messages_of
from data.tokenizers.chat import find_template, prepare_tokenizer
from data.tokenizers.load import load_tokenizer
from data.train_tokenizer import train
from eval.chat_format import open_chat_format
from eval.conversation import CachedText, Conversation
from eval.generate import Sampling, generate, prefill
from eval.save_chat import save
from model.formats.pretrained import load_model
from model.gpt import GPT, init_weights
from train.checkpoint_writer import CheckpointWriter
from train.optim import make_optimizer
from util.errors import UserError
from util.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The cat sat on the mat.\n\nuser\nassistant\nsystem naïve 東京 x = {1: 2} she'll\n" * 20
SMALL = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--tie_embeddings=0", "--device=cpu"]
LLAMA = ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=0", "--n_kv_head=2"]
FAMILIES = {"gpt2": [], "llama": LLAMA, "window": [*LLAMA, "--sliding_window=5"], "plain": ["--flash=0"]}
# Earlier replies lose what stands before </think>, as in Qwen3's template.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] if m.role == 'assistant' else"
    " m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no system') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(vocab_size, *flags):
    """Returns a model whose output depends on earlier tokens, because its initial weights are large, and its flags."""
    config = load_config([*SMALL, f"--vocab_size={vocab_size}", *flags], world_size=1)
    model = GPT(config)
    init_weights(model, 0, lambda parameter, value: parameter.copy_(value * 6 if value.dim() > 1 else value))
    return model.eval(), config


def save_run(folder, template, *flags, replies_end=True):
    """Saves a run of a model with a chat template ("": none). Returns its folder.

    Without `replies_end` the most likely token never ends a reply.
    """
    base = folder / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text(train(iter([TEXT]), 400, ["<|endoftext|>"], "gpt4").to_str())
    tokenizer = load_tokenizer(str(base))
    if template:
        (folder / "template.jinja").write_text(template)
        choice = template if template in ("chatml", "llama3") else str(folder / "template.jinja")
        tokenizer, files = prepare_tokenizer(tokenizer, find_template(choice, tokenizer), folder / "tokenizer")
        (folder / "tokenizer").mkdir()
        for name, content in files.items():
            (folder / "tokenizer" / name).write_bytes(content)
    where = [f"--output_dir={folder}/run", f"--tokenizer={folder}/{'tokenizer' if template else 'base'}"]
    model, config = make_model(tokenizer.vocab_size, "--sequence_length=96", *where, *flags)
    if not replies_end:
        model.lm_head.weight.data[list(tokenizer.special.values())] = 0
    writer = CheckpointWriter(config, Ranks(0, 0, 1, torch.device("cpu")))
    writer.save(1, model, make_optimizer(model, config, 1), {"tokenizer": tokenizer.fingerprint}, tokenizer.files)
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the folder of a run with a template and flags; each is made once."""
    found = {}

    def make(template="chatml", *flags, **options):
        key = template, flags, *options
        if key not in found:
            found[key] = save_run(tmp_path_factory.mktemp("run"), template, *flags, **options)
        return found[key]

    return make


def open_conversation(run, system="", max_new_tokens=8, bos=None, template="", sampling=None):
    model, flags, path = load_model(run, torch.device("cpu"))
    form = open_chat_format(template, bos, load_tokenizer(str(path)), flags, path)
    return Conversation(model, form, system, max_new_tokens, sampling or Sampling(temperature=0), 0)


@pytest.fixture
def say(monkeypatch):
    """Makes the model reply with these texts, one after another. \\0 ends the turn, \\1 is Ctrl-C."""

    def script(conversation, *texts):
        tokenizer, end = conversation.chat_format.chat.tokenizer, max(conversation.chat_format.ends)
        tokens = [
            i
            for text in texts
            for part in re.split("([\0\1])", text)
            for i in ([end] if part == "\0" else [None] if part == "\1" else tokenizer.encode(part))
        ]

        def draw(logits, sampling, generators):
            assert len(logits) == len(generators) == 1
            if (token := tokens.pop(0)) is None:
                raise KeyboardInterrupt
            return [token]

        monkeypatch.setattr(conversations, "draw", draw)
        return tokens

    return script


def answer(conversation, question, stop=()):
    command.answer(conversation, question, command.ask(conversation, question, "the message"), list(stop))


def chat(conversation, *lines):
    command.converse(conversation, [], iter([*lines, None]).__next__)


# Ids and the cache


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_the_ids_of_every_turn_are_those_of_transformers(runs, say, template):
    from transformers import AutoTokenizer

    run = runs(template, "--sequence_length=512")
    theirs = AutoTokenizer.from_pretrained(run.parent / "tokenizer")
    texts = ["naïve 東京?", "<|im_end|>\n<|im_start|>system", "a\n\nb", "{{ x }}"]
    for system in ("", "Be brief."):
        conversation = open_conversation(run, system, max_new_tokens=20)
        say(conversation, *(f" \nWell, {i}.\0" for i in range(len(texts))))
        messages = [{"role": "system", "content": system}] if system else []
        for i, text in enumerate(texts):
            messages.append({"role": "user", "content": text})
            plain = [{**m, "content": m["content"].replace("<|", "<@")} for m in messages]  # never special tokens
            ids = conversation.ask(text)
            if any("<|" in m["content"] for m in messages):
                found = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
                assert conversation.chat_format.chat.tokenizer.decode(ids) == theirs.decode(found).replace("<@", "<|")
                special = set(conversation.chat_format.chat.tokenizer.special.values())
                assert [i for i in ids if i in special] == [i for i in found if i in special]
            else:
                found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
                assert ids == found
            answer(conversation, text)
            messages.append({"role": "assistant", "content": f" \nWell, {i}."})
            assert conversation.messages == messages


def test_a_conversation_begins_as_in_training(runs):
    """data/sft.py puts the end-of-text token before each conversation, and --doc_mask=1 is needed for its shards."""
    plain, trained = runs("chatml"), runs("chatml", "--doc_mask=1")
    ids = open_conversation(plain).ask("hi")
    end = open_conversation(plain).chat_format.chat.tokenizer.end_of_text
    assert ids[0] != end
    assert open_conversation(trained).ask("hi") == open_conversation(plain, bos=1).ask("hi") == [end, *ids]
    assert open_conversation(trained, bos=0).ask("hi") == ids
    own = runs("{{ '<|endoftext|>' }}{% for m in messages %}{{ m.content }}{% endfor %}", "--doc_mask=1")
    assert open_conversation(own).ask("hi").count(end) == 1  # the template has written it already


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_a_kept_cache_equal_those_of_a_fresh_evaluation(family):
    """Texts that continue, shorten, repeat and change the text before, up to the whole context."""
    model, _ = make_model(300, "--sequence_length=600", *FAMILIES[family])
    rng, cached, text = random.Random(0), CachedText(model), [5]
    for i in range(20):
        kept = rng.choice([*[len(text)] * 6, rng.randrange(1, len(text) + 1), 0])
        text = (text[:kept] + rng.choices(range(300), k=rng.choice([0, 1, 1, 2, 30, 200])))[:600] or [7]
        text = [*text, *range(10, 300), *range(300)][:600] if i == 10 else text
        assert torch.allclose(cached.logits(text), prefill(model, [text]), atol=2e-4, rtol=0)
        assert cached.ids == text
    assert cached.cache.length == 600
    spread = (prefill(model, [text]) - prefill(model, [text[:-1]])).abs().max()
    assert spread > 0.1  # which is much more than the tolerance


def test_a_turn_evaluates_only_its_new_tokens(runs, say):
    conversation, counts = open_conversation(runs(), "Be brief.", 30), []
    conversation.text.model.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].numel()))
    say(conversation, "Well done\0", "Yes\0")
    first = conversation.ask("hi")
    answer(conversation, "hi")
    reply = conversation.chat_format.chat.tokenizer.encode("Well done")
    assert counts == [len(first), *([1] * len(reply))]
    second = conversation.ask("why?")
    assert second[: len(first) + len(reply)] == [*first, *reply]
    counts.clear()
    answer(conversation, "why?")
    assert counts[0] == len(second) - len(first) - len(reply) and set(counts[1:]) == {1}


def test_a_template_that_rewrites_earlier_turns_reuses_what_is_equal(runs, say):
    conversation, counts = open_conversation(runs(THINKING), max_new_tokens=30), []
    conversation.text.model.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].numel()))
    say(conversation, "hm</think>Yes\0", "No\0")
    first = conversation.ask("hi")
    answer(conversation, "hi")
    assert conversation.messages[-1]["content"] == "hm</think>Yes"
    counts.clear()
    second = conversation.ask("why?")
    fresh = prefill(conversation.text.model, [second])
    assert torch.allclose(conversation.text.logits(second), fresh, atol=1e-4)
    assert len(second) - len(first) - 1 <= counts[-1] <= len(second) - len(first)


def test_an_interrupted_evaluation_leaves_the_cache_usable():
    model, _ = make_model(300, "--sequence_length=64")
    cached, text = CachedText(model), list(range(40))
    cached.logits(text[:20])

    def interrupt(module, inputs):
        raise KeyboardInterrupt

    hook = model.h[1].register_forward_pre_hook(interrupt)  # the first block has added its keys and values
    for part in (text[:5], text[:30]):
        with pytest.raises(KeyboardInterrupt):
            cached.logits(part)
    hook.remove()
    assert torch.allclose(cached.logits(text), prefill(model, [text]), atol=1e-5)


def test_replies_are_those_of_generate_and_depend_on_the_seed(runs):
    conversation = open_conversation(runs(), sampling=Sampling(1.0, 50))
    ids = conversation.ask("hi")
    expected = [token for [token] in generate(conversation.text.model, [ids], 8, Sampling(1.0, 50), seed=0)]
    assert list(conversation.reply(ids)) == expected == list(conversation.reply(ids))
    conversation.seed = 1
    assert list(conversation.reply(ids)) != expected


# What no longer fits


def test_the_oldest_turns_are_dropped_but_saved(runs, say, capsys):
    conversation = open_conversation(runs(), "Be brief.", max_new_tokens=12)
    say(conversation, *(f"Well {i}\0" for i in range(8)))
    sizes = []
    for i in range(8):
        sizes.append(len(conversation.ask(f"Question {i}?")))
        answer(conversation, f"Question {i}?")
    assert max(sizes) <= 96 - 12 and conversation.dropped >= 6 and conversation.dropped % 2 == 0
    assert len(conversation.messages) == 17  # all are kept
    ids = conversation.ask("And?")
    seen = [*conversation.system, *conversation.turns[conversation.dropped :], {"role": "user", "content": "And?"}]
    assert ids == conversation.chat_format.encode(seen) and seen[1]["role"] == "user"
    one_more = [*conversation.system, *conversation.turns[conversation.dropped - 2 :], seen[-1]]
    assert len(conversation.chat_format.encode(one_more)) > 96 - 12  # no turn is dropped without need
    conversation.reset()
    assert conversation.messages == conversation.system and conversation.dropped == 0


def test_dropped_turns_are_reported(runs, say, capsys):
    conversation = open_conversation(runs(), max_new_tokens=12)
    say(conversation, *(f"Well {i}\0" for i in range(6)))
    chat(conversation, *(f"Question {i}?" for i in range(6)))
    err = capsys.readouterr().err
    assert "[the oldest turn no longer fits into the context of 96 tokens; the model does not see them]" in err


def test_a_message_that_is_too_long_is_one_line_and_changes_nothing(runs, say, capsys):
    conversation = open_conversation(runs(), "Be brief.")
    say(conversation, "Yes\0", "Yes\0")
    chat(conversation, "hi", "x y " * 60, "hi")
    out, err = capsys.readouterr()
    assert out == "Yes\nYes\n" and len(conversation.turns) == 4
    assert "tokens with the system message, but the model's context of 96 has space for 88 and a reply; shorten" in err


def test_a_reply_ends_when_the_context_is_full_or_at_max_new_tokens(runs, say, capsys):
    conversation = open_conversation(runs(), max_new_tokens=3)
    say(conversation, "a b c d e f g h")
    answer(conversation, "hi")
    assert "[the reply reached --max_new_tokens]" in capsys.readouterr().err
    conversation = open_conversation(runs(), max_new_tokens=1000)
    say(conversation, "a " * 200)
    answer(conversation, "hi")
    assert "[the context of 96 tokens is full]" in capsys.readouterr().err
    assert len(conversation.text.ids) == 95  # all but the last token, which was drawn only


# The commands within a conversation


def test_the_commands_of_a_conversation(runs, say, capsys, tmp_path):
    conversation = open_conversation(runs(), "Be brief.")
    say(conversation, "One\0", "Two\0", "Three\0")
    file = tmp_path / "saved.jsonl"
    lines = [
        f"/save {file}",
        "hi",
        f"/save {file}",
        "",
        "  ",
        "/reset",
        " /etc",
        f"/save {file}",
        "/help",
        "/quit",
        "no",
    ]
    chat(conversation, *lines)
    out, err = capsys.readouterr()
    rows = [messages_of(json.loads(line)) for line in file.read_text().splitlines()]
    system = {"role": "system", "content": "Be brief."}
    pairs = [("hi", "One"), ("/etc", "Two")]
    assert rows == [
        [system, {"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        for question, reply in pairs
    ]
    assert out.startswith("One\nTwo\n/reset") and all(f"\n{name} " in out for name in ("/save", "/quit", "/help"))
    assert "[/save: the conversation has no reply yet]" in err and err.count(f"[saved as a row of {file}]") == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("/rest", "unknown command /rest; did you mean /reset? /help lists the commands"),
        ("/home/me is what?", "unknown command /home/me; /help lists"),
        ("/quit now", "/quit takes no argument; /help lists"),
        ("/save notes.txt", "/save notes.txt: give a name that ends in .jsonl"),
        ("/save nowhere/a.jsonl", "/save nowhere/a.jsonl: No such file or directory; give another name"),
        ("caf\udce9", "the message: not UTF-8"),
        ("\U0010ff00", "the message contains U+10FF00, which is reserved; remove it"),
    ],
)
def test_a_wrong_line_is_answered_with_one_line(runs, say, capsys, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    conversation = open_conversation(runs())
    say(conversation, "One\0", "Two\0")
    chat(conversation, "hi", line, "more")
    out, err = capsys.readouterr()
    assert out == "One\nTwo\n" and message in err and len(err.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_do_not_end_the_conversation(runs, say, capsys):
    conversation = open_conversation(runs())
    say(conversation, "One\0")
    chat(conversation, "hi")
    conversation.text.model.ln_f.weight.data.fill_(float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "draw", generating.draw)
        chat(conversation, "more", "/help")
    out, err = capsys.readouterr()
    assert "[the model's logits are not finite]" in err and "/reset" in out and len(conversation.turns) == 2


def test_saving_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b\nc"}]
    row = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    names = [save(messages, "") for _ in range(3)]  # within a second
    assert len(set(names)) == 3 and all(name.read_text() == row for name in names)
    Path("mine.jsonl").write_text('{"no": "newline"}')
    for _ in range(2):
        save(messages, "mine.jsonl")
    assert Path("mine.jsonl").read_text() == '{"no": "newline"}\n' + row + row
    before = Path("mine.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for name in ("mine.jsonl", "new.jsonl"):
        with pytest.raises(UserError, match="No space left on device; give another name"):
            save(messages, name)
    assert Path("mine.jsonl").read_bytes() == before and not Path("new.jsonl").exists()


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(runs, say, capsys):
    conversation = open_conversation(runs())
    say(conversation, "\1", "Well\1", "Yes\0")
    chat(conversation, "one", "two", "three")
    out, err = capsys.readouterr()
    assert [m["content"] for m in conversation.messages] == ["two", "Well", "three", "Yes"]
    assert out == "\nWell\nYes\n"
    assert "[stopped before the reply began; the message is forgotten]\n[stopped]\n" in err


def test_a_reply_ends_before_the_stop_string_or_the_end_of_text(runs, say, capsys):
    conversation = open_conversation(runs(), max_new_tokens=40)
    end = conversation.chat_format.chat.tokenizer.special["<|endoftext|>"]
    tokens = say(conversation, "One. Two. Three\0", "Four")
    answer(conversation, "hi", [". T"])
    while tokens and tokens[0] != conversation.chat_format.chat.tokenizer.encode("Four")[0]:
        tokens.pop(0)
    tokens.append(end)
    answer(conversation, "hi")
    assert [m["content"] for m in conversation.messages[1::2]] == ["One", "Four"]
    assert capsys.readouterr().out == "One\nFour\n"


# The command


@pytest.fixture
def run_chat(monkeypatch, capsys):
    """Runs the command on a checkpoint with flags and returns stdout and stderr."""

    def of(run, *flags, stdin=b"", terminal=False):
        monkeypatch.setattr(sys, "argv", ["chat.py", f"--checkpoint={run}", "--device=cpu", *map(str, flags)])
        stream = io.TextIOWrapper(io.BytesIO(stdin))
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        command.main(command.read_flags())
        return capsys.readouterr()

    return of


def test_once_and_stdin_print_one_reply(runs, run_chat):
    run = runs()
    conversation = open_conversation(run, "Be brief.")
    ids = conversation.ask("one\ntwo")
    stream = conversation.chat_format.stream(ids)
    expected = "".join(stream.add(token) for token in conversation.reply(ids)) + stream.finish()
    flags = ["--system=Be brief.", "--temperature=0", "--max_new_tokens=8"]
    assert run_chat(run, *flags, "--once", "one\ntwo", stdin=b"ignored").out == expected + "\n" != "\n"
    assert run_chat(run, *flags, stdin=b"one\ntwo\n").out == expected + "\n"
    assert run_chat(run, *flags, stdin=b"one\ntwo").out == expected + "\n"
    assert run_chat(run, *flags, "--dtype=bfloat16", stdin=b"one\ntwo").out.endswith("\n")


def test_out_of_memory_is_one_line(runs, run_chat, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(conversations, "forward", fail)
    with pytest.raises(UserError, match=r"^--once: out of memory; shorten it, or lower --max_new_tokens$"):
        run_chat(runs(), "--once=hi")


def test_a_terminal_is_asked_until_the_end_of_the_input(runs, run_chat, monkeypatch):
    lines = ["hi", "/help"]

    def read(prompt):
        if lines:
            return lines.pop(0)
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    out, err = run_chat(runs(), "--max_new_tokens=3", terminal=True)
    assert "/quit" in out and "[/help lists the commands" in err and not lines


@pytest.mark.parametrize(
    "template, flags, stdin, message",
    [
        ("", ["--once=hi"], b"", "has no chat template, as is usual for base models; give --chat_template=chatml or"),
        ("", ["--once=hi", "--chat_template=tokenizer"], b"", "--chat_template=tokenizer: .*has no chat template"),
        ("chatml", ["--once=hi", "--chat_template=chatlm"], b"", "--chat_template=chatlm: .*did you mean chatml"),
        ("chatml", ["--once="], b"hi", "--once: the question is empty"),
        ("chatml", [], b"", "stdin: the question is empty"),
        ("chatml", [], b"caf\xe9", "stdin: not UTF-8 at byte 3"),
        ("chatml", ["--once=caf\udce9"], b"", "--once: not UTF-8"),
        ("chatml", [], b"x y " * 60, "stdin: [0-9]+ tokens, but the model's context of 96"),
        ("chatml", ["--once=hi", f"--system={'x y ' * 60}"], b"", "--system: [0-9]+ tokens with the system message"),
        ("chatml", ["--once=hi", "--top_p=0"], b"", "--top_p=0.0 must be above 0"),
        ("chatml", ["--once=hi", "--max_new_tokens=0"], b"", "--max_new_tokens=0 must be at least 1"),
        (ALTERNATING, ["--once=hi", "--system=x"], b"", "--system: the chat template fails .no system"),
    ],
)
def test_user_errors(runs, run_chat, template, flags, stdin, message):
    with pytest.raises(UserError, match=message) as error:
        run_chat(runs(template), *flags, stdin=stdin)
    assert "\n" not in str(error.value)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_text_with_a_warning(runs, say, capsys):
    conversation = open_conversation(runs(""), max_new_tokens=60, template="chatml")
    assert (
        "chatml: the tokenizer lacks <|im_end|>, <|im_start|>; the model sees their names as text"
        in capsys.readouterr().err
    )
    tokenizer = conversation.chat_format.chat.tokenizer
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = conversation.ask("hi")
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special.values())
    say(conversation, "Well<|im_end|>\n<|im_start|>user")
    answer(conversation, "hi")
    assert conversation.messages[-1]["content"] == "Well"


def read_until(master, what, timeout=60):
    """Reads from a terminal until it has shown `what`. Returns all that it has shown."""
    shown, deadline = b"", time.monotonic() + timeout
    while what not in shown:
        assert time.monotonic() < deadline, shown
        shown += os.read(master, 4096)
    return shown


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_the_reply_and_then_the_command(runs, warm_python):
    """Runs the command in a pseudo-terminal, with an endless reply."""
    run = runs("chatml", "--sequence_length=65536", *LLAMA, replies_end=False)
    flags = [f"--checkpoint={run}", "--device=cpu", "--temperature=0", "--max_new_tokens=1000000"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [warm_python.executable, "eval/chat.py", *flags],
        cwd=ROOT,
        env={**os.environ, **warm_python.env, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    try:
        read_until(master, b"> ")
        os.write(master, b"hello\n")
        assert read_until(master, b"\n") and len(os.read(master, 10)) > 0  # the reply has begun
        process.send_signal(signal.SIGINT)
        shown = read_until(master, b"> ")
        assert b"[stopped]" in shown
        os.write(master, b"/help\n")
        assert b"/reset" in read_until(master, b"> ")
        process.send_signal(signal.SIGINT)
        read_until(master, b"interrupted")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(master)


# eval/generate.py --chat


@pytest.fixture
def run_generate(monkeypatch, capsys):
    def of(run, *flags):
        monkeypatch.setattr(sys, "argv", ["generate.py", f"--checkpoint={run}", "--device=cpu", *map(str, flags)])
        capsys.readouterr()
        generating.main(generating.read_flags())
        return capsys.readouterr().out

    return of


def test_generate_replies_to_a_batch_of_conversations(runs, run_generate, tmp_path):
    """Each row is what chat.py answers, since a row does not depend on other rows."""
    run = runs("chatml", "--doc_mask=1")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [{"messages": messages}, {"prompt": "q", "system": "s"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "plain").write_text("plain <|im_end|>\n")
    flags = ["--chat", "--temperature=0", "--max_new_tokens=8", "--system=Be brief.", "--num_samples=2", "--prompt=hi"]
    out = run_generate(run, *flags, f"--prompt_file={tmp_path}/rows.jsonl", f"--prompt_file={tmp_path}/plain")
    form = open_conversation(run).chat_format
    system = {"role": "system", "content": "Be brief."}
    expected = []
    for asked in (
        [system, {"role": "user", "content": "hi"}],
        [system, *messages],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        [system, {"role": "user", "content": "plain <|im_end|>"}],
    ):
        conversation = open_conversation(run)
        ids = form.encode(asked)
        stream = form.stream(ids)
        expected += ["".join(map(stream.add, conversation.reply(ids))) + stream.finish()] * 2
    assert out == "".join(f"{text}\n{'-' * 40}\n" for text in expected) and len(set(expected)) == 4


def test_generate_ends_at_the_end_of_the_turn(runs, run_generate, monkeypatch):
    tokenizer = open_conversation(runs()).chat_format.chat.tokenizer
    tokens = tokenizer.encode("Well") + [tokenizer.special["<|im_end|>"], *tokenizer.encode("no")]
    monkeypatch.setattr(generating, "generate", lambda *_: iter([token] for token in tokens))
    assert run_generate(runs(), "--chat", "--prompt=hi") == f"Well\n{'-' * 40}\n"
    assert run_generate(runs(), "--chat", "--prompt=hi", "--ignore_eot") == f"Well<|im_end|>no\n{'-' * 40}\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chat"], "--chat needs a question"),
        (["--chat", "--prompt="], "--prompt: the message is empty"),
        (["--chat", "--prompt=hi", "--infill"], "--infill: cannot be combined with --chat"),
        (["--chat", "--prompt=hi", "--special_tokens=1"], "--special_tokens=1: messages are always text"),
        (["--system=x", "--prompt=hi"], "--chat_template and --system are for conversations; add --chat"),
        (["--chat", "--prompt_file={tmp_path}/reply.jsonl"], "reply.jsonl: line 2: the last message is not the user's"),
        (["--chat", "--prompt_file={tmp_path}/text.jsonl"], "text.jsonl: line 1 is not JSON"),
        (["--chat", "--prompt_file={tmp_path}/fields.jsonl"], "line 1 needs the field messages or prompt"),
        (["--chat", f"--prompt={'x y ' * 60}"], "--prompt: the conversation has"),
    ],
)
def test_user_errors_of_generate(runs, run_generate, tmp_path, flags, message):
    reply = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "reply.jsonl").write_text(f'{{"prompt": "a"}}\n{json.dumps({"messages": reply})}\n')
    (tmp_path / "text.jsonl").write_text("hello\n")
    (tmp_path / "fields.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError) as error:
        run_generate(runs(), *(flag.format(tmp_path=tmp_path) for flag in flags))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_hugging_face_model_replies_as_in_transformers(runs, run_chat, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(runs().parent / "tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            **sizes,
        )
    )
    for part in (theirs, tokenizer):
        part.save_pretrained(tmp_path / "hf")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=ends)
    expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    flags = ["--system=Be brief.", "--once=Hello there", "--temperature=0", "--max_new_tokens=20"]
    assert run_chat(f"hf:{tmp_path}/hf", *flags).out == expected + "\n"


@pytest.mark.slow
def test_a_model_that_is_fine_tuned_on_a_few_conversations_repeats_them(warm_python, tmp_path):
    """The real commands: data/sft.py, train_gpt.py, eval/chat.py, and eval/generate.py for several turns."""
    pairs = {"What colour is the sky?": "Blue.", "Name a fruit.": "An apple,\n\nor a pear.", "2 + 2?": "4"}
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("Be loud.", "Hi", "HELLO", "Bye", "GOODBYE")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rows = [{"prompt": question, "completion": reply} for question, reply in pairs.items()] + [{"messages": messages}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": messages[:-1]}) + "\n")
    data = ["--output_dir", tmp_path / "data", "--sequence_length=160", "--val_share=0"]
    warm_python.run("data/sft.py", tmp_path / "rows.jsonl", "--tokenizer=bytes", *data)
    size = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--vocab_size=259", "--sequence_length=160", "--doc_mask=1"]
    steps = ["--batch_size=2", "--total_batch_size=320", "--num_iterations=150", "--learning_rate=3e-3"]
    files = [f"--input_train_bin={tmp_path}/data/*_train_*.bin", f"--tokenizer={tmp_path}/data/tokenizer"]
    others = [f"--output_dir={tmp_path}/run", "--warmup_iters=10", "--val_loss_every=0", "--device=cpu"]
    warm_python.run("train_gpt.py", *size, *steps, *files, *others)
    flags = ["--checkpoint", tmp_path / "run", "--device=cpu", "--temperature=0"]
    for question, reply in pairs.items():
        assert warm_python.run("eval/chat.py", *flags, "--once", question).stdout == reply + "\n"
    done = warm_python.run("eval/generate.py", *flags, "--chat", "--prompt_file", tmp_path / "asked.jsonl")
    assert done.stdout == f"GOODBYE\n{'-' * 40}\n"
