"""A report on one or several runs: one HTML page with curves and comparisons, which opens without a network.

    python scripts/report.py outdir/a outdir/b --price=2.5
    python scripts/report.py outdir/a --import=nanogpt:log.txt --text
    python scripts/report.py outdir/a --serve

docs/report.md explains the page. Other programs' logs are overlaid with --import=FORMAT:FILE, where FORMAT is nanogpt
(the console's output), llmc (main.log) or wandb (a CSV export).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import math
from argparse import Namespace

from util.ctrl_c import exit_on_ctrl_c
from util.errors import CommandParser, UserError, run_command, user_errors

if __name__ == "__main__":
    exit_on_ctrl_c()

from scripts.reporting.compare import compare, default_span
from scripts.reporting.others import import_runs
from scripts.reporting.page import MARK, page_data, to_html
from scripts.reporting.read import Run, RunReader, distinct_labels, open_runs
from scripts.reporting.tables import comparison_tables, facts_table, to_text
from util.files import write_atomically

DEFAULT_PORT = 8765


def parse(argv: list[str] | None = None) -> Namespace:
    """Parses and checks the command line."""
    p = CommandParser(description=__doc__, allow_abbrev=False)
    p.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="the --output_dir of a run")
    p.add_argument("--output", type=Path, help="the page to write (default: report.html)")
    p.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="FORMAT:FILE", help="a log of another program"
    )
    p.add_argument("--tokens_per_step", type=int, help="of imported logs that do not tell")
    p.add_argument("--price", type=float, help="price of a GPU hour")
    p.add_argument("--losses", default="", help="compare when these losses are reached, e.g. 3.5,3.3")
    p.add_argument(
        "--smooth", type=float, metavar="N", help="average the training loss over N records (default: 1 %% of the run)"
    )
    p.add_argument("--text", action="store_true", help="print the comparison as tables instead of writing the page")
    p.add_argument("--json", action="store_true", help="print the comparison as JSON instead of writing the page")
    p.add_argument(
        "--serve", type=int, nargs="?", const=DEFAULT_PORT, metavar="PORT",
        help=f"serve the page on 127.0.0.1 and follow runs that are still going (default port {DEFAULT_PORT})",
    )  # fmt: skip
    args = p.parse_args(argv)
    if not args.runs and not args.imports:
        raise UserError("no run given; name the --output_dir of a run, or a log with --import=FORMAT:FILE")
    for name in ("price", "smooth", "tokens_per_step"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name}={value:g}: must be a number above 0")
    if args.serve is not None and not 0 <= args.serve < 2**16:
        raise UserError(f"--serve={args.serve}: a port is a number from 0 (any free one) to 65535")
    exclusive = [f"--{name}" for name in ("text", "json", "serve") if getattr(args, name) not in (None, False)]
    exclusive += ["--output"] * (args.output is not None)
    if len(exclusive) > 1:
        raise UserError(f"{' and '.join(exclusive)}: give one of them")
    args.losses = parse_losses(args.losses)
    args.output = check_output(args.output or Path("report.html")) if not exclusive or args.output else None
    return args


def parse_losses(text: str) -> list[float] | None:
    """Returns the losses in a comma-separated list, None for an empty one."""
    found = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        try:
            found.append(float(word))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise UserError(f"--losses={text}: {word!r} is not a number; give losses such as 3.5,3.3")
    return found or None


def check_output(path: Path) -> Path:
    """Returns the path of the page. Raises UserError if it would overwrite anything but an earlier report."""
    if path.is_dir():
        raise UserError(f"--output={path}: is a folder; give the name of a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: the folder {path.parent} does not exist; create it first")
    if path.exists():
        with user_errors(path):
            if not path.is_file() or not path.read_bytes()[-len(MARK) - 1 :].startswith(MARK.encode()):
                raise UserError(f"--output={path}: exists and is not a report; give another name")
    return path


def main(args: Namespace) -> int:
    """Reads the runs, and writes the page, prints the comparison or serves the page. Returns the exit code."""
    readers = open_runs(args.runs)
    others = import_runs(args.imports, args.tokens_per_step)
    distinct_labels([reader.run for reader in readers], others)
    if args.serve is not None:
        from scripts.reporting.serve import serve

        serve(readers, others, args.serve, lambda runs: page_data(runs, args.price, args.losses, args.smooth))
        return 0
    runs = read(readers) + others
    if args.text or args.json:
        comparison = compare(runs, args.price, args.losses, args.smooth or default_span(runs))
        if args.json:
            print(json.dumps(comparison, indent=1, default=str))
        else:
            shown = [facts_table(runs, comparison, args.price is not None), *comparison_tables(runs, comparison)]
            print("\n\n".join(map(to_text, shown)))
        return 0
    page = to_html(page_data(runs, args.price, args.losses, args.smooth)).encode()
    with user_errors(args.output):
        write_atomically(args.output, page)
    print(f"{args.output}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(page) / 1e6:.1f} MB")
    return 0


def read(readers: list[RunReader]) -> list[Run]:
    """Returns the runs, read from their folders."""
    for reader in readers:
        reader.update()
    return [reader.run for reader in readers]


if __name__ == "__main__":
    run_command(lambda: main(parse()))
