#!/usr/bin/env bash
# Lint, types and tests; installs their requirements. `--slow` adds the long tests; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh tests/requirements.txt
export OMP_NUM_THREADS=1
slow=(-m "not slow")
if [ "${1:-}" = --slow ]; then slow=(); shift; fi
ruff check .
ruff format --check .
mypy
# One file runs on one worker, so that its fixtures are set up once. Files keep their order: sorted by the number of
# tests, the longest would be last.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${slow[@]}" "$@"
