"""data/sft.py: rows of every format become packed conversations with masks, and bad input is one line."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg.config import load_config
from data import sft
from data.documents import document_positions
from data.loader import inputs_and_targets
from data.open import open_train_data, open_val_data
from data.prepare.conversations import messages_of
from data.prepare.job import MANIFEST
from data.prepare.packing import pack
from data.shards import open_shard, write_shard
from data.tokenizers.load import load_tokenizer
from model.gpt import GPT, init_weights
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
T = 128
END_OF_TEXT = 256  # of the tokenizer bytes
ROWS = [
    {"instruction": "Name the largest planet.", "input": "", "output": "The largest planet is Jupiter."},
    {"instruction": "Translate to French.", "input": "good night", "output": "bonne nuit"},
    {"instruction": "Describe crêpes.", "input": None, "output": "Thin pancakes.\n\n1. Mix.\n2. Fry. <|im_end|>"},
    {"prompt": "2 + 2?", "completion": "4", "id": 7},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Goodbye"},
        ]
    },
    {"conversations": [{"from": "human", "value": "Ping"}, {"from": "gpt", "value": "Pong"}], "system": "Play."},
]
TURNS = [
    "<|im_start|>user\nName the largest planet.<|im_end|>\n"
    "<|im_start|>assistant\nThe largest planet is Jupiter.<|im_end|>\n",
    "<|im_start|>user\nTranslate to French.\n\ngood night<|im_end|>\n<|im_start|>assistant\nbonne nuit<|im_end|>\n",
    "<|im_start|>user\nDescribe crêpes.<|im_end|>\n"
    "<|im_start|>assistant\nThin pancakes.\n\n1. Mix.\n2. Fry. <|im_end|><|im_end|>\n",
    "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nGoodbye<|im_end|>\n",
    "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\nPing<|im_end|>\n<|im_start|>assistant\nPong<|im_end|>\n",
]
REPLIES = [
    "The largest planet is Jupiter.<|im_end|>",
    "bonne nuit<|im_end|>",
    "Thin pancakes.\n\n1. Mix.\n2. Fry. <|im_end|><|im_end|>",
    "4<|im_end|>",
    "Hello<|im_end|>Goodbye<|im_end|>",
    "Pong<|im_end|>",
]


def interrupt_at(call):
    """Returns os.replace, which fails at its `call`-th call for a file of a data set."""
    replace, calls = os.replace, []

    def interrupted(source, target):
        if ".partial" in str(source) and ".partial" not in str(target):
            calls.append(source)
            if len(calls) == call:
                raise KeyboardInterrupt
        replace(source, target)

    return interrupted


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def make(call, tmp_path):
    """Runs data/sft.py in this process with the tokenizer `bytes` and a small sequence length."""

    def run(*args, out="out", length=T):
        call(sft, *args, "--output_dir", tmp_path / out, "--tokenizer=bytes", f"--sequence_length={length}", "--name=x")
        return tmp_path / out

    return run


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(ROWS))
    return path


def read(folder, pattern="*.bin"):
    """Returns ids and masks of the shards of a folder that match, both (n,)."""
    paths = sorted(folder.glob(pattern))
    shards = [open_shard(path, 2**16) for path in paths]
    ids = np.concatenate([shard.read(0, shard.count) for shard in shards]).astype(int)
    mask = np.concatenate([np.fromfile(path.with_suffix(".mask"), np.uint8) for path in paths])
    assert len(ids) == len(mask)
    return ids, mask


def conversations_in(folder, pattern="*.bin"):
    """Returns text and counted text of each conversation."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    ids, mask = read(folder, pattern)
    found = []
    cuts = [*np.flatnonzero(ids == tokenizer.end_of_text), len(ids)]
    for a, b in zip(cuts, cuts[1:], strict=False):
        if b > a + 1:
            counted = ids[a + 1 : b][mask[a + 1 : b] == 1]
            found.append((tokenizer.decode(ids[a + 1 : b].tolist()), tokenizer.decode(counted.tolist())))
    return found


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


# Rows


