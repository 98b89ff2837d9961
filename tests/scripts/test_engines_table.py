"""The tables of docs/distributed.md: made from the committed cells, one for each planned run."""

from __future__ import annotations

import pytest
from runs.engines_tiny import PLAN

from scripts.docs import engines_table


def test_up_to_date():
    """The page holds what the cells say."""
    engines_table.main(["--check"])


def test_all_planned():
    """There is a cell for each engine, architecture and case, and each of them works in one run or in two."""
    found = engines_table.cells()
    planned = [(engine, *cell) for engine, plan in PLAN.items() for cell in plan]
    assert [(cell["engine"], cell["arch"], cell["case"]) for cell in found] == planned
    assert all("works" in (cell["one_run"], cell["two_runs"]) and cell["difference"] < 1e-5 for cell in found)


def test_stale(tmp_path, monkeypatch):
    """A page that says something else is told."""
    page = tmp_path / "distributed.md"
    page.write_text(engines_table.PAGE.read_text().replace("| two runs |", "| one run |", 1))
    monkeypatch.setattr(engines_table, "PAGE", page)
    with pytest.raises(SystemExit, match="Not up to date: distributed.md"):
        engines_table.main(["--check"])
    engines_table.main([])
    engines_table.main(["--check"])
