"""Mutation check: does a test notice each of the mistakes in tests/mutation/mutations.txt?

    bash scripts/mutation_check.sh --jobs=2 --output=/tmp/mutations.jsonl

Applies one mistake at a time to a copy of the repository and runs the tests there until one fails: first the test that
the list names, or the test file that bears the name of the changed file; then the tests of the directory (those of
train_gpt.py are tests/e2e) and the comparison with the reference trainer; then the whole default suite. --depth says
where to stop. A test that fails without the mistake too does not count. The golden traces are left out: any changed
number fails them, and the question is whether a test knows the right number. Tests with "compiled" in their name are
left out because they are slow.

Tools like mutmut and cosmic-ray do not fit: they generate thousands of mutants and mutate in-process, while these
tests run the real command in child processes under torchrun. At a minute per mutant that takes days.

Exit code 0 if every mistake is caught, 1 if not, 2 for a mistake in usage or in the list. Linux only.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.txt")
DEPTHS = ("file", "directory", "suite")
REFERENCE = "tests/e2e/test_reference.py"
LEFT_OUT = ("tests/e2e/test_golden.py", "tests/mutation/test_mutations.py")
OPTIONS = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not compiled"]
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)


class Mutation(NamedTuple):
    """A text that occurs once in a file, the text that replaces it, and what goes wrong then."""

    file: str
    mistake: str
    old: str
    new: str
    test: str  # to run first; "" if the list names none


ENTRY = re.compile(r"(\S+): (.+)\n- ?(.+)\n\+ ?(.*)(?:\n@ (\S+))?")


def read_mutations(path: Path = LIST) -> list[Mutation]:
    """Reads the list. Raises ValueError if an entry is not of its form."""
    found = []
    for entry in path.read_text().rstrip("\n").split("\n\n")[2:]:
        if not (parts := ENTRY.fullmatch(entry)):
            raise ValueError(f"{path.name}: not an entry: {entry.splitlines()[:1]}")
        found.append(Mutation(*parts.groups("")))
    return found


def find_problem(mutation: Mutation) -> str:
    """Returns why a mutation cannot be applied, "" if it can."""
    path = ROOT / mutation.file
    count = path.read_text().count(mutation.old) if path.is_file() else 0
    if count != 1:
        return f"{mutation.file}: {mutation.old!r} occurs {count} times instead of once"
    file, _, name = mutation.test.partition("::")
    if file and not ((ROOT / file).is_file() and f"def {name.partition('[')[0]}" in (ROOT / file).read_text()):
        return f"{mutation.file}: {mutation.mistake}: {mutation.test} does not exist"
    return ""


def stages_of(mutation: Mutation, depth: str) -> list[list[str]]:
    """Returns the tests to run, the likeliest to notice first."""
    folder, _, name = mutation.file.rpartition("/")
    namesake = [f"tests/{folder}/test_{name}"]
    while folder and not (ROOT / "tests" / folder).is_dir():  # scripts/sweeping has its tests in tests/scripts
        folder = folder.rpartition("/")[0]
    directory = [f"tests/{folder}", REFERENCE] if folder else [REFERENCE, "tests/e2e"]
    first = [mutation.test] if mutation.test else namesake if (ROOT / namesake[0]).is_file() else directory[:1]
    return [first, directory, ["tests"]][: DEPTHS.index(depth) + 1]


def make_worker(folder: Path) -> Path:
    """Copies the tracked and the new files into `folder`/tree."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    (folder / "tmp").mkdir(parents=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def end_processes(worker: Path) -> None:
    """Kills what the tests in `worker` have started, in other sessions too: TMPDIR in their environment marks them."""
    mark = f"TMPDIR={worker / 'tmp'}".encode()
    found = True
    while found:
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone, or another user's
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    found = True


def files_of(tests: list[str], tree: Path) -> list[str]:
    """Returns the test files in order, each once: pytest would sort those of one directory by name."""
    if "::" in tests[0]:
        return tests
    found = [path for test in tests for path in [tree / test, *sorted((tree / test).rglob("test_*.py"))]]
    names = dict.fromkeys(str(path.relative_to(tree)) for path in found if path.is_file())
    return [name for name in names if name not in LEFT_OUT]


def run_tests(worker: Path, tests: list[str], limit: float | None) -> tuple[int | None, str]:
    """Returns pytest's exit code, None after `limit` seconds, and the first test that failed."""
    files = files_of(tests, worker / "tree")
    command = [sys.executable, "-m", "pytest", *OPTIONS, f"--basetemp={worker / 'pytest'}", *files]
    # Python tells stale bytecode by the time and size of its source, which a mutation may leave as they are.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(worker / "tmp")}
    with open(worker / "output", "w+") as output:
        how = {"cwd": worker / "tree", "env": env, "stdout": output, "stderr": subprocess.STDOUT}
        process, code = subprocess.Popen(command, start_new_session=True, **how), None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            end_processes(worker)
            process.wait()
        output.seek(0)
        failed = FAILED.search(output.read())
    return code, failed[1] if failed else ""


