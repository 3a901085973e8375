"""scripts/soak.sh: how it compares runs, plans kills and counts their cost."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.soak.kills import (
    PHASES,
    ROOT,
    SAVE_EVERY,
    TARGETS,
    Run,
    check_end,
    phase_of,
    plan_kills,
    record_kill,
)
from tests.soak.main import parse
from tests.soak.trace import State, find_differences, read_state
from util.errors import UserError

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def runs(tmp_path):
    """Two directories of equal runs."""

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


def test_equal_runs_at_different_speeds_have_no_differences(runs):
    assert find_differences(*runs) == []
    assert check_end(Run([], runs[0], runs[0] / "log"), runs[1]) == []


def test_a_flipped_bit_of_the_optimizer_is_a_difference(runs):
    path = runs[0] / "checkpoints/step_00000008/optimizer/shard-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    [line] = find_differences(*runs)
    assert line.startswith("1 of 3 tensors of the optimizer differ: optimizer.2 (shard-1.safetensors)")


def test_a_missing_tensor_is_a_difference_but_the_order_of_the_header_is_not(runs):
    path = runs[0] / "checkpoints/step_00000008/model/shard-1.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    turned = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode().ljust(start - 8)
    path.write_bytes(content[:8] + turned + content[start:])
    assert find_differences(*runs) == []
    shutil.rmtree(path.parent)
    assert find_differences(*runs)[0].startswith("3 of 3 tensors of the model differ")


def test_the_last_digit_of_a_loss_and_a_missing_step_are_differences(runs):
    path = runs[0] / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.3333333333333333", "0.33333333333333337"))
    assert find_differences(*runs)[0].startswith(
        "the trace differs from step 3 on: {'step': 3, 'loss': 0.33333333333333337"
    )
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert find_differences(*runs)[0] == "7 steps are logged instead of 8"


def test_leftover_files_and_lines_are_reported(runs):
    (runs[0] / "checkpoints" / ".saving_00000012").mkdir()
    (runs[0] / "logs" / "metrics_superseded.jsonl").write_text('{"step": 3}\n')
    hidden, superseded, steps = check_end(Run([], runs[0], runs[0] / "log"), runs[1])
    assert hidden == "left in checkpoints/: .saving_00000012"
    assert superseded.endswith("metrics_superseded.jsonl has 1 lines, but 0 logged steps were repeated")
    assert steps == "1 logged steps were repeated, but the checkpoints allow at most 0"


def test_the_phase_follows_from_the_files(runs):
    """Step 8 is logged and has a checkpoint: the run is training until a save begins."""
    state = read_state(runs[0])
    assert (state.logged, state.newest, state.saving, state.deleting) == (8, 8, 0, False)
    assert (phase_of(state, has_logged=True), phase_of(state, has_logged=False)) == ("training", "start-up")
    lines = state.lines
    assert phase_of(State(lines, newest=8, saving=12, deleting=False), has_logged=True) == "save"
    assert phase_of(State(lines, newest=12, saving=0, deleting=True), has_logged=True) == "prune"
    assert phase_of(State(lines, newest=12, saving=0, deleting=False), has_logged=True) == "evaluation"


def test_a_kill_that_costs_more_than_the_steps_since_a_save_is_a_problem(tmp_path):
    run = Run([], tmp_path, tmp_path / "log")
    lines = [json.dumps({"step": k}) for k in range(1, 12)]
    record_kill(run, "all", "save", State(lines, 8, 12, False), State(lines, 8, 12, False))
    assert run.kills[0].repeated == SAVE_EVERY and run.problems == []  # 9, 10, 11, and 12, which was not logged
    record_kill(run, "all", "start-up", State(lines, 8, 12, False), State(lines, 8, 12, False))
    assert run.kills[1].repeated == 0  # the second attempt ended in its start-up
    more = [*lines, json.dumps({"step": 12, "elapsed_s": 1.0}), json.dumps({"step": 13})]
    record_kill(run, "all", "training", State(more, 12, 0, False), State(more, 8, 0, False))
    assert run.problems == [
        "the checkpoint of step 12 vanished after kill 3",
        "kill 3 costs 5 steps, but saves are 4 steps apart",
    ]


def test_every_target_and_phase_takes_its_turn():
    kills = plan_kills(50, random.Random(1))
    assert len(kills) == 50 and kills == plan_kills(50, random.Random(1)) != plan_kills(50, random.Random(2))
    assert Counter(phase for _, phase in kills) == dict.fromkeys(PHASES, 10)
    assert set(Counter(target for target, _ in kills).values()) == {16, 17}
    assert {phase for _, phase in kills[:5]} == set(PHASES) and {target for target, _ in kills[:3]} == set(TARGETS)


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--kills=0"], "--kills=0 must be at least 1"),
        (["--stages=4"], "--stages=4 must be numbers from 0 to 3"),
        (["--num_iterations", "9"], "--num_iterations is chosen by soak.sh"),
        ([f"--output_dir={ROOT}"], "is not empty; choose a new folder"),
        (["--ranks=two"], "ranks: invalid int value"),
        (["--n_heads=3"], "unknown flag --n_heads; did you mean n_head"),
        (["--n_head=3"], "n_head=3"),
    ],
)
def test_mistakes_are_one_line(flags, says):
    with pytest.raises(UserError, match=says):
        parse(flags)
