"""The numbers in README are those of the committed results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"mrpc": ("eval_accuracy", "eval_f1"), "cola": ("eval_matthews_correlation",),
           "stsb": ("eval_pearson", "eval_spearmanr")}  # fmt: skip


def rows() -> list[tuple[str, str, str, str]]:
    """`(task, method, values, file)` of the table in README."""
    table = re.findall(r"^\| (\w+) \| (\w+) \| ([\d. /]+) \| \[.*?\]\((results/glue/.*?\.json)\) \|$",
                       (ROOT / "README.md").read_text(), re.M)  # fmt: skip
    assert table
    return table


@pytest.mark.parametrize("task,method,values,file", rows(), ids=lambda value: str(value)[-40:])
def test_readme_and_results_agree(task, method, values, file):
    result = json.loads((ROOT / file).read_text())
    assert result["finished"] and (result["task"], result["method"]) == (task.lower(), method)
    assert values == " / ".join(f"{100 * result['final'][metric]:.1f}" for metric in METRICS[result["task"]])


def test_every_results_file_is_in_the_readme():
    assert {row[3] for row in rows()} == {str(p.relative_to(ROOT)) for p in (ROOT / "results/glue").glob("*.json")}


def test_results_hold_no_path_of_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"/(?!\s)', path.read_text()), path
