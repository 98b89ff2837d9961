"""Tell which dependencies have a release that pyproject.toml does not allow, such as PEFT 0.22.

    python -m scripts.release.newer

It asks the index that pip uses, and exits with 1 if there is such a release. A scheduled job of CI runs it.
"""

import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def newest(name: str) -> str:
    """The newest release of a package."""
    told = subprocess.run([sys.executable, "-m", "pip", "index", "versions", name], capture_output=True, text=True)
    version = re.match(rf"{re.escape(name)} \((\S+)\)", told.stdout)
    if version is None:
        raise RuntimeError(f"pip does not tell the newest release of {name}: {told.stdout}{told.stderr}")
    return version[1]


def outside(requirement: Requirement, version: str) -> str | None:
    """A sentence if the requirement does not allow the version."""
    if requirement.specifier.contains(version):
        return None
    return f"{requirement.name} {version} is out, and pyproject.toml allows {requirement.specifier}."


def main() -> None:
    """Run the script."""
    import tomllib  # Python 3.11

    needs = [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]
    found = [sentence for need in needs if (sentence := outside(need, newest(need.name)))]
    print("\n".join(found) or "The newest releases of all dependencies are allowed.")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
