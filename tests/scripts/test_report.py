"""The command scripts/report.py: what it writes and prints, what it refuses, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.report import main, parse
from tests.scripts.reporting.make_runs import long_run, record, write_run
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [record(k, 6 - k / 10, val_loss=6 - k / 10) for k in range(1, 11)])


def report(*words):
    return main(parse([str(word) for word in words]))


def test_a_page_is_written_and_written_again(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    for _ in range(2):
        assert report(run, f"--output={page}") == 0
    assert capsys.readouterr().out.startswith(f"{page}: 1 run, 0.1 MB\n") and "<title>" in page.read_text()


def test_nothing_but_a_report_is_overwritten(run, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    with pytest.raises(UserError, match=f"^--output={mine}: exists and is not a report"):
        report(run, "--output", mine)
    assert mine.read_text() == "<p>mine</p>"


def test_the_comparison_is_printed(run, tmp_path, capsys):
    other = write_run(
        tmp_path / "other", [record(k, 5.5 - k / 10, val_loss=5.5 - k / 10) for k in range(1, 11)], n_layer=3
    )
    report(run, other, "--text", "--losses=5.2")
    text = capsys.readouterr().out
    assert "Flags that differ\nflag     run  other\nn_layer  –    3\n" in text
    assert "5.2   4.19M tokens, 2 s  1.57M tokens (×0.375), 0.75 s (×0.375)\n" in text
    report(run, other, "--json", "--price=2")
    found = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in found["runs"]] == ["run", "other"] and found["flags"] == {"n_layer": [None, 3]}


def test_logs_of_others_are_overlaid(run, tmp_path, capsys):
    (tmp_path / "run.log").write_text("s:0 tel:9.0\ns:10 tel:4.0\n")
    report(run, f"--import=llmc:{tmp_path / 'run.log'}", "--tokens_per_step=1K", "--json")
    assert [(r["name"], r["tokens"]) for r in json.loads(capsys.readouterr().out)["runs"]] == [
        ("run", 5242880),
        ("run (2)", 10000),
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no run given"),
        (["{run}", "--price=0"], "--price=0: must be a number above 0"),
        (["{run}", "--price=nan"], "--price=nan: must be a number above 0"),
        (["{run}", "--smooth=-1"], "--smooth=-1: must be"),
        (["{run}", "--losses=3,x"], "--losses=3,x: 'x' is not a number"),
        (["{run}", "--serve=70000"], "--serve=70000: a port is a number"),
        (["{run}", "--text", "--json"], "--text and --json: give one of them"),
        (["{run}", "--text", "--output=x.html"], "--text and --output: give one of them"),
        (["{run}", "--output={run}"], "is a folder; give the name of a file"),
        (["{run}", "--output={run}/missing/x.html"], "does not exist; create it first"),
        (["{run}/metrics.jsonl", "--text"], "is a file; give the --output_dir of a run"),
        (["{run}/missing", "--text"], "no such folder"),
        (["{run}/logs", "--text"], "no run, for it has no metrics.jsonl"),
        (["{run}", "--outptu=x"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(run, words, message):
    with pytest.raises(UserError) as error:
        report(*(word.format(run=run) for word in words))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_real_command_needs_no_torch(run, tmp_path, imports_of):
    done, imported = imports_of(ROOT / "scripts/report.py", run, f"--output={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "matplotlib", "pandas"} & imported and (tmp_path / "page.html").exists()
    failed = subprocess.run([sys.executable, ROOT / "scripts/report.py", tmp_path], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_hundred_thousand_steps_take_little_time_and_memory(tmp_path):
    """The limit is 10 s of one core; the processor time is measured, since the machine may be shared."""
    folder = long_run(tmp_path / "run", 100_000)
    code = (
        "import sys, time; from scripts.report import main, parse; main(parse(sys.argv[1:]));"
        # Not ru_maxrss, which on Linux begins with the memory of the process that forked this one.
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(time.process_time(), peak)"
    )
    command = [sys.executable, "-c", code, str(folder), f"--output={tmp_path / 'page.html'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.splitlines()[-1].split())
    assert seconds < 10 and kilobytes * 1024 < 500e6
