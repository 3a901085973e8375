"""A SLURM array script for the runs of a sweep. Each task runs scripts/launch/slurm.sbatch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from scripts.sweeping.settings import Run
from util.errors import UserError, user_errors
from util.files import write_atomically

MARK = "# Written by scripts/sweep.py"
SCRIPT = """#!/usr/bin/env bash
{mark} from {source}; write it again after a change there.
# Submit it in the root of the repository. Options override the lines below, such as --time, and --array=0-{last}%4,
# which runs at most four at a time.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
fail() {{ echo "error: $*" >&2; exit 2; }}
[ -f scripts/launch/slurm.sbatch ] || fail "run sbatch in the root of the repository, not in $PWD"
case $SLURM_ARRAY_TASK_ID in
{cases}
    *) fail "there is no run $SLURM_ARRAY_TASK_ID; the last is {last}" ;;
esac
exec bash scripts/launch/slurm.sbatch "$@"
"""


def write_script(path: Path, source: Path, runs: Sequence[Run], gpus_per_run: int) -> None:
    """Writes the array script for `runs`. Refuses to overwrite another file."""
    with user_errors(f"--slurm={path}"):
        if path.exists() and not (path.is_file() and f"\n{MARK}" in path.read_text(errors="replace")[:200]):
            raise UserError(f"--slurm={path}: exists and is not a script of this command; give another name")
        cases = "\n".join(f"    {i}) set -- {shlex.join(run.flags)} ;;" for i, run in enumerate(runs))
        write_atomically(
            path,
            SCRIPT.format(
                mark=MARK,
                source=" ".join(str(source).split()),
                name=shlex.quote(runs[0].folder.parent.name),
                last=len(runs) - 1,
                gpus=gpus_per_run,
                cpus=8 * gpus_per_run,
                cases=cases,
            ).encode(),
        )
