"""scripts/soak.py: what it calls the same run and what it does not, and the kills that it plans."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts.soak import (
    MOMENTS,
    ROOT,
    SAVE_EVERY,
    TARGETS,
    State,
    Storm,
    differences,
    last_checks,
    look,
    moment_of,
    note,
    parse,
    plan,
)
from util.errors import UserError

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def runs(tmp_path):
    """Two run directories that show the same."""

    def make(name):
        folder = tmp_path / name
        for kind in ("model", "optimizer"):
            (folder / "checkpoints" / "step_00000008" / kind).mkdir(parents=True)
            tensors = {f"{kind}.{i}": WEIGHT + i for i in range(3)}
            save_file(tensors, folder / "checkpoints" / "step_00000008" / kind / "shard-1.safetensors")
        (folder / "logs").mkdir()
        records = [{"step": k, "loss": 1 / k, "lr": 0.1, "elapsed_s": k * random.random()} for k in range(1, 9)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return folder

    return make("killed"), make("undisturbed")


def test_the_same_run_at_another_speed_is_the_same(runs):
    assert differences(*runs) == []
    assert last_checks(Storm([], runs[0], runs[0] / "log"), runs[1]) == []


def test_a_bit_of_the_optimizer_makes_a_difference(runs):
    path = runs[0] / "checkpoints/step_00000008/optimizer/shard-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    [line] = differences(*runs)
    assert line.startswith("1 of 3 tensors of the optimizer differ: optimizer.2 (shard-1.safetensors)")


def test_so_does_a_tensor_that_is_not_there_and_the_order_of_the_header_none(runs):
    path = runs[0] / "checkpoints/step_00000008/model/shard-1.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    turned = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode().ljust(start - 8)
    path.write_bytes(content[:8] + turned + content[start:])
    assert differences(*runs) == []
    shutil.rmtree(path.parent)
    assert differences(*runs)[0].startswith("3 of 3 tensors of the model differ")


def test_so_does_the_last_digit_of_a_loss_and_a_step_that_is_missing(runs):
    path = runs[0] / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.3333333333333333", "0.33333333333333337"))
    assert differences(*runs)[0].startswith("the trace differs from step 3 on: {'step': 3, 'loss': 0.33333333333333337")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert differences(*runs)[0] == "7 steps are logged instead of 8"


def test_what_is_left_behind_is_told(runs):
    (runs[0] / "checkpoints" / ".saving_00000012").mkdir()
    (runs[0] / "logs" / "metrics_superseded.jsonl").write_text('{"step": 3}\n')
    hidden, superseded, steps = last_checks(Storm([], runs[0], runs[0] / "log"), runs[1])
    assert hidden == "left in checkpoints/: .saving_00000012"
    assert superseded.endswith("metrics_superseded.jsonl holds 1 lines; logged and repeated were 0")
    assert steps == "1 logged steps were repeated, by the checkpoints it can have been 0"


def test_the_moment_is_told_by_what_lies_there(runs):
    """Step 8 is logged and its checkpoint stands: in training, until a save begins."""
    state = look(runs[0])
    assert (state.logged, state.newest, state.saving, state.deleting) == (8, 8, 0, False)
    assert (moment_of(state, fresh=True), moment_of(state, fresh=False)) == ("training", "start-up")
    lines = state.lines
    assert moment_of(State(lines, newest=8, saving=12, deleting=False), fresh=True) == "save"
    assert moment_of(State(lines, newest=12, saving=0, deleting=True), fresh=True) == "prune"
    assert moment_of(State(lines, newest=12, saving=0, deleting=False), fresh=True) == "evaluation"


def test_a_kill_may_cost_the_steps_since_a_save_and_no_more(tmp_path):
    storm = Storm([], tmp_path, tmp_path / "log")
    lines = [json.dumps({"step": k}) for k in range(1, 12)]
    note(storm, "all", "save", State(lines, 8, 12, False), State(lines, 8, 12, False))
    assert storm.kills[0].repeated == SAVE_EVERY and storm.problems == []  # 9, 10, 11, and 12, which is not logged
    note(storm, "all", "start-up", State(lines, 8, 12, False), State(lines, 8, 12, False))
    assert storm.kills[1].repeated == 0  # by the life that ended in its start-up
    more = [*lines, json.dumps({"step": 12, "elapsed_s": 1.0}), json.dumps({"step": 13})]
    note(storm, "all", "training", State(more, 12, 0, False), State(more, 8, 0, False))
    assert storm.problems == [
        "the checkpoint of step 12 vanished after kill 3",
        "kill 3 costs 5 steps, more than the 4 of a save",
    ]


def test_each_target_and_moment_has_its_turn():
    kills = plan(50, random.Random(1))
    assert len(kills) == 50 and kills == plan(50, random.Random(1)) != plan(50, random.Random(2))
    assert Counter(moment for _, moment in kills) == dict.fromkeys(MOMENTS, 10)
    assert set(Counter(target for target, _ in kills).values()) == {16, 17}
    assert {moment for _, moment in kills[:5]} == set(MOMENTS) and {target for target, _ in kills[:3]} == set(TARGETS)


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--kills=0"], "--kills=0 must be at least 1"),
        (["--stages=4"], "--stages=4 must be numbers from 0 to 3"),
        (["--num_iterations", "9"], "--num_iterations is what soak.py chooses"),
        ([f"--output_dir={ROOT}"], "is not empty; choose a new folder"),
        (["--ranks=two"], "ranks: invalid int value"),
        (["--n_heads=3"], "unknown flag --n_heads; did you mean n_head"),
        (["--n_head=3"], "n_head=3"),
    ],
)
def test_mistakes_are_one_line(flags, says):
    with pytest.raises(UserError, match=says):
        parse(flags)
