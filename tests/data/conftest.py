"""Fixtures for tests of data preparation: small inputs, commands run in this process, readers of outputs."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import text, tiny_shakespeare
from data.prepare import cli
from data.prepare.job import Job
from data.prepare.workers import EncodeOptions
from data.shards import open_shard
from data.tokenizers.load import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def fim_tokenizer():
    return load_tokenizer("gpt2-fim")


@pytest.fixture
def call(monkeypatch):
    """Runs the `main` of a command's module in this process, which saves the start of Python."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        module.main()

    return run


@pytest.fixture
def quick(tokenizer, fim_tokenizer, call, monkeypatch):
    """Runs data/text.py or another command in this process, with shared tokenizers, one worker and tiktoken."""
    loaded = {"gpt2": tokenizer, "gpt2-fim": fim_tokenizer}
    for module in (cli, tiny_shakespeare):
        monkeypatch.setattr(module, "load_tokenizer", lambda name="gpt2": loaded[name])

    def run(*args, command=text):
        call(command, *([] if command is tiny_shakespeare else ["--workers=1", "--encoder=tiktoken"]), *args)

    return run


@pytest.fixture(scope="session")
def make_job(tokenizer):
    """Makes a job with default settings, for tests below the commands."""

    def make(output_dir, tokenizer=tokenizer, fim_rate=0.0, skip_bad=False, **settings):
        options = EncodeOptions(fim_rate=fim_rate, skip_bad=skip_bad, fast=False)
        return Job(output_dir, "x", settings.pop("recipe", {"of": "test"}), tokenizer, options, **settings)

    return make


def parquet_file(path, documents, key, rows=None):
    pq.write_table(pa.table({"id": list(range(len(documents))), key: documents}), path, row_group_size=rows)


def write_documents(folder: Path, suffix: str, documents: list[str], key: str = "text") -> Path:
    """Writes documents as files of one kind. Returns the path or glob to give to the command."""
    if suffix.startswith((".txt", ".md")):
        for i, document in enumerate(documents):
            (folder / f"doc{i}{suffix}").write_bytes(packed(document.encode(), suffix))
        return folder / f"*{suffix}"
    path = folder / f"docs{suffix}"
    if suffix == ".parquet":
        parquet_file(path, documents, key)
    else:
        lines = "".join(json.dumps({"id": 1, key: document}) + "\n" for document in documents)
        path.write_bytes(packed(lines.encode(), suffix))
    return path


def packed(content: bytes, suffix: str) -> bytes:
    for end, library in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        if suffix.endswith(end):
            return library.compress(content)
    return pa.compress(content, codec="zstd", asbytes=True) if suffix.endswith(".zst") else content


@pytest.fixture(scope="session")
def write_input():
    return write_documents


@pytest.fixture(scope="session")
def pack():
    return packed


def tokens_in_shards(folder: Path, pattern: str, vocab_size: int = 50260) -> list[list[int]]:
    shards = [open_shard(path, vocab_size, check_all=True) for path in sorted(folder.glob(pattern))]
    return [shard.read(0, shard.count).tolist() for shard in shards]


@pytest.fixture(scope="session")
def tokens_of():
    """Returns the token ids of the shards that match a pattern, a list per shard."""
    return tokens_in_shards


@pytest.fixture(scope="session")
def whole():
    """Returns all tokens of an output, in the order of the input."""
    return lambda folder: sum(tokens_in_shards(folder, "*_val_*.bin") + tokens_in_shards(folder, "*_train_*.bin"), [])


@pytest.fixture(scope="session")
def documents_in(tokenizer):
    """Returns the texts between end-of-text tokens."""

    def cut(tokens):
        assert tokens[0] == tokenizer.end_of_text
        cuts = [i for i, token in enumerate(tokens) if token == tokenizer.end_of_text] + [len(tokens)]
        return [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(cuts, cuts[1:], strict=False)]

    return cut


@pytest.fixture(scope="session")
def content():
    """Returns the bytes of every file below a folder."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