def examine(mutation: Mutation, worker: Path, stages: list[list[str]], limit: float) -> dict:
    """Applies a mutation, runs the stages until one fails, and restores the file. Returns the result."""
    path, begun, caught, by = worker / "tree" / mutation.file, time.monotonic(), False, ""
    original = path.read_bytes()
    path.write_bytes(original.replace(mutation.old.encode(), mutation.new.encode()))
    try:
        for tests in stages:
            code, failed = run_tests(worker, tests, limit)
            caught = code == 1 and bool(failed)
            by = "timeout" if code is None else failed if caught else f"error: pytest exit code {code}" if code else ""
            if by:
                break
    finally:
        path.write_bytes(original)
    if caught and run_tests(worker, [by], limit)[0] != 0:
        caught, by = False, f"error: {by} fails without the mistake too"
    seconds = round(time.monotonic() - begun, 1)
    return {"file": mutation.file, "mistake": mutation.mistake, "caught": caught, "by": by, "seconds": seconds}


def read_results(path: Path | None, depth: str) -> dict[tuple[str, str], dict]:
    """Returns the results of an earlier run by file and mistake: those caught, and those tried as deeply as now."""
    results = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        with suppress(ValueError):  # a line that was cut off
            result = json.loads(line)
            if result["caught"] or (not result["by"] and DEPTHS.index(result["depth"]) >= DEPTHS.index(depth)):
                results[result["file"], result["mistake"]] = result
    return results


def describe(result: dict) -> str:
    kind = "caught" if result["caught"] else "error" if result["by"] else "SURVIVED"  # a timeout is an error
    return f"{kind:8} {result['file']}: {result['mistake']} ({result['seconds']:.0f} s) {result['by']}".rstrip()


def check(chosen: list[Mutation], args: argparse.Namespace, base: Path) -> int:
    """Examines the mutations that have no result yet and prints a summary. Returns the exit code."""
    results = read_results(args.output, args.depth)
    todo = [m for m in chosen if (m.file, m.mistake) not in results]
    workers = [make_worker(base / str(i)) for i in range(min(args.jobs, len(todo)))]
    free: SimpleQueue[Path] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def work(mutation: Mutation) -> dict:
        worker = free.get()
        try:
            return examine(mutation, worker, stages_of(mutation, args.depth), args.timeout) | {"depth": args.depth}
        finally:
            free.put(worker)

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(work, mutation) for mutation in todo]
        try:
            for n, future in enumerate(as_completed(futures), 1):
                result = future.result()
                results[result["file"], result["mistake"]] = result
                print(f"[{n}/{len(todo)}] {describe(result)}", flush=True)
                if args.output:
                    with open(args.output, "a") as f:
                        f.write(json.dumps(result) + "\n")
        except BaseException:  # Ctrl-C above all
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for worker in workers:
                    end_processes(worker)
                time.sleep(0.1)
            raise
    final = [results[m.file, m.mistake] for m in chosen]
    rest = [result for result in final if not result["caught"]]
    print(f"{len(final) - len(rest)} of {len(final)} mistakes caught")
    print("".join(f"{describe(result)}\n" for result in rest), end="")
    return 1 if rest else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="mistakes whose file or description contains it")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes at a time, each in a separate copy")
    parser.add_argument("--depth", choices=DEPTHS, default="directory", help="how far to go with a survivor")
    parser.add_argument("--list", action="store_true", help="show the mistakes and stop")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="results as JSON lines; those in it are not repeated"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run of pytest (default: 3600)")
    args = parser.parse_args()
    try:
        mutations = read_mutations()
        problem = next(filter(None, map(find_problem, mutations)), "" if mutations else f"{LIST.name} has no entries")
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        parser.exit(2, f"error: {problem}\n")
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        parser.error(f"--output={args.output}: is a folder, or in a folder that does not exist")
    chosen = [m for m in mutations if args.only in m.file or args.only in m.mistake]
    if not chosen or args.jobs < 1 or args.timeout <= 0:
        parser.error("--only matches no mistake" if not chosen else "--jobs and --timeout must be positive")
    if args.list:
        print("\n".join(f"{m.file}: {m.mistake}" for m in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="mutation_check_") as base:
        return check(chosen, args, Path(base))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
