#!/usr/bin/env bash
# Linters and tests, from a bare machine. With arguments: pytest alone, with these arguments.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$(bash "$root/scripts/setup_env.sh" test)"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root"
if [[ $# -eq 0 ]]; then
    "$venv/bin/python" -m ruff check .
    "$venv/bin/python" -m ruff format --check .
    "$venv/bin/python" -m mypy
    "$venv/bin/lint-imports" --no-cache >&2
    set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$venv/bin/python" -m pytest "$@"
