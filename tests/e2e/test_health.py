"""A long run does not grow: memory, open files and threads, measured from outside while it trains."""

import time
from pathlib import Path
from typing import NamedTuple

import pytest

STEPS = 1200
# Everything that a run does at intervals, every 100 steps, with the smallest model.
FLAGS = "--n_layer=1 --n_head=1 --n_embd=8 --sequence_length=8 --batch_size=2 --total_batch_size=32 --tokenizer=none"
FLAGS += " --val_loss_every=100 --val_max_steps=2 --sample_every=100 --sample_tokens=4 --save_every_niter=100"
GROWTH = 0.02
PROMISE = "memory grows by less than 2 % after the first third; the numbers of open files and threads stay constant"


class Seen(NamedTuple):
    """A measurement of one process."""

    step: int
    memory: int  # resident pages
    files: int
    threads: int


def look(pid: int, step: int) -> Seen:
    place = Path(f"/proc/{pid}")
    memory = int((place / "statm").read_text().split()[1])
    return Seen(step, memory, len(list((place / "fd").iterdir())), len(list((place / "task").iterdir())))


def watched(process, output_dir: Path, pids) -> dict[int, list[Seen]]:
    """Measures each process until the last step is logged. Returns process id → measurements."""
    seen: dict[int, list[Seen]] = {}
    log, at, step = output_dir / "metrics.jsonl", 0, 0
    while process.poll() is None and step < STEPS:
        time.sleep(0.02)
        if log.exists():
            with open(log, "rb") as f:
                f.seek(at)
                new = f.read()
            at, step = at + len(new), step + new.count(b"\n")
        for pid in pids() if step < STEPS else ():  # after the last step a curve is drawn
            seen.setdefault(pid, []).append(look(pid, step))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return seen


def assert_steady(seen: list[Seen]) -> float:
    """Checks the last third against the second. Returns the growth of memory as a fraction."""
    second = [s for s in seen if STEPS / 3 <= s.step < 2 * STEPS / 3]
    last = [s for s in seen if 2 * STEPS / 3 <= s.step < STEPS]
    assert len(second) > 20 and len(last) > 20, len(seen)
    growth = max(s.memory for s in last) / max(s.memory for s in second) - 1
    since_start = max(s.memory for s in last) / min(s.memory for s in second) - 1
    assert growth < GROWTH and since_start < GROWTH, (growth, since_start)
    # While a checkpoint is written its files are open; otherwise the number of open files is constant.
    for number in ("files", "threads"):
        least, most = (f(getattr(s, number) for s in second) for f in (min, max))
        assert min(getattr(s, number) for s in last) <= least, number
        assert max(getattr(s, number) for s in last) <= most + (number == "files"), number
    return growth


@pytest.mark.slow
@pytest.mark.fault("1,200 steps with validations, samples and saves", PROMISE)
@pytest.mark.parametrize("background", [0, 1])
def test_a_long_run_does_not_grow(trainer, tmp_path, injected, background):
    flags = [*FLAGS.split(), f"--num_iterations={STEPS}", f"--async_save={background}"]
    process = trainer.start(tmp_path / "run", *flags)
    seen = watched(process, tmp_path / "run", lambda: [process.pid])
    assert_steady(seen[process.pid])
    injected(STEPS)


@pytest.mark.slow
@pytest.mark.fault("1,200 steps on 2 ranks with --zero_stage=3", PROMISE)
@pytest.mark.parametrize("background", [0, 1])
def test_a_long_run_on_two_ranks_does_not_grow(trainer, tmp_path, injected, background):
    flags = [*FLAGS.split(), f"--num_iterations={STEPS}", f"--async_save={background}", "--zero_stage=3"]
    process = trainer.start(tmp_path / "run", *flags, ranks=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    seen = watched(process, tmp_path / "run", lambda: map(int, children.read_text().split()))
    ranks = [one for one in seen.values() if one[-1].step > STEPS / 2]
    assert len(ranks) == 2
    for one in ranks:
        assert_steady(one)
    injected(STEPS)
