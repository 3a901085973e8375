#!/usr/bin/env bash
# Correctness, then the speed of evaluation and generation, on this machine's GPU; see gpu_check.py for the flags.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" scripts/bench/gpu_check.py "$@"
