"""The runs of results/archive.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parents[2] / "results/archive.jsonl"
RUNS: list[dict[str, Any]] = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def single_run(name: str) -> dict[str, Any]:
    """The record that was results/glue/<name>.json."""
    (found,) = (run for run in RUNS if run["from"] == f"results/glue/{name}.json")
    return found
