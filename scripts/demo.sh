#!/usr/bin/env bash
# The demonstration, from a bare machine: environment, then scripts/demo/run.py with the arguments given here.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$(bash "$root/scripts/setup_env.sh" scripts)"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root"
exec "$venv/bin/python" -m scripts.demo.run "$@"