def test_rows_of_every_format_become_conversations(make, source, tmp_path, capsys):
    out = make(source, length=512)
    assert sorted(conversations_in(out)) == sorted(zip(TURNS, REPLIES, strict=True))
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *("tokenizer", "x_train_000001.bin", "x_train_000001.mask", "x_val_000000.bin", "x_val_000000.mask"),
    ]
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: 5 conversations for training and 1 for validation"
    make(source, length=512)
    assert capsys.readouterr().out == f"{out}: already there\n"
    make("--check")
    assert "hashes, ids and masks are as in the manifest" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other input or options \(val_share\)"):
        make(source, "--val_share=0.5", length=512)


def test_lists_compressed_files_and_parquet_hold_the_same_rows(make, source, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:4]), ("c", ROWS[4:5]), ("d", ROWS[5:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    expected = sorted(conversations_in(make(source, out="first")))
    for i, name in enumerate(("list.json", "rows.jsonl.gz", "?.parquet")):
        assert sorted(conversations_in(make(tmp_path / name, out=f"out{i}"))) == expected


def test_the_format_of_rows_can_be_named(make, tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    both = row | {"prompt": "c", "completion": "d"}
    (tmp_path / "both.jsonl").write_text(lines([both]))
    args = (tmp_path / "both.jsonl", "--val_share=0")
    assert [reply for _, reply in conversations_in(make(*args))] == ["b<|im_end|>"]
    assert [reply for _, reply in conversations_in(make(*args, "--rows=prompt", out="named"))] == ["d<|im_end|>"]


@pytest.mark.parametrize(
    "row, problem",
    [
        ("oops", " is not JSON"),
        ("[1]", " is not a JSON object"),
        ({"text": "a"}, " needs the fields messages, or conversations, or instruction and output, or .*; it has text"),
        ({"messages": []}, ": messages is empty"),
        ({"messages": "a"}, ": messages is not a list"),
        ({"messages": ["a"]}, ": message 1 is not an object with role and content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, ": message 1 has the unknown role 'robot', not one of"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r": message 1 has the unknown role .\['user'\]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, ": message 1 calls tools, which is not supported"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, ": the content of message 1 is not text"),
        ({"messages": [{"role": "user", "content": "a"}]}, " has no message of the assistant"),
        ({"instruction": "a", "output": 3}, ": output is not text"),
        ({"prompt": "\U0010ff00", "completion": "a"}, " contains U\\+10FF00, which is reserved"),
    ],
)
def test_a_malformed_row_is_one_line_or_counted(make, tmp_path, capsys, row, problem):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines(ROWS[:2]) + (row if isinstance(row, str) else json.dumps(row)) + "\n" + lines(ROWS[2:]))
    with pytest.raises(UserError, match=f"bad.jsonl: line 3{problem}") as error:
        make(path)
    assert "\n" not in str(error.value) and "--skip_bad" in str(error.value)
    assert os.listdir(tmp_path / "out") == [".partial"]
    out = make(path, "--skip_bad")
    assert "1 bad skipped" in capsys.readouterr().out
    assert len(conversations_in(out)) == len(ROWS)


def test_malformed_rows_of_lists_and_parquet_name_their_place(make, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([ROWS[0], {"a": 1}]))
    with pytest.raises(UserError, match="list.json: item 2 needs the fields"):
        make(tmp_path / "list.json")
    table = pa.table({"prompt": ["a", "b"], "completion": pa.array([b"c", b"\xff"]).cast(pa.binary())})
    pq.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match="bytes.parquet: row 1: completion is not text"):
        make(tmp_path / "bytes.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "bytes.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="cut.parquet: not a readable parquet file"):
        make(tmp_path / "cut.parquet")


def test_rows_without_text_are_skipped_and_counted(make, tmp_path, capsys):
    rows = [{"instruction": "a", "output": ""}, {"messages": None}, {"prompt": "", "completion": "b"}, *ROWS]
    (tmp_path / "rows.jsonl").write_text(lines(rows) + "\n")
    assert len(conversations_in(make(tmp_path / "rows.jsonl"))) == len(ROWS)
    assert "3 empty skipped" in capsys.readouterr().out


def test_half_a_surrogate_pair_is_replaced():
    row = json.loads('{"prompt": "a\\ud83d", "completion": "b"}')
    assert messages_of(row)[0]["content"] == "a�"


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("empty.jsonl", "", "the input contains no conversations, 1 empty skipped"),
        ("one.jsonl", lines(ROWS[:1]), "--val_share=0.05 leaves no conversation for training"),
        ("a.txt", "a", "conversations are read from .jsonl, .json and .parquet files"),
        ("lfs.jsonl", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_a_file_without_conversations_is_one_line(make, tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=problem):
        make(tmp_path / name)


def test_the_template_must_accept_the_conversation(make, source, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(UserError, match=r"line 5: the chat template fails \(no system\); repair it"):
        make(source, f"--chat_template={tmp_path / 't.jinja'}")


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--sequence_length=4"], "--sequence_length=4 must be at least 8"),
        (["--val_share=1"], "--val_share=1.0 must be at least 0 and less than 1"),
        (["--shard_size=10"], "--shard_size=10 must be from --sequence_length"),
        (["--name=a/b"], "--name=a/b must be a name"),
        (["--rows=text"], "--rows: invalid choice"),
    ],
)
def test_wrong_flags_are_one_line(call, source, tmp_path, flags, problem):
    with pytest.raises(UserError, match=problem):
        call(sft, source, "--output_dir", tmp_path / "out", "--tokenizer=bytes", *flags)


# Packing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 20)), st.integers(20, 50), st.integers(1, 12))
def test_packing_loses_and_cuts_nothing(lengths, size, buffer):
    blocks = pack(lengths, size, buffer)
    assert sorted(i for block in blocks for i in block) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in block) for block in blocks]
    assert all(0 < total <= size for total in sums)
    if buffer >= len(lengths):  # no two blocks fit into one
        assert all(a + b > size for i, a in enumerate(sums) for b in sums[:i])


