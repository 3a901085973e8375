"""metrics.jsonl, the console line, peak rates."""

import errno
import io
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfg.config import load_config
from train.metrics import Metrics, duration, read_records, to_json
from train.plot import plot_losses
from util.errors import StorageError
from util.ranks import Ranks

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
RECORD = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tok_per_s": 1e4, "mfu": None, "elapsed_s": 1.0, "memory_bytes": 1}


def record(step, **extra):
    return {"step": step, "tokens": step * 10, **RECORD, **extra}


def start(tmp_path, step=0, *flags):
    (tmp_path / "logs").mkdir(exist_ok=True)
    metrics = Metrics(load_config([f"--output_dir={tmp_path}", *flags], world_size=1), ALONE)
    metrics.start(step)
    return metrics


def test_numbers_keep_all_their_digits(tmp_path):
    metrics = start(tmp_path)
    metrics.log(record(1, val_loss=1 / 3))
    metrics.close()
    assert read_records(tmp_path / "metrics.jsonl")[0]["val_loss"] == 1 / 3


def test_nan_is_written_as_null(tmp_path, capsys):
    metrics = start(tmp_path)
    metrics.log(record(1, skipped="loss or gradient not finite") | {"loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None
    assert read_records(tmp_path / "metrics.jsonl") == [line]
    assert "skipped: loss or gradient not finite" in capsys.readouterr().out


def test_a_resume_drops_later_and_torn_lines_and_keeps_a_copy(tmp_path):
    metrics = start(tmp_path)
    for k in range(1, 6):
        metrics.log(record(k))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')
    resumed = start(tmp_path, 3)
    assert resumed.has(3) and not resumed.has(4)
    resumed.log(record(4))
    resumed.close()
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["step"] for r in read_records(tmp_path / "logs" / "metrics_superseded.jsonl")] == [4, 5]


def test_a_skipped_step_stays_logged(tmp_path):
    metrics = start(tmp_path)
    for k in range(1, 5):
        metrics.log(record(k, **({"skipped": "norm 9, a spike above 3"} if k == 3 else {})))
    metrics.close()
    start(tmp_path, 3).close()
    assert [r.get("skipped") for r in read_records(tmp_path / "metrics.jsonl")] == [None] * 2 + [
        "norm 9, a spike above 3"
    ]


def test_a_line_without_its_line_end_stays_complete(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(to_json(record(1)) + to_json(record(2)).rstrip("\n"))
    resumed = start(tmp_path, 2)
    resumed.log(record(3))
    resumed.close()
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.fault(
    "metrics.jsonl truncated at any byte, or with repeated records", "complete lines of the valid steps, each once"
)
def test_wherever_a_kill_cuts_the_file_each_step_is_there_once(tmp_path, monkeypatch, injected):
    """Complete lines of valid steps stay, bit for bit; other lines are moved to logs/."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # 300 examples; no power cut is tested
    lines = [to_json(record(k, **({"val_loss": 1 / k} if k % 3 == 0 else {}))) for k in range(1, 9)]
    whole, path = "".join(lines), tmp_path / "metrics.jsonl"

    @settings(max_examples=300, deadline=None)
    @given(cut=st.integers(0, len(whole)), step=st.integers(0, 9), twice=st.integers(0, 3), torn=st.integers(0, 40))
    def holds(cut, step, twice, torn):
        """The file after two kills: lines, `twice` of them repeated, then a truncated line."""
        content = whole[:cut]
        complete = content.count("\n") + (not content.endswith("\n") and content.endswith("}"))
        content += ("\n" if content and not content.endswith("\n") else "") + "".join(lines[: min(twice, complete)])
        path.write_text(content + lines[0][:torn])
        kept = [r for r in range(1, complete + 1) if r <= step]
        resumed = start(tmp_path, step)
        assert path.read_text() == "".join(lines[k - 1] for k in kept)
        assert resumed.has(step) == (step in (0, *kept))
        for k in range(step + 1, 9):
            resumed.log(record(k))
        resumed.close()
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == [*kept, *range(step + 1, 9)]

    holds()
    injected(300)


def test_each_line_of_a_long_history_is_parsed_once(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("".join(to_json(record(k)) for k in range(1, 38_147)))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    start(tmp_path, 38_000).close()
    assert len(parsed) == 38_146
    assert len(read_records(tmp_path / "metrics.jsonl")) == 38_000


def test_other_ranks_write_nothing(tmp_path):
    class Second(Ranks):
        def on_main(self, decide):
            return None  # what rank 0 gives

    second = Second(1, 1, 2, torch.device("cpu"))
    metrics = Metrics(load_config([f"--output_dir={tmp_path}"], world_size=1), second)
    metrics.start(0)
    metrics.log(record(1))
    metrics.say("hello")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_the_console_line_shows_every_value(tmp_path, capsys):
    metrics = start(tmp_path, 0, "--num_iterations=3601", "--log_every=1")
    metrics.log(record(1, mfu=0.5) | {"memory_bytes": 2**30, "val_loss": 1.0, "val_bpb": 0.5})
    metrics.close()
    out = capsys.readouterr().out
    for part in ("step 1/3601", "loss 2.5000", "lr 1.00e-03", "10,000 tok/s", "mfu 50.0%", "1.00 GiB", "eta 1h00m"):
        assert part in out
    assert "val loss 1.0000 | perplexity 2.72 | 0.5000 bits/byte" in out


def test_durations():
    assert [duration(s) for s in (5, 65, 3700)] == ["0m05s", "1m05s", "1h01m"]


def test_a_plot_needs_something_to_draw(tmp_path):
    assert plot_losses(tmp_path) is None
    metrics = start(tmp_path)
    metrics.log(record(1, val_loss=2.0))
    metrics.close()
    assert plot_losses(tmp_path) == tmp_path / "loss.png"


@pytest.mark.fault(
    "the disk is full in the middle of a line of metrics.jsonl", "the next start has every line once and complete"
)
def test_a_torn_line_is_gone_at_the_next_start(tmp_path, injected):
    metrics = start(tmp_path)
    metrics.log(record(1))

    class Full(io.StringIO):
        def flush(self):
            with open(tmp_path / "metrics.jsonl", "a") as f:
                f.write(self.getvalue()[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metrics._file.close()
    metrics._file = Full()
    with pytest.raises(StorageError, match="step 2 could not be written to metrics.jsonl .No space left on device.;"):
        metrics.log(record(2))
    for again in (metrics.flush, metrics.close):
        with pytest.raises(StorageError, match="step 2 could not be written"):
            again()
    assert not metrics.has(2) and not (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    metrics = start(tmp_path, 1)
    metrics.log(record(2))
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == to_json(record(1)) + to_json(record(2))
    injected(1)


def test_a_record_may_hold_any_json_value(tmp_path):
    metrics = start(tmp_path)
    metrics.log(record(1, clipped=True, note="x", layers=[1, {"norm": 0.5}]))
    metrics.close()
    [found] = read_records(tmp_path / "metrics.jsonl")
    assert found["clipped"] is True and found["layers"] == [1, {"norm": 0.5}]
    assert plot_losses(tmp_path) == tmp_path / "loss.png"
