#!/usr/bin/env bash
# Several machines: the same command on each of them, in any order. RDZV_ENDPOINT is the name by which the first one
# knows itself, and a free port there. Code and shards are under the same paths everywhere, --output_dir is shared.
#   export NNODES=2 RDZV_ENDPOINT=node0:29400
#   bash scripts/launch/multi_node.sh --cfg=gpt2-124m --input_train_bin='data/edu_fineweb10B/*_train_*.bin'
# RDZV_ID tells apart runs that share an endpoint. If NCCL takes the wrong network: NCCL_SOCKET_IFNAME=eth0.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launch/env.sh
[ -n "${NNODES:-}" ] || fail "set NNODES, the number of machines"
[ -n "${RDZV_ENDPOINT:-}" ] || fail "set RDZV_ENDPOINT=HOST:PORT, the first machine, the same on all"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted workers must not find the dead ones' addresses
exec torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" \
    --rdzv-id="${RDZV_ID:-rawgpt}" --max-restarts="$MAX_RESTARTS" --signals-to-handle="$SIGNALS" \
    train_gpt.py "$@"
