#!/usr/bin/env bash
# Correctness, then speed, memory and MFU on this machine's GPU, in one JSON file; see gpu_check.py for the flags.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" scripts/bench/gpu_check.py "$@"
