"""Disk errors: the last good checkpoint survives and is found, and one line says what happened.

Most faults are injected with util/files.py into the real command. To save time they form a chain: one command is
started again and again in one directory, each start fails at another point, and the last start finishes the run.
"""

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess

import pytest

from model.formats.checkpoint import find_checkpoint, step_of

# The flags of tests/e2e/test_resume.py, so that the undisturbed run is made once.
FLAGS = ["--dropout=0.1", "--num_iterations=30", "--save_every_niter=5"]
EVERY_STEP = [*FLAGS, "--save_every_niter=1", "--keep_last=1"]
# Points of a save, how often one save passes each with one rank, and what a disk error there does to the run.
POINTS = {
    "save make room": (1, "fails"),
    "save tensors": (2, "fails"),
    "save flush": (2, "fails"),
    "save state": (1, "fails"),
    "save manifest": (1, "fails"),
    "save rename": (1, "fails"),
    "save appear": (1, "fails, and is there"),
    "save latest": (1, "warns"),
    "prune rename": (1, "warns"),
    "prune delete": (1, "warns"),
}
WHAT = ["ENOSPC", "EACCES", "EIO", "EROFS", "KILL"]
SHARD = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def newest(output_dir, messages=None):
    """Returns the step of the checkpoint that the next start would find; 0 without a checkpoint."""
    messages = [] if messages is None else messages
    found = find_checkpoint(output_dir, messages.append) if output_dir.exists() else None
    return step_of(found) if found else 0


def the_line(err):
    """Returns the one error line. A traceback is a failure."""
    assert "Traceback" not in err, err
    (line,) = re.findall("^error: .*$", err, re.MULTILINE)
    return line


def reason(what):
    return os.strerror(getattr(errno, what))


def check_error(output_dir, done, what):
    """Checks the error line and status.json of a run that ended with exit code 5, and returns the line."""
    line, status = the_line(done.stderr), json.loads((output_dir / "status.json").read_text())
    assert f"--output_dir={output_dir}" in line and reason(what) in line
    assert status["status"] == "storage error" and line == f"error: {status['reason']}"
    return line


def kept(output_dir):
    """Reads all files that a run needs to resume."""
    paths = [output_dir / "config.yaml", output_dir / "metrics.jsonl", *(output_dir / "checkpoints").rglob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


class Chain:
    """Starts the same command in one directory, each time with another fault."""

    def __init__(self, trainer, output_dir, assert_same_run, reference):
        self.trainer, self.dir = trainer, output_dir
        self.assert_finished = lambda where: assert_same_run(where, reference)

    def start(self, *flags, where=None, resumes=None, **how):
        """Returns the finished process and the step it resumed from: `resumes`, or the newest good checkpoint."""
        before = newest(self.dir) if resumes is None else resumes
        done = self.trainer.run(where or self.dir, *EVERY_STEP, *flags, **how)
        if before:
            assert f"resuming from {where or self.dir}/checkpoints/step_{before:08d}" in done.stdout
        return done, before

    def save_fails(self, point, what, *flags):
        """Makes the second save of a start fail. The first save has made progress."""
        times, outcome = POINTS[point]
        killed = what == "KILL"
        done, before = self.start(*flags, fault=f"{point}#{times + 1}={what}", code=-signal.SIGKILL if killed else 5)
        if not killed:
            assert f"the checkpoint of step {before + 2} could not be written" in check_error(self.dir, done, what)
        said = []
        if outcome == "warns":  # after an earlier fault the first save may prune two checkpoints
            assert newest(self.dir, said) in (before + 1, before + 2) and not said
        else:
            assert newest(self.dir, said) == before + (1 if outcome == "fails" else 2) and not said

    def save_warns(self, point, what, *flags, where):
        done, before = self.start(*flags, fault=f"{point}#2={what}", where=where)
        assert "Traceback" not in done.stderr
        (step, about) = re.search(r"^warning: the checkpoint of step (\d+) is written, but (.*)", done.stderr).groups()
        assert int(step) in (before + 1, before + 2) and about.startswith(str(where)) and about.endswith(reason(what))
        self.finished(where)

    def finished(self, where=None):
        self.assert_finished(where or self.dir)


def limit_files():
    """Limits files to a size below that of the optimizer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def obey_permissions():
    """Drops CAP_DAC_OVERRIDE, so that permissions hold for root too (linux/prctl.h, linux/capability.h)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def permissions_hold(folder):
    """Returns whether permissions keep this user from writing to the folder."""
    subprocess.run(["touch", folder / "probe"], preexec_fn=obey_permissions, capture_output=True)
    held = not (folder / "probe").exists()
    (folder / "probe").unlink(missing_ok=True)
    return held


@pytest.fixture
def chain(trainer, assert_same_run, undisturbed, tmp_path):
    return Chain(trainer, tmp_path / "run", assert_same_run, undisturbed(1, *FLAGS))


def leave_stale_lock(output_dir, n):
    """Writes a .lock file that names an ended process, an unrelated living process, or no number."""
    (output_dir / ".lock").write_text(["4194999", str(os.getpid()), "no number"][n % 3])


@pytest.mark.fault(
    "a disk error (full, no permission, I/O error, read-only) or a kill, at each step of a save and of pruning",
    "exit code 5 and one line, or a warning if nothing can be lost; the last good checkpoint is found; bit-equal",
)
@pytest.mark.parametrize("offset", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(WHAT)))])
def test_an_error_in_a_save_or_in_pruning_keeps_the_last_checkpoint(chain, injected, offset):
    """One error at each point of a save, every third in the background. The slow cases complete the matrix."""
    errors = {point: WHAT[(i + offset) % len(WHAT)] for i, point in enumerate(POINTS)}
    warnings = [point for point, what in errors.items() if POINTS[point][1] == "warns" and what != "KILL"]
    for i, point in enumerate(p for p in errors if p not in warnings):
        chain.save_fails(point, errors[point], f"--async_save={int(i % 3 == 1)}")
        leave_stale_lock(chain.dir, i)
    for point in warnings:  # a run finishes after these
        where = chain.dir if point == warnings[-1] else shutil.copytree(chain.dir, chain.dir.with_name(point))
        chain.save_warns(point, errors[point], where=where)
    assert not list((chain.dir / "checkpoints").glob(".saving*"))
    injected(len(POINTS))


