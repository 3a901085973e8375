#!/usr/bin/env bash
# Kills a tiny run again and again and compares it with an undisturbed one; `--help` lists the flags (tests/soak/main.py).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m tests.soak.main "$@"
