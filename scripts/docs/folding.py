"""The table of folding on MRPC and CoLA, from the runs of an older protocol in results/archive.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.docs.evidence import power
from scripts.docs.pages import Lines, markdown
from scripts.glue import run_record

SOURCE = "results/fold/minilm.jsonl"
TASKS = {"cola": "CoLA", "mrpc": "MRPC"}
LABELS = {
    "lora": "LoRA",
    "unprimed": "Learner, unprimed",
    "keep": "Learner, primed, kept",
    "fold": "Learner, primed, folded",
    "rewarm": "folded, then 20 steps of warm-up",
}
Row = Mapping[str, Any]


def table(archive: Path) -> Lines:
    """Each method at the better of its rates by the held-out rows, with the first seed.

    A run is named `<task>-r<rank>-<method>-lr<rate>-seed<seed>`.
    """
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in run_record.read_lines(archive):
        if row["from"] == SOURCE and row["run"].endswith("-seed0"):
            task, rank, method, *_ = row["run"].split("-")
            cells.setdefault((task, rank.removeprefix("r"), method), []).append(row)
    lines = [
        _line(f"{TASKS[task]}, r = {rank}", LABELS[method], cells[task, rank, method])
        for task in TASKS
        for rank in ("16", "64")
        for method in LABELS
        if (task, rank, method) in cells
    ]
    return markdown(pd.DataFrame(lines))


def _line(where: str, label: str, rows: list[Row]) -> dict[str, str]:
    ordered = sorted(rows, key=_held_out, reverse=True)
    best, kept = ordered[0], ordered[0].get("kept_energy")
    shares = [100 * share for share in kept.values()] if kept else []
    return {
        "": where,
        "method": label,
        "held-out rows, by rate": ", ".join(f"{_rate(row)}: {_held_out(row):.1f}" for row in ordered),
        "dev": f"{_score(best['final'], 'eval_'):.1f}",
        "energy kept, least / median": f"{min(shares):.0f} / {statistics.median(shares):.0f} %" if shares else "",
        "file, MB": f"{best['adapter_bytes'] / 1e6:.1f}",
    }


def _rate(row: Row) -> str:
    return power(row["config"]["learning_rate"])


def _held_out(row: Row) -> float:
    return _score(row["holdout"])


def _score(values: Row, prefix: str = "") -> float:
    """Matthews' correlation, or the mean of accuracy and F1, times 100."""
    names = ("matthews_correlation",) if f"{prefix}matthews_correlation" in values else ("accuracy", "f1")
    return 100 * statistics.fmean(values[prefix + name] for name in names)