@pytest.mark.slow
@pytest.mark.fault(
    "metrics.jsonl cannot be written; a file is too large for the system; the newest checkpoint cannot be read,"
    " when it is chosen or when it is loaded",
    "exit code 5 and one line with nothing changed on disk, or the checkpoint before is used; bit-equal",
)
def test_an_error_of_the_log_of_a_large_file_or_of_a_read_keeps_the_last_checkpoint(chain, metrics, injected):
    flags = ["--keep_last=3"]
    done, _ = chain.start(*flags, fault="metrics#4=ENOSPC", code=5)
    assert "step 4 could not be written to metrics.jsonl" in check_error(chain.dir, done, "ENOSPC")
    assert [r["step"] for r in metrics(chain.dir)] == [1, 2, 3] and newest(chain.dir) == 4

    done, _ = chain.start(*flags, preexec_fn=limit_files, code=5)  # a limit of the system, not an injected fault
    assert "the checkpoint of step 5 could not be written" in check_error(chain.dir, done, "EFBIG")
    assert [r["step"] for r in metrics(chain.dir)] == [1, 2, 3, 4] and newest(chain.dir) == 4

    before, folder = kept(chain.dir), chain.dir / "checkpoints"
    done = chain.trainer.run(chain.dir, *EVERY_STEP, *flags, fault="read tensors=EIO", code=5)
    assert f"{folder}/step_00000004: the checkpoint cannot be read (Input/output error)" in the_line(done.stderr)
    assert "storage error" in (chain.dir / "status.json").read_text()
    assert kept(chain.dir) == before

    done, _ = chain.start(*flags, fault="read hash=EIO", resumes=3)
    assert re.search(r"checkpoint .*step_00000004 is skipped: .*: Input/output error\n", done.stdout)
    chain.finished()
    assert not list(folder.glob("damaged*"))  # it was found good when its step was reached again
    injected(4)


@pytest.mark.slow
@pytest.mark.fault(
    "the folder of checkpoints cannot be written to, or cannot be listed",
    "exit code 5 and one line; nothing on disk changes; bit-equal",
)
def test_a_folder_of_checkpoints_without_permission_is_an_error(chain, injected):
    chain.start(fault="save make room#4=ENOSPC", code=5)
    before, folder = kept(chain.dir), chain.dir / "checkpoints"
    folder.chmod(0o500)
    if hold := permissions_hold(folder):
        done, _ = chain.start(preexec_fn=obey_permissions, code=5)
        assert "the checkpoint of step 4 could not be written" in check_error(chain.dir, done, "EACCES")
    folder.chmod(0o700)
    done = chain.trainer.run(chain.dir, *EVERY_STEP, fault="read list#2=EACCES", code=5)  # #1: the warning about room
    assert f"{folder}: Permission denied" in the_line(done.stderr)
    assert kept(chain.dir) == before
    chain.start()
    chain.finished()
    injected(1 + hold)


