#!/usr/bin/env bash
# One machine with one worker per GPU, or NPROC workers. Without a GPU the default is one. Flags as for train_gpt.py:
#   bash scripts/launch/single_node.sh --cfg=gpt2-124m --input_train_bin='data/edu_fineweb10B/*_train_*.bin'
#   NPROC=2 MAX_RESTARTS=0 bash scripts/launch/single_node.sh --cfg=shakespeare
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launch/env.sh
exec torchrun --standalone --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS" --signals-to-handle="$SIGNALS" \
    train_gpt.py "$@"
