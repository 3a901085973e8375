"""data/train_tokenizer.py: its files give equal ids in `transformers`, and an error is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import train_tokenizer
from data.tokenizers.load import load_tokenizer
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXT = [
    f"Document {i}: the cat's {i * 37} hats, naïve 東京;\n\n  they'll sit on {'mats' * (i % 5)}." for i in range(900)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXT))
    (folder / "empty.txt").write_text("")
    return folder


def command(*args):
    script = [sys.executable, str(ROOT / "data" / "train_tokenizer.py"), *map(str, args)]
    return subprocess.run(script, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(corpus):
    flags = ["--text_key=body", "--vocab_size=400", "--special_tokens=<|fim_prefix|>,<|fim_middle|>,<|fim_suffix|>"]
    done = command(corpus / "*.jsonl", corpus / "empty.txt", "--output", corpus / "tok", *flags)
    assert done.returncode == 0, done.stderr
    return corpus / "tok", done.stdout, flags


def test_the_command_prints_a_summary(made):
    folder, out, _ = made
    lines = out.splitlines()
    assert lines[0].startswith(f"{folder}/tokenizer.json: 400 tokens from ")
    assert lines[0].endswith(" bytes, 1 empty skipped")
    assert "bytes per token on" in lines[1] and lines[2].startswith("gpt2: ")
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_transformers_opens_it_with_equal_ids(made):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(made[0]), load_tokenizer(str(made[0]))
    text = "".join(TEXT) + " \n\n 👩‍👩‍👧 it's  "
    assert theirs(text)["input_ids"] == ours.encode(text) and ours.ranks is not None
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", ours.end_of_text, 400)
    assert theirs.decode(ours.encode(text)) == text
    names = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    assert theirs.convert_tokens_to_ids(names) == [ours.special[name] for name in names] == [0, 1, 2, 3]


def test_the_same_text_gives_the_same_file(made, corpus, tmp_path, call):
    folder, _, flags = made
    call(train_tokenizer, corpus / "*.jsonl", "--output", tmp_path / "mine.json", *flags)
    assert (tmp_path / "mine.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "mine.json")).sha256 == load_tokenizer(str(folder)).sha256


def test_max_bytes_limits_the_text(made, corpus, tmp_path, call, capsys):
    call(train_tokenizer, corpus / "*.jsonl", "--output", tmp_path, *made[2], "--max_bytes=20000", "--pattern=gpt2")
    used = int(capsys.readouterr().out.splitlines()[0].split(" from ")[1].split()[0].replace(",", ""))
    assert 10000 < used < 20000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocab_size=256"], "--vocab_size=256 must be at least 257"),
        (["--vocab_size=30000"], "not --vocab_size=30000; give more text or lower --vocab_size"),
        (["--special_tokens=the"], r"'the' must have the form <\|name\|>"),
        (["--max_bytes=0"], "--max_bytes=0"),
        (["--max_bytes=1"], "contains no text within --max_bytes=1"),
        (["--pattern=llama"], "invalid choice"),
        (["--text_key=text"], "line 1 is not a JSON object with a field 'text'"),
    ],
)
def test_mistakes_write_nothing(corpus, tmp_path, call, flags, message):
    with pytest.raises(UserError, match=message):
        call(
            train_tokenizer,
            *(corpus / "docs.jsonl", "--text_key=body", "--vocab_size=300", "--output", tmp_path / "out"),
            *flags,
        )
    assert not (tmp_path / "out").exists()


def test_input_without_text_is_one_line(corpus, tmp_path):
    done = command(corpus / "empty.txt", "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no text" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_input_and_existing_output_are_errors(made, corpus, tmp_path, call):
    with pytest.raises(UserError, match="no such file"):
        call(train_tokenizer, corpus / "none.txt", "--output", tmp_path / "out")
    before = (made[0] / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        call(train_tokenizer, corpus / "*.jsonl", "--output", made[0], *made[2])
    assert (made[0] / "tokenizer.json").read_bytes() == before