words = st.text("ab \n<|é", min_size=1, max_size=30).map(lambda text: "x" + text)
row = st.tuples(words, words).map(lambda pair: {"prompt": pair[0], "completion": pair[1]})


def tokens_of(row):
    """Returns the number of tokens of a conversation: the separator, four special tokens, and bytes."""
    return 5 + len(f"user\n{row['prompt']}\nassistant\n{row['completion']}\n".encode())


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(row, min_size=2, max_size=30), val_share=st.sampled_from(["0", "0.3"]))
def test_the_shards_hold_every_conversation_once(tmp_path_factory, rows, val_share):
    folder, size = tmp_path_factory.mktemp("sft"), 64
    (folder / "rows.jsonl").write_text(lines([*rows, {"prompt": "p", "completion": "c"}]))
    out = folder / "x"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--tokenizer=bytes", "--sequence_length=64", "--val_share", val_share, "--shard_size=200"]
        patch.setattr(sys, "argv", ["sft", str(folder / "rows.jsonl"), "--output_dir", str(out), *flags])
        sft.main()
    manifest, found = manifest_of(out), Counter(conversations_in(out))
    start, end = "<|im_start|>", "<|im_end|>"
    whole = Counter(
        (
            f"{start}user\n{row['prompt']}{end}\n{start}assistant\n{row['completion']}{end}\n",
            f"{row['completion']}{end}",
        )
        for row in [*rows, {"prompt": "p", "completion": "c"}]
        if tokens_of(row) <= size
    )
    assert not whole - found  # none that fits is cut or lost
    assert (found - whole).total() == manifest["cut"]
    assert found.total() == manifest["documents"] == len(rows) + 1 - sum(manifest["skipped"].values())
    for split in ("train", "val")[: 1 + (val_share != "0")]:
        ids, mask = read(out, f"*_{split}_*.bin")
        assert len(ids) == manifest["blocks"][split] * size + 1
        assert (ids[::size] == 256).all() and not mask[::size].any() and not mask[ids == 256].any()
        assert mask.sum() == manifest["counted_tokens"][split]
    sizes = [row["tokens"] for row in manifest["files"] if row["name"].startswith("x_train") and "tokens" in row]
    assert sizes[:-1] == [3 * size] * (len(sizes) - 1) and sizes[-1] % size == 1


