#!/usr/bin/env bash
# Several machines: run this command on each of them, in any order. RDZV_ENDPOINT is the host name of the first machine
# and a free port there. Code and shards must have the same paths on all machines, and --output_dir must be shared.
#   export NNODES=2 RDZV_ENDPOINT=node0:29400
#   bash scripts/launch/multi_node.sh --cfg=gpt2-124m --input_train_bin='data/edu_fineweb10B/*_train_*.bin'
# RDZV_ID distinguishes runs that share an endpoint. If NCCL uses the wrong network, set NCCL_SOCKET_IFNAME=eth0.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launch/env.sh
[ -n "${NNODES:-}" ] || fail "set NNODES, the number of machines"
[ -n "${RDZV_ENDPOINT:-}" ] || fail "set RDZV_ENDPOINT=HOST:PORT, the first machine, with the same value on all machines"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted workers must not see old addresses
exec torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" \
    --rdzv-id="${RDZV_ID:-rawgpt}" --max-restarts="$MAX_RESTARTS" --signals-to-handle="$SIGNALS" \
    train_gpt.py "$@"
