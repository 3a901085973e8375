"""Writes the results of gpu_speed.py into docs/benchmarks.md: `python scripts/bench/gpu_table.py FILE.json ...`

Replaces the text between two marks in the page with one section per file. `--output -` prints the sections instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # before all else: this folder holds a tokenize.py

import re
from typing import Any

from util.errors import CommandParser, UserError, run_command
from util.files import read_json, write_atomically

BEGIN, END = "<!-- gpu_table.py: begin -->", "<!-- gpu_table.py: end -->"
# The goals in tokens/s, by part and GPU.
GOALS = {
    "gpt2-124m, all changes": {"H200": 540_000, "H100": 500_000},
    "modern-124m, all changes": {"H200": 560_000},
    "gpt2-1558m": {"H200": 50_000},
}
SAME_MODEL = ("gpt2-124m", "nanoGPT")  # prefixes of the parts whose speeds are comparable
MFU_GOALS = {"llama3-8b, 8 layers, stage 3": 0.60}


def section(report: dict[str, Any]) -> str:
    """Returns the Markdown of a report: hardware and command, the training speeds, a table of each other part."""
    figures: dict[str, dict[str, Any]] = report["figures"]
    command = re.sub(r"(--(?:nanogpt|output)[= ])\S+", r"\1PATH", report["command"])
    lines = [
        f"### {report['hardware']}",
        "",
        f"`python {command}`, commit {str(report['commit'])[:12]}, driver {report['driver']}, torch"
        f" {report['torch']}, CUDA {report['cuda']}, cuDNN {report['cudnn']}, Python {report['python']};"
        f" {report['seconds']:.0f} s.",
    ]
    if report["tiny"]:
        lines += ["", "**A rehearsal with tiny shapes: these numbers say nothing about speed.**"]
    trained = {name: part for name, part in figures.items() if "tok/s" in part}
    if trained:
        lines += ["", *training_table(report["hardware"], trained)]
    for name, part in figures.items():
        if name not in trained:
            rows = [f"| {what} | {number(value)} |" for what, value in part.items() if what != "seconds of this part"]
            lines += ["", f"| {name} | |", "|---|---|", *rows] if rows else []
    for name, problem in report["failed"].items():
        lines += ["", f"{name} failed: {' '.join(problem.split())}."]
    return "\n".join(lines)


def training_table(hardware: str, parts: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a table with a row per training run: its speed, relative to nanoGPT in the same report, and the goal."""
    reference = parts.get("nanoGPT", {}).get("tok/s")
    rows = [
        "| training | tok/s | beside nanoGPT | MFU | goal | peak GiB | planned GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        aim = next((f"{goal:,} tok/s" for gpu, goal in GOALS.get(name, {}).items() if gpu in hardware.split()), "")
        aim = f"{MFU_GOALS[name]:.0%} MFU" if name in MFU_GOALS else aim
        cells = [
            name,
            number(part["tok/s"]),
            f"{part['tok/s'] / reference:.3f}" if reference and name.startswith(SAME_MODEL) else "",
            f"{part['MFU']:.1%}" if "MFU" in part else "",
            aim,
            f"{part['GiB']:.1f}" if "GiB" in part else "",
            f"{part['planned GiB']:.1f}" if "planned GiB" in part else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def number(value: float | str) -> str:
    """Formats a number with about four digits."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main() -> None:
    parser = CommandParser(prog="gpu_table.py", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE.json", help="a report of gpu_speed.py")
    parser.add_argument(
        "--output", default=str(ROOT / "docs" / "benchmarks.md"), help="the page; -: print the sections"
    )
    args = parser.parse_args()
    sections = []
    for path in args.reports:
        try:
            sections.append(section(read_json(path)))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: not a report of gpu_speed.py ({type(error).__name__}: {error})") from error
    text = "\n\n".join(sections)
    if args.output == "-":
        print(text)
        return
    page = Path(args.output)
    try:
        before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    except (OSError, ValueError) as error:
        raise UserError(f"--output={page}: cannot be read: {error}") from error
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise UserError(f"--output={page}: has no lines {BEGIN!r} and {END!r}, around the generated section")
    write_atomically(page, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


if __name__ == "__main__":
    run_command(main)
