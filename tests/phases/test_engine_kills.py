"""Runs under engines that are killed and started again: they end with the adapter of a run that nobody killed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Warm
from runs.engine_kills import KILLED, KILLS, killed, unbroken, warm_process

RESULTS = Path(__file__).parents[2] / "results" / "engines" / "kills.jsonl"


@pytest.fixture(scope="module")
def prepared() -> Iterator[Warm]:
    """A process to fork from, which has imported the engines."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install peft-learners[deepspeed]")
    with warm_process() as warm:
        yield warm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "case", "shares"),
    [("fsdp2-full", "nas", [0.2]), ("zero2", "learner", [0.45]), ("zero3", "far", [0.7])],
)
def test_killed(prepared: Warm, tmp_path: Path, engine, case, shares):
    """Both ranks die at this share of the run; the same program, started again, ends with the same bits."""
    seconds = unbroken(prepared, tmp_path / "unbroken", engine, case)
    found = list(killed(prepared, tmp_path / "killed", engine, case, shares, seconds, tmp_path / "unbroken"))
    assert len(found) == len(shares) and all(told["equal"] for told in found), found


def test_results():
    """The thirty kills of the record went over all engines and cases, before and after the boundary."""
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert {(told["engine"], told["case"]) for told in found} == {(e, c) for e in KILLED for c in KILLS}
    assert len(found) == 30 and all(told["equal"] for told in found)
    assert {told["run"] for told in found} == {"run", "first", "second"}
