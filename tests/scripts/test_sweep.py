"""scripts/sweep.py: the runs of a sweep file, in which order and where they run, and what a second start does.

Most tests replace train_gpt.py by a script that only writes the files of a run.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import sweep
from scripts.sweeping import results, runner, settings
from util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = "n_layer: 1, n_head: 1, n_embd: 16, vocab_size: 251, sequence_length: 32, batch_size: 2, device: cpu"
# Does what its environment variable FAKE says for its folder, "done" by default.
FAKE = """
import json, os, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder = flags["output_dir"]
how = json.loads(os.environ.get("FAKE", "{}")).get(os.path.basename(folder), "done")
os.makedirs(folder + "/checkpoints", exist_ok=True)
def write(name, content, mode="w"):
    with open(folder + "/" + name, mode) as f:
        f.write(content)
def status(status, reason=""):
    write("status.json", json.dumps({"status": status, "step": 2, "reason": reason}))
write("starts", json.dumps([os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]) + "\\n", "a")
if how == "user error":
    sys.exit(print("error: --input_train_bin=x: no such shards", file=sys.stderr) or 2)
write("config.yaml", "")
status("running")
loss = 1 + float(flags.get("learning_rate", 0)) + float(flags.get("seed", 0)) / 4
write("metrics.jsonl", json.dumps({"step": 1, "loss": 9, "val_loss": loss + 1, "elapsed_s": 1}) + "\\n")
write("metrics.jsonl", json.dumps({"step": 2, "loss": loss, "elapsed_s": 62.0}) + '\\n{"step": 3, "lo', "a")
if how == "wait":
    def stop(number, frame):
        write("signals", signal.Signals(number).name + "\\n", "a")
        status("stopped", "a signal")
        time.sleep(0.3)  # a second signal would be noted too
        os._exit(4)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    write("ready", "")
    time.sleep(60)
if how == "crash":
    print("Traceback\\nValueError: broken", file=sys.stderr)
    sys.exit(1)
