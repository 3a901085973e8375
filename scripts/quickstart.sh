#!/usr/bin/env bash
# From a fresh clone to a GPT that has learned one batch of Shakespeare by heart. Run it again to go on from what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements-gpu.txt
python data/tiny_shakespeare.py
python train_gpt.py --cfg=overfit "$@"
echo
echo "100 tokens from the checkpoint:"
python eval/generate.py --checkpoint outdir/quickstart --max_new_tokens 100 --temperature 0
