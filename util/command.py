"""The start of a command: the import path, and flags that are parsed before torch is imported.

`python eval/perplexity.py` puts eval/ on sys.path[0], not the repository root, so `import util` fails until the path is
set, and no helper can be imported to set it. Every command in eval/, data/ and scripts/ therefore begins with

    if __name__ == "__main__":
        sys.path[0] = str(Path(__file__).resolve().parents[1])

(parents[2] in scripts/bench/). The root replaces the folder of the command, because files in these folders have the
names of other modules: eval/lm_eval.py, scripts/bench/tokenize.py. In scripts/bench/ the line comes before all imports
but sys and pathlib, since parts of the standard library import tokenize. Commands that do not use parse_first then
call exit_on_ctrl_c, so that Ctrl-C during their imports prints no traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from util.ctrl_c import exit_on_ctrl_c
from util.errors import one_line_errors

T = TypeVar("T")


def parse_first(name: str, parse: Callable[[], T], check: Callable[[T], object] | None = None) -> T:
    """Returns `parse()`, checked, if `name` is "__main__"; does nothing in a module that is imported.

    Errors are printed as one line.

    A command calls it between the definition of its flags and the import of torch, which takes seconds, so that --help
    and wrong flags are answered at once:

        args = parse_first(__name__, lambda: parser().parse_args(), check)

        import torch
    """
    if name != "__main__":
        return cast(T, None)
    exit_on_ctrl_c()
    with one_line_errors():
        args = parse()
        if check is not None:
            check(args)
        return args
