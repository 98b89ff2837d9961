"""PEFT's own, unedited test-suite on our tuners (tests/peft_cases.py says on which)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RUNNER = TESTS.parents[1] / "shared" / "peft_contract" / "run.sh"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not RUNNER.exists(), reason=f"needs ../shared/peft_contract ({RUNNER.name}) beside the checkout")
def test_peft_own_suite_has_no_failures():
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(RUNNER), "peft_cases", "--tb=short", "-o", "addopts="],
        env=environment,
        capture_output=True,
        text=True,
    )
    closing = done.stdout.strip().splitlines()[-1]
    print(closing)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", closing)}
    assert counts.get("failed", 0) == counts.get("error", 0) == 0
    assert counts["passed"] >= 1000, closing