# Fault, --zero_stage, the message, and the newest step afterwards, with a save every 5 steps.
ON_RANKS = [
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("save tensors@1#3=ENOSPC", 0, "step 10 could not be written (No space left on device on rank 1)", 5),
            ("save flush@1#3=EIO", 1, "step 10 could not be written (Input/output error on rank 1)", 5),
            ("save tensors@1#3=EROFS", 3, "step 10 could not be written (Read-only file system on rank 1)", 5),
            ("metrics#7=ENOSPC", 3, "step 7 could not be written to metrics.jsonl (No space left on device)", 5),
            ("metrics#30=ENOSPC", 0, "step 30 could not be written to metrics.jsonl (No space left on device)", 30),
        )
    ),
]


def one_line_of_all(output_dir, done, ranks=2):
    """Returns the error of rank 0, which others may repeat. It is in status.json, and no rank logs a traceback."""
    lines = {line for line in re.findall("^error: (?:rank \\d+: )?(.*)$", done.stderr, re.MULTILINE)}
    (line,) = lines
    assert json.loads((output_dir / "status.json").read_text())["reason"] == line
    logs = [(output_dir / f"logs/rank_{rank}.log").read_text() for rank in range(ranks)]
    assert not any("Traceback" in log for log in logs)
    return line


@pytest.mark.fault(
    "a disk error on one rank of two in a save, or on rank 0 in a step",
    "all ranks end with one line that names the rank; the last good checkpoint is found; bit-equal",
)
@pytest.mark.parametrize("fault,stage,message,left", ON_RANKS)
def test_a_disk_error_on_one_rank_ends_all_ranks(
    trainer, assert_same_run, undisturbed, injected, tmp_path, fault, stage, message, left
):
    flags = [*FLAGS, *([f"--zero_stage={stage}"] if stage else [])]
    output_dir = tmp_path / "run"
    done = trainer.run(output_dir, *flags, ranks=2, fault=fault, code=1)
    assert message in one_line_of_all(output_dir, done)
    assert newest(output_dir) == left
    done = trainer.run(output_dir, *flags, ranks=2)
    assert f"resuming from {output_dir}/checkpoints/step_{left:08d}" in done.stdout
    assert_same_run(output_dir, undisturbed(2, *flags))
    injected(1)


@pytest.mark.slow
@pytest.mark.fault(
    "one rank of two cannot read the checkpoint, or rank 0 cannot write its files at the start",
    "all ranks end with one line; nothing on disk changes; bit-equal",
)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_disk_error_on_one_rank_at_the_start_ends_all_ranks(
    trainer, assert_same_run, undisturbed, injected, wait_for, kill_all, tmp_path, stage
):
    flags = [*FLAGS, f"--zero_stage={stage}"]
    output_dir = tmp_path / "run"
    process = trainer.start(output_dir, *flags, ranks=2)
    log = output_dir / "metrics.jsonl"
    assert wait_for(lambda: log.exists() and log.read_text().count("\n") > 11, process)  # so that some are superseded
    kill_all(process)
    before = kept(output_dir)
    faults = {
        "read tensors@1=EIO": "the checkpoint cannot be read (Input/output error)",
        "read state@1=EIO": "the checkpoint cannot be read (Input/output error)",
        "read manifest@1=EIO": "manifest.json: Input/output error",
        "config=EROFS": f"{output_dir}/config.yaml: Read-only file system",
        "superseded=ENOSPC": f"{output_dir}/logs/metrics_superseded.jsonl: No space left on device",
    }
    for fault, message in faults.items():
        done = trainer.run(output_dir, *flags, ranks=2, fault=fault, code=1)
        assert message in one_line_of_all(output_dir, done)
        now = kept(output_dir)
        assert now == {path: content for path, content in before.items() if path in now}
        assert {path for path in before if path not in now} == {
            p for p in before if ".saving_" in str(p) and p not in now
        }
    trainer.run(output_dir, *flags, ranks=2)
    assert_same_run(output_dir, undisturbed(2, *flags))
    injected(len(faults))


