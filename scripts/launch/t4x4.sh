#!/usr/bin/env bash
# Four T4s of 16 GB in one machine (AWS g4dn.12xlarge, GCP n1 with four T4s). They have fp16 tensor cores but no bf16,
# hence --dtype=float16, and no FlashAttention-2, so PyTorch uses its memory-efficient kernel.
#   bash scripts/launch/t4x4.sh --input_train_bin='data/edu_fineweb10B/*_train_*.bin' --output_dir=outdir/gpt2-124m
#   MODEL=gpt2-350m bash scripts/launch/t4x4.sh --input_train_bin='data/edu_fineweb10B/*_train_*.bin'
set -euo pipefail
cd "$(dirname "$0")/../.."
NPROC=${NPROC:-4}
source scripts/launch/env.sh
MODEL=${MODEL:-gpt2-124m}
case $MODEL in # 16 bytes per parameter, and per sequence of 1024 tokens 0.32 GiB (124M) or 0.85 GiB (350M)
    gpt2-124m) BATCH_SIZE=${BATCH_SIZE:-16} ;; # about 7 GiB
    gpt2-350m) BATCH_SIZE=${BATCH_SIZE:-4} ;;  # about 9 GiB
    *) BATCH_SIZE=${BATCH_SIZE:-1} ;;
esac
exec torchrun --standalone --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS" --signals-to-handle="$SIGNALS" \
    train_gpt.py --cfg="$MODEL" --dtype=float16 --batch_size="$BATCH_SIZE" "$@"