def test_the_same_command_writes_the_same_bytes(make, source, tmp_path, content):
    first = content(make(source))
    shutil.rmtree(tmp_path / "out")
    assert content(make(source)) == first


def test_equal_conversations_are_on_one_side_of_the_split(make, tmp_path):
    rows = [{"prompt": f"question {i % 10}", "completion": "answer"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    out = make(tmp_path / "rows.jsonl", "--val_share=0.25")
    sides = [{text for text, _ in conversations_in(out, f"*_{split}_*.bin")} for split in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[1]) == 3


def test_a_long_conversation_is_cut_or_skipped_and_counted(make, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b" * 200}, {"prompt": "c" * 200, "completion": "d"}, *ROWS[3:4]]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    out = make(tmp_path / "rows.jsonl", "--val_share=0")
    assert ", 1 cut, 1 too long before the first reply skipped" in capsys.readouterr().out
    assert len(read(out)[0]) == 2 * T + 1
    assert sorted(len(reply) for _, reply in conversations_in(out)) == [11, T - len("\0\1user\na\1\n\1assistant\n")]


# The real command


def command(*args, fault=""):
    script = [sys.executable, str(ROOT / "data" / "sft.py"), *map(str, args)]
    environment = os.environ | ({"RAWGPT_FAULT": fault} if fault else {})
    return subprocess.run(script, capture_output=True, text=True, env=environment)


def test_the_command_reports_an_error_in_one_line(source, tmp_path):
    (tmp_path / "bad.jsonl").write_text(lines(ROWS) + "{\n")
    done = command(tmp_path / "bad.jsonl", "--output_dir", tmp_path / "out", "--tokenizer=bytes")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {tmp_path}/bad.jsonl: line 7 is not JSON; repair it, or skip damaged text with --skip_bad\n"
    )


def test_an_interruption_leaves_nothing_that_a_glob_finds(make, source, tmp_path, content, monkeypatch):
    expected = content(make(source))
    shutil.rmtree(tmp_path / "out")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(source)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", interrupt_at(4))
    with pytest.raises(KeyboardInterrupt):
        make(source)
    assert not [*(tmp_path / "out").glob("*.bin")]
    monkeypatch.undo()
    assert content(make(source)) == expected


# Reading


@pytest.fixture
def config(make, source, tmp_path):
    """Returns a function that makes the configuration of a run on conversations."""
    folder = make(source, "--val_share=0.3", "--shard_size=128", length=64)

    def load(*flags, data=f"{folder}/*_train_*.bin", length=64):
        return load_config(
            [
                f"--input_train_bin={data}",
                f"--input_val_bin={folder}",
                f"--sequence_length={length}",
                f"--tokenizer={folder / 'tokenizer'}",
                f"--total_batch_size={2 * length}",
                *"--vocab_size=259 --n_layer=1 --n_head=1 --n_embd=8 --batch_size=1".split(),
                *flags,
            ]
        )

    load.folder = folder
    load.fingerprint = load_tokenizer(str(folder / "tokenizer")).fingerprint
    return load


def test_the_loader_returns_the_mask_of_a_batch(config):
    data = open_train_data(config(), config.fingerprint)
    ids, mask = read(config.folder, "*_train_*.bin")
    blocks = {tuple(ids[i : i + 65]): mask[i : i + 65].tolist() for i in range(0, len(ids) - 1, 64)}
    assert data.windows == len(blocks) >= 3
    for step in (1, 2):
        batch, found = data.batch(step), data.mask(step)
        assert [row.tolist() for row in found.int()] == [blocks[tuple(row.tolist())] for row in batch]
        assert found[:, 1:].any(1).all() and not found[:, 0].any() and not found[:, -1].any()
        parts = [data.mask(step, part, 2) for part in (0, 1)]
        assert (found == np.concatenate(parts)).all()
    val = open_val_data(config(), config.fingerprint)
    assert [row.tolist() for row in val.gather_mask([0]).int()] == [read(config.folder, "*_val_*.bin")[1][:65].tolist()]
    assert "mask_ends" in data.fingerprint["shards"][0] and data.counted_tokens() == mask.sum()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_loss_of_packed_conversations_is_that_of_each_alone(config, positions):
    data = open_train_data(config(), config.fingerprint)
    model = GPT(config(*f"--positions={positions} --n_embd=16 --n_layer=2".split()))
    init_weights(model, 0)
    packed = alone = 0.0
    for step in range(1, data.windows // 2 + 1):
        idx, targets = (t.long() for t in inputs_and_targets(data, step, 0, 1))
        packed += model.loss(idx, targets, document_positions(idx, END_OF_TEXT))[0].item()
        for ids, mask in zip(data.batch(step).long(), data.mask(step), strict=True):
            cuts = [*(ids[:-1] == END_OF_TEXT).nonzero().flatten().tolist(), len(ids) - 1]
            for start, end in zip(cuts, cuts[1:], strict=False):
                log_p = model(ids[None, start:end])[0].log_softmax(-1)
                counted = range(start + 1, end)
                alone -= sum(log_p[i - start - 1, ids[i]].item() for i in counted if mask[i])
    assert packed == pytest.approx(alone, rel=1e-5) and packed > 100


def test_an_empty_shard_counts_no_tokens(config):
    write_shard(config.folder / "x_train_000000.bin", np.empty(0, np.uint16), 259)
    (config.folder / "x_train_000000.mask").touch()
    (config.folder / MANIFEST).unlink()  # it does not list this shard
    data = open_train_data(config(), config.fingerprint)
    assert data.counted_tokens() == read(config.folder, "*_train_*.bin")[1].sum()


def test_a_mixture_counts_all_tokens_of_sources_without_masks(config, tmp_path):
    shutil.copytree(config.folder, tmp_path / "plain")
    for path in (*tmp_path.glob("plain/*.mask"), tmp_path / "plain" / MANIFEST):
        path.unlink()
    mixed = f"chat=1:{config.folder}/*_train_*.bin,text=1:{tmp_path}/plain/*_train_*.bin"
    data = open_train_data(config(data=mixed), config.fingerprint)
    found = np.stack([data.mask(step).numpy() for step in (1, 2)])
    assert sorted(found.all(-1).sum(-1)) == [1, 1]
    plain = open_train_data(config(data=f"{tmp_path}/plain/*_train_*.bin"), config.fingerprint)
    assert data.counted_tokens() == read(config.folder, "*_train_*.bin")[1].sum() + plain.counted_tokens()
    assert plain.mask(1) is None and plain.gather_mask([0]) is None


def test_data_that_does_not_fit_the_run_is_one_line(config, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            open_train_data(config(**changes), config.fingerprint)

    refused("--sequence_length=32: the conversations in .* were packed for --sequence_length=64", length=32)
    first = config.folder / "x_train_000001.mask"
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    refused("x_train_000001.mask: truncated: 127 bytes for the 128 tokens of x_train_000001.bin")
    first.write_bytes(content + b"\0")
    refused("x_train_000001.mask: too long")
    first.unlink()
    refused("--input_train_bin: .*x_train_000001.mask is missing")
    first.write_bytes(content)
    (config.folder / MANIFEST).write_bytes(b"")
    refused("manifest.json: damaged .*; restore it, or prepare the data again")
    (config.folder / MANIFEST).unlink()
    for name in ("x_train_000001.bin", "x_train_000001.mask"):
        shutil.copy(config.folder / name, config.folder / name.replace("_000001", "_000009"))
    refused("tokens, which are not whole blocks of --sequence_length=64; give one data set")


@pytest.mark.parametrize("damage", ["mask", "tokenizer", "moved"])
def test_check_finds_damage(make, source, damage):
    out = make(source)
    if damage == "tokenizer":
        file = out / "tokenizer" / "tokenizer.json"
        file.write_bytes(file.read_bytes() + b" ")
    else:
        mask = out / "x_train_000001.mask"
        mask.write_bytes(mask.read_bytes()[::-1])
        if damage == "moved":
            mask.unlink()
    with pytest.raises(UserError, match="is not the file that its manifest describes|is missing"):
        make("--check")


def test_check_of_another_folder_is_one_line(call, tmp_path):
    with pytest.raises(UserError, match="no data set that data/sft.py has made"):
        call(sft, "--check", "--output_dir", tmp_path)
