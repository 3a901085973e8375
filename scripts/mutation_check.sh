#!/usr/bin/env bash
# Checks that a test fails for each mistake in tests/mutation/mutations.txt. Takes hours; `--help` lists the flags.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh tests/requirements.txt
python tests/mutation/check.py "$@"
