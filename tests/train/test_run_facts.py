"""run.json: each start and each roll-back of a run is in it, whatever was there before."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from train import run_facts
from train.run_facts import add_roll_back, add_start, git_commit, read_facts, write_facts
from util.ranks import Ranks


@pytest.fixture(autouse=True)
def nothing_written(monkeypatch):
    monkeypatch.setattr(run_facts, "_content", {"starts": [], "rollbacks": []})


def model(strategy=""):
    gpt = SimpleNamespace(num_params=lambda: 123, flops_per_token=lambda length: 10 * length)
    return SimpleNamespace(gpt=gpt, strategy=lambda: strategy)


def ranks(world_size=1):
    return Ranks(0, 0, world_size, torch.device("cpu"))


def test_each_start_and_roll_back_is_added(tmp_path):
    add_start(tmp_path, 0, ranks(), model(), 32)
    run_facts._content = {"starts": [], "rollbacks": []}  # another process
    add_start(tmp_path, 40, ranks(2), model(", ZeRO-3 on 2"), 32)
    add_roll_back(tmp_path, 52, 40, "loss not finite")
    found = json.loads((tmp_path / "run.json").read_text())
    first, second = found["starts"]
    assert (first["step"], first["ranks"], first["strategy"]) == (0, 1, "one process")
    assert (second["step"], second["ranks"], second["strategy"]) == (40, 2, "ZeRO-3 on 2")
    assert (second["parameters"], second["flops_per_token"], second["device"]) == (123, 320, "cpu")
    assert found["rollbacks"] == [{"step": 52, "to": 40, "reason": "loss not finite"}]


def test_a_deleted_file_is_written_again(tmp_path):
    add_start(tmp_path, 0, ranks(), model(), 32)
    before = (tmp_path / "run.json").read_bytes()
    (tmp_path / "run.json").unlink()
    write_facts(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"starts": 3}', '{"starts": [1, null], "rollbacks": "x"}', "[" * 9999]
)
def test_a_damaged_file_is_empty(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert read_facts(tmp_path) == {"starts": [], "rollbacks": []}
    add_start(tmp_path, 5, ranks(), model(), 32)
    assert [start["step"] for start in read_facts(tmp_path)["starts"]] == [5]


def test_a_roll_back_that_cannot_be_written_is_no_error(tmp_path):
    add_roll_back(tmp_path / "missing", 5, 0, "loss not finite")


def test_the_commit_tells_whether_files_were_changed(tmp_path, monkeypatch):
    def git(*words):
        settings = ["-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *settings, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    monkeypatch.setattr(run_facts, "ROOT", tmp_path)
    assert git_commit() == ""  # not a repository
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_commit() == commit
    (tmp_path / "code.py").write_text("2")
    assert git_commit() == f"{commit}-dirty"
