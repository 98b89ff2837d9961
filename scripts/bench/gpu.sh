#!/usr/bin/env bash
# Checks and times all methods on one GPU, in at most 8 minutes, with the Python at hand: see scripts/bench/gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
exec "${PYTHON:-python3}" -m scripts.bench.gpu "$@"
