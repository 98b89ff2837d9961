"""Writes the tables of docs/distributed.md: what works under which engine, and what it costs.

    python -m scripts.docs.engines_table [--check]

They are made from results/engines/cells.jsonl, which the runs of tests/runs/engines_tiny.py leave.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.docs.pages import ROOT, Lines, markdown, spliced

PAGE, CELLS = ROOT / "docs" / "distributed.md", ROOT / "results" / "engines" / "cells.jsonl"
KIND = "engines"
ENGINES = {
    "ddp": "DDP",
    "fsdp2-full": "FSDP2, full state",
    "fsdp2-sharded": "FSDP2, sharded state",
    "fsdp2-ram": "FSDP2, `fsdp_cpu_ram_efficient_loading`",
    "fsdp2-checkpointing": "FSDP2, activation checkpointing",
    "zero2": "DeepSpeed, ZeRO-2",
    "zero3": "DeepSpeed, ZeRO-3",
}
CASES = {
    "lora": "LoRA (control)",
    "bottleneck": "Bottleneck",
    "unprimed": "Learner, no priming",
    "learner": "Learner",
    "fold": "Learner that folds",
    "far": "FAR",
    "nas": "NAS-LoRA, entries",
    "nas-structured": "NAS-LoRA, columns",
}


def cells() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CELLS.read_text(encoding="utf-8").splitlines()]


def works(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Engines by cases: the ways that work."""
    rows = []
    for engine, name in ENGINES.items():
        own = [cell for cell in found if cell["engine"] == engine]
        row = {"engine": name}
        for case, title in CASES.items():
            here = [cell for cell in own if cell["case"] == case]
            ways = {"one run" if cell["one_run"] == "works" else "two runs" for cell in here}
            row[title] = ", ".join(sorted(ways)) or None
        rows.append(row | {"greatest difference": f"{max(cell['difference'] for cell in own):.0e}"})
    return pd.DataFrame(rows)


def costs(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Bytes of one rank, in the first step and after the boundary, of DistilBERT's."""
    rows = []
    for case, title in CASES.items():
        row = {"adapter": title}
        for engine in ("fsdp2-full", "zero2", "zero3"):
            cell = next(c for c in found if (c["engine"], c["arch"], c["case"]) == (engine, "distilbert", case))
            for key, of in (("state_bytes", "state"), ("gradient_bytes", "gradients")):
                first, last = cell[key]
                row[f"{engine.partition('-')[0]}: {of}"] = f"{first:,}" if first == last else f"{first:,} → {last:,}"
        rows.append(row)
    return pd.DataFrame(rows)


def with_tables(text: str) -> str:
    """A page's text with the tables between their markers."""
    found = cells()
    tables = {"works": works, "costs": costs}

    def lines(name: str) -> Lines:
        return markdown(tables[name](found))

    return spliced(text, KIND, lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a table is not up to date")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    new = with_tables(text)
    if args.check and new != text:
        sys.exit(f"Not up to date: {Path(PAGE).name}. Run: python -m scripts.docs.engines_table")
    if new != text:
        PAGE.write_text(new, encoding="utf-8")
        print(f"-> {PAGE}")


if __name__ == "__main__":
    main()
