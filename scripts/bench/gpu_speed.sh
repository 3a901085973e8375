#!/usr/bin/env bash
# Training speed on this machine's GPU, taken apart; see gpu_speed.py for the flags.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" scripts/bench/gpu_speed.py "$@"