@pytest.mark.fault("a second run starts on an --output_dir in use", "exit code 2 and one line; the first run continues")
@pytest.mark.slow
def test_two_runs_do_not_share_an_output_dir(trainer, injected, wait_for, kill_all, tmp_path):
    output_dir = tmp_path / "run"
    first = trainer.start(output_dir, "--num_iterations=100000", "--save_every_niter=0")
    log = output_dir / "metrics.jsonl"
    assert wait_for(lambda: log.exists() and log.read_text().count("\n") > 0, first)
    alone = [output_dir / name for name in ("config.yaml", "status.json", ".lock")]
    before, lines = [path.read_bytes() for path in alone], log.read_text()
    second = trainer.run(output_dir, "--learning_rate=5e-4", code=2)
    assert f"in use by another run (process {first.pid})" in the_line(second.stderr)
    assert [path.read_bytes() for path in alone] == before and log.read_text().startswith(lines)
    assert len(re.findall("rank 0 of 1", (output_dir / "logs/rank_0.log").read_text())) == 1
    assert first.poll() is None
    kill_all(first)
    injected(1)


LONG = ["--num_iterations=100000", "--save_every_niter=40", "--val_loss_every=0", "--keep_last=1"]


@pytest.mark.fault(
    "--output_dir is deleted during a run",
    "the next save restores config.yaml, metrics.jsonl and logs; the same command resumes",
)
def test_a_deleted_output_dir_is_restored_at_the_next_save(trainer, metrics, injected, wait_for, tmp_path):
    output_dir = tmp_path / "run"
    process = trainer.start(output_dir, *LONG, ranks=2, python=trainer.warm_python)
    assert wait_for(lambda: (output_dir / "checkpoints/latest").exists(), process)
    output_dir.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    assert wait_for(lambda: (output_dir / "checkpoints/latest").exists(), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    warning = f"warning: --output_dir={output_dir} was deleted or moved while this run used it; created again"
    assert out.count(warning) == 1 and "Traceback" not in out
    assert json.loads((output_dir / "run.json").read_text())["starts"][0]["ranks"] == 2
    steps = [r["step"] for r in metrics(output_dir)]
    assert steps == list(range(1, newest(output_dir) + 1)) and len(steps) > 80
    for rank in range(2):
        assert f"rank {rank} of 2 on" in (output_dir / f"logs/rank_{rank}.log").read_text()
    done = trainer.run(output_dir, *LONG, f"--num_iterations={steps[-1]}")
    assert f"step_{steps[-1]:08d}" in done.stdout and "nothing left to do" in done.stdout
    injected(1)


def test_a_run_whose_deleted_output_dir_is_used_by_another_run_ends(trainer, wait_for, kill_all, tmp_path):
    output_dir = tmp_path / "run"
    first = trainer.start(output_dir, *LONG, "--save_every_niter=1000", python=trainer.warm_python)
    assert wait_for(lambda: (output_dir / "metrics.jsonl").exists(), first)
    output_dir.rename(tmp_path / "moved")
    second = trainer.start(output_dir, *LONG, "--save_every_niter=0", python=trainer.warm_python)
    assert wait_for(lambda: (output_dir / "metrics.jsonl").exists(), second)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 5, err
    assert "was deleted or moved while this run used it, and cannot be restored" in the_line(err)
    assert "in use by another run" in err and second.poll() is None
    assert json.loads((output_dir / "status.json").read_text())["status"] == "running"
    kill_all(second)


@pytest.mark.slow
def test_a_disk_too_small_is_announced_and_the_error_says_what_to_delete(trainer, tmp_path):
    """On a file system with room for two checkpoints. After what the error names is deleted, the run finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1100k tmpfs {disk}"
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*enter, mount], capture_output=True).returncode:
        pytest.skip("needs a private file system (unshare)")
    train = trainer.command(disk / "run", "--val_loss_every=0")
    script = (
        f'{mount}; "$@"; echo exit $?; rm -r {disk}/run/checkpoints/step_00000005; "$@" --keep_last=1; echo exit $?'
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*enter, script, "sh", *train], capture_output=True, text=True, env=env)
    warning, rest = re.search(r"^warning: (--output_dir=.*)\n((.*\n)*)", done.stdout, re.MULTILINE).groups()[:2]
    assert re.search(r"--keep_last=3 needs 1\.\d MB, 4 checkpoints of 0\.4 MB \(the newest is complete", warning)
    line = the_line(done.stderr)
    assert "the checkpoint of step 15 could not be written (No space left on device)" in line
    assert re.search(r"a checkpoint takes 0\.4 MB, and 0\.\d MB are free: 0\.\d MB are missing; delete", line)
    assert f"delete step_00000005 in {disk}/run/checkpoints (the newest, step_00000010, is enough to resume)" in line
    assert "exit 5\n" in rest and rest.endswith("exit 0\n")
