#!/usr/bin/env bash
# Lint, types and all tests; installs what they need. `--slow` adds the long ones; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh tests/requirements.txt
export OMP_NUM_THREADS=1
slow=(-m "not slow")
if [ "${1:-}" = --slow ]; then slow=(); shift; fi
ruff check .
ruff format --check .
mypy
# By file, so that what a file sets up is set up once; in their order, as by number of tests the longest would be last.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${slow[@]}" "$@"
