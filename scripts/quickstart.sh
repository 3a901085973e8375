#!/usr/bin/env bash
# Makes .venv, downloads tinyshakespeare, trains a small GPT until it has memorised one batch, and prints a sample.
# Run it again to resume an interrupted run. Arguments are flags of train_gpt.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements-gpu.txt
python data/tiny_shakespeare.py
python train_gpt.py --cfg=overfit "$@"
echo
echo "100 tokens generated from the checkpoint:"
python eval/generate.py --checkpoint outdir/quickstart --max_new_tokens 100 --temperature 0
