"""Processes that tests start: they find the tests' helpers, and have one thread, since the models are tiny."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def environment(**own: str) -> dict[str, str]:
    path = [str(TESTS), str(TESTS / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # DeepSpeed compiles an operation, by a program that lies beside Python.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": programs, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **own}
