"""Flags are parsed before torch is imported, and only in the command that runs."""

import subprocess
import sys
from pathlib import Path

from util.command import parse_first

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_parsed_in_an_imported_module():
    assert parse_first("scripts.export", lambda: 1 / 0) is None
    assert parse_first("__main__", lambda: 5) == 5


def test_a_wrong_flag_is_one_line_and_torch_is_not_imported():
    flags = ["--checkpoint=x", "--output=y", "--dtype=int3"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "export.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "| torch" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1 and lines[0].startswith("error: --dtype: invalid choice")
