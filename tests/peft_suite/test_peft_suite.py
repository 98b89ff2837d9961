"""PEFT's own, unedited test-suite on our tuners (peft_cases.py says on which)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peft_suite import runner, source
from peft_suite.skips import RUNS

#: By tuner, how many of PEFT's tests pass at least. Bottleneck adapters skip those that merge.
TUNERS = {"Learner": 1100, "FAR": 1100, "NAS": 1000, "Bottleneck": 550}


@pytest.fixture
def suite() -> Path:
    return source.fetch_or_skip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_peft_suite(suite: Path, tmp_path: Path, record_property: Callable[[str, object], None]):
    """PEFT's own suite has no failures."""
    report = runner.run(suite, tmp_path)
    assert report.status == 0, report.output[-8000:]
    assert report.total("failure") == report.total("error") == 0
    passed = report.counts["passed"]
    by_tuner = {tuner: sum(n for (_, of), n in passed.items() if of == tuner) for tuner in TUNERS}
    record_property(f"PEFT {source.RELEASE}'s own test-suite", f"{report.closing_line}; passed by tuner: {by_tuner}")
    assert report.total("passed") >= 3800, report.closing_line
    assert sum(by_tuner.values()) == report.total("passed"), "some test of PEFT's has no case of ours"
    assert all(by_tuner[tuner] >= least for tuner, least in TUNERS.items()), by_tuner
    assert [(m, tuner) for m in runner.MODULES for tuner in TUNERS if not passed[m, tuner]] == []
    unexplained = [reason for reason in report.skip_reasons if RUNS not in reason]
    assert unexplained == [], "say in tests/peft_suite/skips.py what would lift these"


@pytest.mark.slow
def test_fetched_twice(suite: Path, tmp_path: Path):
    """Two processes can fetch the suite at once."""
    with ThreadPoolExecutor(2) as pool:
        fetched = list(pool.map(lambda _: source.fetch(cache=tmp_path), range(2)))
    assert fetched == [tmp_path / suite.name] * 2
    assert [path.name for path in tmp_path.iterdir()] == [suite.name]
    ours, theirs = ({p.name: p.read_bytes() for p in (of / "tests").glob("*.py")} for of in (fetched[0], suite))
    assert ours == theirs
    assert ours.keys() >= {f"{module}.py" for module in runner.MODULES}


def test_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a registry it is said what is missing."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(source.SuiteUnavailable, match=rf"peft {source.RELEASE} .* -- runs where pip reaches"):
        source.fetch(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