status(how, "reason of the run" if how == "diverged" else "")
sys.exit({"diverged": 3}.get(how, 0))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replaces train_gpt.py and report.py, and clears the environment variables that the sweep reads."""
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE)
    monkeypatch.setattr(runner, "TRAIN", script)
    monkeypatch.setattr(sweep, "REPORT", tmp_path / "missing.py")
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "FAKE"):
        monkeypatch.delenv(name, raising=False)
    return script


@pytest.fixture
def write(tmp_path):
    """A function that writes a sweep file, with small flags unless others are given. Any file serves as a shard."""

    def write_file(text, flags=SIZE):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"output_dir: {tmp_path}/out\nflags: {{{flags}, input_train_bin: {path}}}\n{text}\n")
        return path

    return write_file


def names(path):
    return [run.name for run in settings.read_sweep(path, 1)[1]]


def starts(tmp_path):
    """Returns the number of starts of each run."""
    return {f.parent.name: len(f.read_text().splitlines()) for f in sorted((tmp_path / "out").glob("*/starts"))}


# --- the file ---


def test_a_grid_has_every_combination_and_runs_and_seeds_are_added(write):
    path = write(
        "grid: {learning_rate: [1e-3, 2e-3], n_layer: [1, 2]}\nruns: [{name: big}, {dropout: 0.1}]\nseeds: [1, 2]"
    )
    grid = [f"learning_rate={rate}_n_layer={n}" for rate in ("0.001", "0.002") for n in (1, 2)]
    assert names(path) == [f"{name}_seed={seed}" for name in (*grid, "big", "dropout=0.1") for seed in (1, 2)]


def test_each_run_has_the_common_flags_overridden_by_its_own(write):
    path = write("runs: [{n_layer: 2, compile: true}, {name: plain}]\nseeds: [7]")
    first, plain = settings.read_sweep(path, 1)[1]
    common = [f"--{flag.replace(': ', '=')}" for flag in SIZE.split(", ")]
    folder = f"--output_dir={path.parent}/out/n_layer=2_compile=1_seed=7"
    common.append(f"--input_train_bin={path}")
    assert first.flags == ["--n_layer=2", *common[1:], "--compile=1", "--seed=7", folder]
    assert plain.flags[: len(common)] == common and plain.config.n_layer == 1 and plain.config.seed == 7


def test_a_folder_does_not_depend_on_how_a_value_is_written(write):
    written = ("1e-3", "0.001", "1.0e-3", "'1e-3'")
    assert {tuple(names(write(f"grid: {{learning_rate: [{value}]}}"))) for value in written} == {
        ("learning_rate=0.001",)
    }
    assert names(write("grid: {num_iterations: [10K, 2.0e4], flash: [yes, 0]}"))[::2] == [
        "num_iterations=10000_flash=1",
        "num_iterations=20000_flash=1",
    ]
    with pytest.raises(UserError, match="two runs have the folder learning_rate=0.001"):
        names(write("grid: {learning_rate: [1e-3, 0.001]}"))


def test_values_that_are_not_file_names_stay_distinct(write):
    found = names(write(f"grid: {{sample_prompt: [a/b, a b, {'x' * 300}, {'x' * 301}, ../..]}}"))
    assert len(set(found)) == 5 and all(len(name) < 80 and "/" not in name and " " not in name for name in found)
    assert found == names(write(f"grid: {{sample_prompt: [a/b, a b, {'x' * 300}, {'x' * 301}, ../..]}}"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("grid: {n_layer: [1, 2], n_head: [1, 3]}", "n_layer=1 n_head=3: --n_embd=16 must be a multiple of"),
        ("runs: [{name: a}, {name: b, n_layer: x}]", "b: --n_layer=x: input should be a valid integer"),
        ("grid: {learnig_rate: [1]}", "grid: unknown flag 'learnig_rate'; did you mean learning_rate?"),
        ("gird: {n_layer: [1]}", "unknown key 'gird'; did you mean grid?"),
        ("n_layer: [1, 2]", "unknown key 'n_layer'; flags of train_gpt.py stand under flags"),
        ("grid: {n_layer: 2}", "grid: n_layer: 2: must be a list with at least one entry"),
        ("grid: [1]", "grid: [1]: must be flags and values"),
        ("grid: {n_layer: []}", "grid: n_layer: []: must be a list with at least one entry"),
        ("grid: {n_layer: [[1, 2]]}", "grid: n_layer=[1, 2]: must be a number, a text or true or false"),
        ("grid: {n_layer: [null]}", "grid: n_layer=None: must be a number"),
        ("runs: {n_layer: 2}", "runs: {'n_layer': 2}: must be a list"),
        ("runs: [{}]", "runs: entry 1: sets no flag; give it a name"),
        ("runs: [{name: a/b}]", "runs: entry 1: name=a/b: use up to 100 letters"),
        ("runs: [{name: ..}]", "runs: entry 1: name=..: use up to 100 letters"),
        ("runs: [{name: a}, {name: A}]", "two runs have the folder A"),
        ("runs: [{output_dir: x}]", "runs: entry 1: output_dir: is set by the sweep"),
        ("runs: [{seed: 3}]\nseeds: [1]", "seed is set as a flag and by seeds"),
        ("seeds: [one]", "seed=one: --seed=one: input should be a valid integer"),
        ("seeds: []", "seeds: []: must be a list"),
        ("", "no runs; add grid, runs or seeds"),
        ("grid: {n_layer: [1]}\ngrid: {n_head: [1]}", "lines 3 and 4 both set grid"),
        ("grid: {n_layer: [1", "is not readable as YAML"),
        ("runs: [{input_val_bin: 'missing/*.bin'}]", "--input_val_bin=missing/*.bin matches no file"),
        ("grid: {input_train_bin: ['']}", "input_train_bin=: --input_train_bin: give the training shards"),
    ],
)
def test_mistakes_in_the_file_are_one_line(write, fake, tmp_path, text, message):
    path = write(text)
    with pytest.raises(UserError) as caught:
        sweep.main([str(path)])
    line = " ".join(str(caught.value).split())
    assert line.startswith(f"{path}: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_file_without_output_dir_or_with_other_content_is_one_line(tmp_path):
    path = tmp_path / "sweep.yaml"
    for text, message in (("seeds: [1]", "output_dir: missing"), ("[1]", "not a sweep file"), ("", "not a sweep file")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            settings.read_sweep(path, 1)
    with pytest.raises(UserError, match="absent.yaml: No such file"):
        settings.read_sweep(tmp_path / "absent.yaml", 1)


# --- the runs ---


def test_finished_runs_are_skipped_and_new_values_are_added(write, fake, tmp_path, capfd):
    assert sweep.main([str(write("grid: {learning_rate: [1, 2]}\nseeds: [1]"))]) == 0
    assert starts(tmp_path) == {"learning_rate=1_seed=1": 1, "learning_rate=2_seed=1": 1}
    assert "[2/2] learning_rate=2_seed=1: done, loss 3.2500, val loss 4.2500, 1m02s\n" in capfd.readouterr().out
    assert sweep.main([str(write("grid: {learning_rate: [1, 2, 4]}\nseeds: [1, 2]"))]) == 0
    assert set(starts(tmp_path).values()) == {1} and len(starts(tmp_path)) == 6
    out = capfd.readouterr().out
    assert "6 runs, 2 of them finished before" in out and "[4/4]" in out


@pytest.mark.parametrize("status", ["running", "stopped", "user error"])
def test_a_run_that_did_not_finish_is_started_again(write, fake, tmp_path, status):
    path = write("runs: [{name: a}]")
    assert sweep.main([str(path)]) == 0
    (tmp_path / "out/a/status.json").write_text(json.dumps({"status": status, "step": 1, "reason": ""}))
    assert sweep.main([str(path)]) == 0
    assert starts(tmp_path) == {"a": 2}


@pytest.mark.parametrize("status, code", [("done", 0), ("out of time", 0), ("diverged", 1)])
def test_a_run_that_would_end_in_the_same_way_is_not_started_again(write, fake, tmp_path, monkeypatch, status, code):
    path = write("runs: [{name: a}]")
    monkeypatch.setenv("FAKE", json.dumps({"a": status}))
    assert [sweep.main([str(path)]) for _ in range(2)] == [code, code]
    assert starts(tmp_path) == {"a": 1}


def test_failed_runs_do_not_stop_the_others_and_are_counted(write, fake, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAKE", json.dumps({"a": "user error", "b": "crash", "c": "diverged"}))
    path = write("runs: [{name: a}, {name: b}, {name: c}, {name: d}]")
    assert sweep.main([str(path)]) == 1
    out = capfd.readouterr().out
    console = tmp_path / "out/a/console.log"
    assert f"a: failed, loss -, val loss -, -; exit code 2: --input_train_bin=x: no such shards; see {console}" in out
    assert "b: failed" in out and "exit code 1: ValueError: broken" in out and "[4/4] d: done" in out
    assert out.endswith("3 of 4 runs failed; the same command runs 2 again\n")


def test_runs_that_have_other_flags_now_are_one_line(write, fake, tmp_path):
    sweep.main([str(write("runs: [{name: a}]"))])
    sweep.main([str(write("runs: [{name: a}]", f"{SIZE}, log_every: 1, save_every_niter: 5"))])  # the results stay
    before = (tmp_path / "out/sweep.json").read_text()
    with pytest.raises(UserError, match="out/a: was started with num_epochs=0.0, but the sweep now has 2.0; change it"):
        sweep.main([str(write("runs: [{name: a}]", f"{SIZE}, num_epochs: 2"))])
    with pytest.raises(UserError, match="started with total_batch_size=64, but the sweep now has 128"):
        sweep.main([str(write("runs: [{name: a}, {name: b}]")), "--gpus_per_run=2"])
    assert (tmp_path / "out/sweep.json").read_text() == before and starts(tmp_path) == {"a": 1}
    (tmp_path / "out/a/config.yaml").unlink()  # it never began
    assert sweep.main([str(write("runs: [{name: a}]", f"{SIZE}, num_epochs: 2"))]) == 0


def test_folders_of_others_are_left_alone(write, fake, tmp_path):
    path = write("runs: [{name: a}]")
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/config.yaml").touch()
    with pytest.raises(UserError, match="out/a: holds a run that this sweep did not start"):
        sweep.main([str(path)])
    (tmp_path / "out/config.yaml").touch()
    with pytest.raises(UserError, match="out: is the folder of a run, not of a sweep"):
        sweep.main([str(path)])
    (tmp_path / "out/config.yaml").unlink()
    for text in ("{", "[]", '{"a": 1}'):
        (tmp_path / "out/sweep.json").write_text(text)
        with pytest.raises(UserError, match="sweep.json: damaged"):
            sweep.main([str(path)])


def test_a_second_sweep_in_the_same_folder_is_refused(write, fake, tmp_path):
    path = write("runs: [{name: a}]")
    (tmp_path / "out").mkdir()
    lock, _ = sweep.take_lock(tmp_path / "out/.lock")
    with lock, pytest.raises(UserError, match=f"in use by another sweep .process {os.getpid()}."):
        sweep.main([str(path)])
    assert sweep.main([str(path)]) == 0


# --- GPUs and cores ---


@pytest.mark.parametrize(
    "gpus, per_run, visible, devices",
    [
        ("3", 1, None, ["0", "1", "2"]),
        ("0,2", 1, None, ["0", "2"]),
        ("0,", 1, None, ["0"]),
        ("4", 2, None, ["0,1", "2,3"]),
        ("2", 1, "5,7,8", ["5", "7"]),
        ("0,2", 2, "5,7,8", ["5,8"]),
        ("2", 1, "GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_each_run_has_its_own_gpus(fake, monkeypatch, gpus, per_run, visible, devices):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    slots = runner.make_slots(gpus, per_run, None)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == devices


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus=0"], "--gpus=0: give a number of GPUs, or indices such as 0,2 (for GPU 0 alone: 0,)"),
        (["--gpus=1,1"], "--gpus=1,1: give a number"),
        (["--gpus=all"], "--gpus=all: give a number"),
        (["--gpus=-1"], "--gpus=-1: give a number"),
        (["--gpus=3", "--gpus_per_run=2"], "--gpus=3: 3 GPUs; must be a multiple of --gpus_per_run=2"),
        (["--gpus=2", "--jobs=2"], "--jobs=2: is for runs without --gpus"),
        (["--gpus=2", "--slurm=x"], "--slurm=x: SLURM chooses the GPUs; leave --gpus and --jobs out"),
        (["--jobs=0"], "--jobs=0: must be at least 1"),
        (["--gpus_per_run=0"], "--gpus_per_run=0: must be at least 1"),
        (["--num_iterations=3"], "unrecognized arguments: --num_iterations=3"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(write, fake, arguments, message):
    with pytest.raises(UserError) as caught:
        sweep.main([str(write("seeds: [1]")), *arguments])
    assert message in str(caught.value)


def test_gpus_that_are_not_visible_are_one_line(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match="--gpus=0,2: CUDA_VISIBLE_DEVICES=4,5 has 2 GPUs; name fewer"):
        runner.make_slots("0,2", 1, None)


def test_the_cores_are_divided_among_all_processes(fake, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12), raising=False)
    assert runner.make_slots(None, 1, None) == [{}]
    assert runner.make_slots(None, 2, 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert runner.make_slots("4", 2, None)[1] == {"CUDA_VISIBLE_DEVICES": "2,3", "OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert runner.make_slots(None, 1, 3) == [{}] * 3


def test_n_runs_at_a_time_each_on_a_free_gpu(write, fake, tmp_path, monkeypatch):
    before, most, on = runner.start, [], []

    def start(run, slot, gpus_per_run):
        process = before(run, slot, gpus_per_run)
        on.append((process, slot["CUDA_VISIBLE_DEVICES"]))
        busy = [gpu for p, gpu in on if p.returncode is None]
        assert len(set(busy)) == len(busy), "two runs share a GPU"
        most.append(len(busy))
        return process

    monkeypatch.setattr(runner, "start", start)
    assert sweep.main([str(write("seeds: [1, 2, 3, 4, 5]")), "--gpus=4,6"]) == 0
    assert len(on) == 5 and max(most) == 2
    for process, gpu in on:
        folder = next(word for word in process.args if word.startswith("--output_dir=")).split("=", 1)[1]
        assert json.loads((Path(folder) / "starts").read_text())[0] == gpu


def test_dry_run_prints_the_commands_and_writes_nothing(write, fake, tmp_path, capfd):
    path = write("seeds: [1, 2]", f"{SIZE.removesuffix(', device: cpu')}, sample_prompt: two words")
    assert sweep.main([str(path), "--gpus=4", "--gpus_per_run=2", "--dry_run"]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith("CUDA_VISIBLE_DEVICES=0,1 OMP_NUM_THREADS=") and "CUDA_VISIBLE_DEVICES=2,3 " in second
    assert f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 " in first
    assert f"{fake} --n_layer=1" in first and "'--sample_prompt=two words'" in first
    assert first.endswith(" --device=cuda"), "a run must not use the CPU in place of its GPU"
    assert not (tmp_path / "out").exists()
    sweep.main([str(write("seeds: [1]"))])
    capfd.readouterr()
    sweep.main([str(write("seeds: [1, 2]")), "--dry_run"])
    first, second = capfd.readouterr().out.splitlines()
    assert first == f"# {tmp_path}/out/seed=1: done"
    assert second.startswith(f"{sys.executable} {fake} ") and "--device=cuda" not in second


# --- signals ---

DRIVER = """
import sys
from pathlib import Path
sys.path[0] = {root!r}
from scripts import sweep
from scripts.sweeping import runner
from util.errors import run_command
runner.TRAIN, sweep.REPORT = Path({fake!r}), Path("missing")
run_command(sweep.main)
"""


@pytest.fixture
def start_sweep(fake, tmp_path):
    """A function that starts the command with runs that wait for a signal, and returns when two have begun."""
    started = []

    def start(path):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER.format(root=str(ROOT), fake=str(fake)))
        env = {**os.environ, "FAKE": json.dumps({name: "wait" for name in "abc"})}
        command = [sys.executable, str(driver), str(path), "--jobs=2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        started.append(process)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("out/*/ready"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def signals(tmp_path):
    return {f.parent.name: f.read_text().split() for f in (tmp_path / "out").glob("*/signals")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_the_same_command_resumes_them(write, start_sweep, tmp_path, number):
    path = write("runs: [{name: a}, {name: b}, {name: c}]")
    process = start_sweep(path)
    os.killpg(process.pid, number)  # to the whole process group, as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    name = signal.Signals(number).name
    assert signals(tmp_path) == {"a": [name], "b": [name]}, "each run is told once"
    assert f"{name}: the runs save a checkpoint and stop" in err and "Traceback" not in err
    assert "a: stopped" in out and out.endswith("stopped with 3 of 3 runs left; the same command resumes\n")
    assert sweep.main([str(path)]) == 0
    assert starts(tmp_path) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_the_runs_of_a_killed_sweep_stop_too(write, start_sweep, tmp_path):
    process = start_sweep(write("runs: [{name: a}, {name: b}, {name: c}]"))
    process.kill()
    deadline = time.monotonic() + 30
    while len(signals(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert signals(tmp_path) == {"a": ["SIGTERM"], "b": ["SIGTERM"]}


# --- results ---


def test_the_table_has_mean_and_deviation_over_seeds(write, fake, capfd):
    assert sweep.main([str(write("grid: {learning_rate: [2, 1]}\nseeds: [1, 2, 3]"))]) == 0
    out = capfd.readouterr().out.splitlines()
    table = out[out.index(next(line for line in out if line.startswith("setting"))) :]
    cells = [[cell for cell in line.split("  ") if cell.strip()] for line in table]
    assert len(cells) == 1 + 2 * 4 + 1
    assert [cell.strip() for cell in cells[1]] == ["learning_rate=2", "1", "done", "3.2500", "4.2500", "1m02s"]
    assert [cell.strip() for cell in cells[4]] == [
        *("learning_rate=2", "mean of 3", "3.5000 ± 0.2500", "4.5000 ± 0.2500", "1m02s")
    ]
    assert table[-1] == "lowest validation loss: 3.5000, learning_rate=1"


def test_a_setting_that_lacks_a_seed_is_not_called_the_best(write):
    runs = settings.read_sweep(write("grid: {n_layer: [1, 2, 3]}\nseeds: [1, 2]"), 1)[1]
    nan = float("nan")
    found = [
        *(results.Result("done", "", 1.0, 2.0, 3.0), results.Result("diverged", "", nan, nan, 3.0)),
        *(results.Result("done", "", 1.0, value, 3.0) for value in (4.0, 5.0, 5.0, 6.0)),
    ]
    text = results.table(dict(zip(runs, found, strict=True)))
    assert text.endswith("lowest validation loss: 4.5000, n_layer=2")
    assert "mean of 1" in text and "nan" not in text


def test_results_survive_damaged_files(tmp_path):
    assert results.read_result(tmp_path).status == ""
    (tmp_path / "status.json").write_text("[]")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\nrubbish\n[]\n{"step": 2, "loss": null}\n')
    found = results.read_result(tmp_path)
    assert (found.status, results.number(found.loss)) == ("", "-")


def test_the_report_is_written_for_all_runs_with_records(write, fake, tmp_path, monkeypatch, capfd):
    report = tmp_path / "report.py"
    report.write_text("import sys; print('report', *sys.argv[1:])")
    monkeypatch.setattr(sweep, "REPORT", report)
    monkeypatch.setenv("FAKE", json.dumps({"b": "user error"}))
    sweep.main([str(write("runs: [{name: a}, {name: b}, {name: c}]"))])
    out = tmp_path / "out"
    assert f"report {out}/a {out}/c --output={out}/report.html\n" in capfd.readouterr().out


# --- SLURM ---


def test_the_array_script_gives_each_task_the_flags_of_a_run(write, fake, tmp_path, capfd):
    assert sweep.main([str(write("runs: [{name: a}]"))]) == 0
    path = write("runs: [{name: a}, {name: b}, {sample_prompt: two $words}]")
    script = tmp_path / "sweep.sbatch"
    assert sweep.main([str(path), f"--slurm={script}", "--gpus_per_run=2"][:2]) == 0
    assert f"{script}: 2 runs; submit it with: sbatch {script}\n" in capfd.readouterr().out
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text and "#SBATCH --gpus-per-node=1\n" in text
    launcher = tmp_path / "root/scripts/launch/slurm.sbatch"
    launcher.parent.mkdir(parents=True)
    launcher.write_text('printf "%s\\n" "$@"')
    expected = [run.flags for run in settings.read_sweep(path, 1)[1]][1:]

    def task(number, root=tmp_path / "root"):
        env = {**os.environ, "SLURM_SUBMIT_DIR": str(root), "SLURM_ARRAY_TASK_ID": str(number)}
        return subprocess.run(["bash", script], env=env, capture_output=True, text=True)

    assert [task(number).stdout.splitlines() for number in (0, 1)] == expected
    assert (task(2).returncode, task(2).stderr) == (2, "error: there is no run 2; the last is 1\n")
    done = task(0, tmp_path)
    assert done.returncode == 2 and "error: run sbatch in the root of the repository" in done.stderr


def test_the_array_script_has_the_directives_of_the_launcher(write, fake, tmp_path):
    script = tmp_path / "sweep.sbatch"
    sweep.main([str(write("seeds: [1]")), f"--slurm={script}"])

    def directives(path):
        return {line for line in path.read_text().splitlines() if line.startswith("#SBATCH")}

    missing = directives(ROOT / "scripts/launch/slurm.sbatch") - directives(script)
    assert missing == {"#SBATCH --job-name=rawgpt", "#SBATCH --output=slurm-%j.out"}


def test_another_file_is_not_overwritten_by_the_array_script(write, fake, tmp_path, capfd):
    path, script = write("seeds: [1]"), tmp_path / "notes.txt"
    script.write_text("mine")
    with pytest.raises(UserError, match="notes.txt: exists and is not a script of this command"):
        sweep.main([str(path), f"--slurm={script}"])
    assert script.read_text() == "mine"
    script.unlink()
    assert [sweep.main([str(path), f"--slurm={script}"]) for _ in range(2)] == [0, 0]
    sweep.main([str(path)])
    capfd.readouterr()
    assert sweep.main([str(path), f"--slurm={script}"]) == 0
    assert "all runs are finished; no script written" in capfd.readouterr().out


# --- real commands ---


def test_the_example_is_valid_and_the_command_answers_without_torch(imports_of):
    done, imported = imports_of(ROOT / "scripts/sweep.py", ROOT / "cfg/sweeps/shakespeare.yaml", "--dry_run")
    assert done.returncode == 0 and "torch" not in imported, done.stderr
    assert done.stdout.count("train_gpt.py --cfg=shakespeare") == 6


def test_the_files_in_the_docs_are_valid(write):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    path = write("")
    counts = []
    for block in blocks:
        path.write_text(block)
        counts.append(len(names(path)))
    assert counts == [10, 4]


@pytest.mark.slow
def test_real_runs_are_interrupted_and_resumed(shards, tmp_path, metrics):
    size = SIZE + ", total_batch_size: 256, num_iterations: 150, val_loss_every: 0, val_max_steps: 1"
    data = f"input_train_bin: {shards}/*_train_*.bin, input_val_bin: {shards}/*_val_*.bin, tokenizer: none"
    path = tmp_path / "sweep.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\nflags: {{{size}, {data}}}\ngrid: {{learning_rate: [1e-3, 1e-2]}}\n")
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "out/learning_rate=0.001"
    while len(metrics(first)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "learning_rate=0.001: stopped" in out and len(metrics(first)) < 150
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for rate in ("0.001", "0.01"):
        folder = tmp_path / f"out/learning_rate={rate}"
        records = metrics(folder)
        assert [r["step"] for r in records] == list(range(1, 151))
        assert f"{records[-1]['val_loss']:.4f}" in done.stdout
    assert "resuming from " in (first / "console.log").read_text()
    assert "lowest validation loss: " in done.stdout


@pytest.mark.slow
def test_a_real_run_on_two_processes(shards, tmp_path, metrics):
    size = SIZE + ", total_batch_size: 256, num_iterations: 3"
    data = f"input_train_bin: {shards}/*_train_*.bin, tokenizer: none"
    path = tmp_path / "sweep.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\nflags: {{{size}, {data}}}\nseeds: [1]\n")
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), str(path), "--gpus_per_run=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(tmp_path / "out/seed=1")) == 3
