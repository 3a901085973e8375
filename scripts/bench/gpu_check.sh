#!/usr/bin/env bash
# Checks the numbers that this machine's GPU computes, and times evaluation and generation (tests/gpu).
#   --output FILE   report of all figures, as JSON (default: outdir/gpu_check.json)
#   --minutes N     time limit (default: 8); checks that start later fail
#   --only TEXT     checks with all these words in their name
#   --large         only GPT-2 1558M: its memory beside the plan (40 GB)
#   --device cpu    a rehearsal with tiny shapes, without a GPU
# Other arguments go to pytest. The cheapest checks come first. Needs no data and no network.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
files=(numbers evaluation training speed) arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --only=*) arguments+=(-k "$(sed 's/ \+/ and /g' <<<"${1#--only=}")") ;;
    --only) arguments+=(-k "$(sed 's/ \+/ and /g' <<<"${2:-}")") && shift ;;
    --large) files=(speed) arguments+=(--large -k 1558m) ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
files=("${files[@]/#/tests/gpu/test_}")
exec "$python" -m pytest -rfE -m gpu "${files[@]/%/.py}" --device=cuda --minutes=8 --output=outdir/gpu_check.json "${arguments[@]}"
