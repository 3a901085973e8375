"""Mistakes of a user: one line that names the flag or the file and how to fix it, exit code 2, nothing written."""

import numpy as np
import pytest

from cfg.config import load_config
from data.shards import HEADER_BYTES, write_shard
from train.summary import cpu_warnings

VOCAB = 251


def one_line(trainer, output_dir, *flags):
    done = trainer.run(output_dir, *flags, code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.bin"
    write_shard(path, np.arange(5000) % VOCAB, VOCAB)
    return path.read_bytes()


def header(good, index, value):
    ints = np.frombuffer(good[:HEADER_BYTES], "<i4").copy()
    ints[index] = value
    return ints.tobytes() + good[HEADER_BYTES:]


BROKEN = {
    "truncated": (lambda good: good[:-7], "truncated"),
    "empty": (lambda good: b"", "empty file"),
    "half a header": (lambda good: good[:100], "less than a header"),
    "magic": (lambda good: header(good, 0, 12345), "magic 12345"),
    "version": (lambda good: header(good, 1, 9), "version 9"),
    "vocabulary": (lambda good: good[:-2] + b"\xff\x00", "token id 255 at position 4999"),
    "too few tokens": (lambda good: header(good, 2, 200)[: HEADER_BYTES + 400], "too few for one batch of 257"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_shard_is_an_error_that_names_it(trainer, good, tmp_path, name):
    damage, message = BROKEN[name]
    (tmp_path / "x_train.bin").write_bytes(damage(good))
    line = one_line(trainer, tmp_path / "run", f"--input_train_bin={tmp_path}/*_train.bin")
    assert message in line and ("x_train.bin" in line or "--input_train_bin" in line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--input_train_bin=nowhere/*.bin"], "--input_train_bin=nowhere/*.bin matches no file"),
        (["--input_val_bin=nowhere/*.bin"], "--input_val_bin=nowhere/*.bin matches no file"),
        (["--input_train_bin=a=1:nowhere/*.bin"], "--input_train_bin=nowhere/*.bin matches no file"),
        (["--input_train_bin=a=1:x,b=-1:y"], "--input_train_bin: the weight of b is '-1'"),
        (["--input_val_bin=a=1:x,b=1:y"], "validation reads one set of shards"),
        (["--num_epochs=2"], "--num_epochs=2: --num_iterations is given too; leave one of them out"),
        (["--num_epochs=-1"], "--num_epochs=-1: input should be greater than or equal to 0"),
        (["--total_batch_size=100"], "nearest: 64 or 128"),
        (["--batch_size=3"], "= 3 × 32 × 1 = 96; lower --batch_size to 2, or choose the nearest: 192 or 288"),
        (["--n_embd=33"], "nearest: 32 or 34"),
        (["--learning_rate=-1"], "--learning_rate=-1: input should be greater than 0"),
        (["--learning_rate=nan"], "--learning_rate=nan: input should be a finite number"),
        (["--num_iterations=0"], "--num_iterations=0"),
        (["--batch_size=many"], "--batch_size=many: input should be a valid integer"),
        (["--weight_decya=0.1"], "unknown flag --weight_decya; did you mean weight_decay?"),
        (["--zero_stage=4"], "--zero_stage=4: input should be less than or equal to 3"),
        (["--replicas=2"], "--replicas=2 needs --zero_stage=2 or 3"),
        (["--doc_mask=1", "--tokenizer=none"], "--doc_mask=1 needs the end-of-text token"),
        (["--doc_mask=1"], "--vocab_size=251 does not fit tokenizer gpt2"),
        (["--cfg=shakespear"], "did you mean shakespeare?"),
        (["--input_train_bin="], "--input_train_bin: give the training shards"),
    ],
)
def test_a_bad_flag_is_an_error_that_names_it(trainer, tmp_path, flags, message):
    assert message in one_line(trainer, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_preset_of_another_vocabulary_has_no_default_data(command, tmp_path):
    for preset in ("llama2-7b", "llama3-8b", "mistral-7b"):
        done = command("train_gpt.py", f"--cfg={preset}", f"--output_dir={tmp_path}/run", code=2)
        assert "--input_train_bin: give the training shards; this preset has none" in done.stderr


def test_a_vocabulary_far_larger_than_the_token_ids_is_a_warning(trainer, tmp_path, shards):
    for size in (2 * VOCAB, 2 * VOCAB + 1):
        done = trainer.run(tmp_path / str(size), f"--vocab_size={size}", "--num_iterations=1", "--input_val_bin=")
        warning = f"warning: --vocab_size={size}, but the largest token id found in {shards} is {VOCAB - 1}; "
        assert (warning in done.stdout) == (size > 2 * VOCAB)


def test_the_advice_for_a_small_validation_set_names_what_matters_there(trainer, tmp_path):
    write_shard(tmp_path / "x_val.bin", np.arange(20), VOCAB)
    line = one_line(trainer, tmp_path / "run", f"--input_val_bin={tmp_path}/*_val.bin")
    assert "--input_val_bin has 20 tokens, too few for one sequence of 33; lower --sequence_length, or add data" in line


def test_a_bad_token_id_beyond_the_sample_is_found_when_it_is_read(trainer, tmp_path, shards):
    """The check at the start reads a sample of a large file. The loader checks each batch."""
    tokens = np.zeros(3_000_000, np.uint16)
    tokens[20_000:40_000] = VOCAB
    write_shard(tmp_path / "x_train.bin", tokens, 2**16)
    flags = [f"--input_train_bin={tmp_path}/*_train.bin", "--shuffle=0", "--num_iterations=20", "--log_every=1000"]
    flags += ["--batch_size=64", "--total_batch_size=2048"]
    line = one_line(trainer, tmp_path / "run", *flags)
    assert "x_train.bin: token id 251 at position 20000" in line
    assert "token id 251" in one_line(trainer, tmp_path / "other", *flags, "--check_data=1")


def test_a_directory_that_is_not_a_run_is_left_alone(trainer, tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    assert "contains config.yaml but no checkpoints" in one_line(trainer, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_an_output_dir_that_cannot_be_written_is_an_error(trainer, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in one_line(trainer, tmp_path / "file" / "run")
    assert "cannot be written" in one_line(trainer, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_under_torchrun_only_rank_0_prints_the_error(trainer, tmp_path):
    err = trainer.run(tmp_path / "run", "--input_train_bin=nowhere/*.bin", ranks=2, code=1).stderr
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: --input_train_bin=nowhere/*.bin matches no file: folder nowhere does not exist;"
        " docs/data.md explains how to make shards"
    ]
    assert "exitcode  : 2" in err


def test_sampling_without_a_checkpoint_is_an_error(command, tmp_path):
    for flags, message in (
        (["--checkpoint", str(tmp_path / "none")], "no such checkpoint"),
        (["--checkpoint", str(tmp_path)], "contains no checkpoint"),
        (["--checkpoint", str(tmp_path), "--top_k=x"], "--top_k"),
        ([], "--checkpoint"),
    ):
        assert message in command("eval/generate.py", "--device=cpu", *flags, code=2).stderr


def test_a_run_that_takes_long_on_a_cpu_is_a_warning_with_the_time(trainer, tmp_path):
    out = trainer.run(tmp_path / "run", "--num_iterations=1e9", "--max_minutes=0.001").stdout
    (warning,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    # 1e9 steps × 256 tokens × 216 kFLOP / 50 GFLOP/s: the estimate of train/summary.py, on one core
    assert "1,000,000,000 steps would take about 13 days on this CPU" in warning and "per core × 1)" in warning
    assert "warning" not in trainer.run(tmp_path / "short", "--num_iterations=5").stdout
    (gpt2,) = cpu_warnings(load_config([], 1), flops_per_token=855_000_000, cores=2)  # GPT-2 124M
    assert "1,000 steps would take about 9.7 hours" in gpt2
    (compiled,) = cpu_warnings(load_config(["--compile=1"], 1), flops_per_token=10**6, cores=2)
    assert compiled.startswith("--compile on a CPU: the first step takes up to three minutes longer")


def test_compiling_on_a_cpu_needs_a_compiler(trainer, tmp_path):
    done = trainer.run(tmp_path / "run", "--compile=1", code=2, env={"CXX": "no-such-compiler"})
    assert done.stderr.startswith("error: --compile=1 on a CPU needs a C++ compiler, but no-such-compiler is not")
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_link_to_nothing_is_an_error_that_names_both(trainer, command, shards, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    line = one_line(trainer, link / "run")
    assert f"--output_dir={link}/run: {link} is a link to {tmp_path}/gone, which does not exist; " in line
    text = tmp_path / "a.txt"
    text.write_text("some text")
    for words in (
        ["data/text.py", text, "--output_dir", link],
        ["data/tiny_shakespeare.py", "--output_dir", link],
        ["data/hellaswag.py", "--output_dir", link],
        ["data/train_tokenizer.py", text, "--vocab_size=260", "--output", link],
        ["scripts/export.py", "--checkpoint", tmp_path, "--output", link],
    ):
        assert f"={link}: {link} is a link to {tmp_path}/gone" in command(*words, code=2).stderr
    assert {p.name for p in tmp_path.iterdir()} == {"link", "a.txt"}
