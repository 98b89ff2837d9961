"""What the runs of `engines_tiny` show: one line of JSON for each engine, architecture and case.

    python -m runs.engine_cells FOLDER > results/engines/cells.jsonl

FOLDER holds a folder for each engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from runs.engines_tiny import BOUNDARY, PLAN


def difference(folder: Path, run: str) -> float:
    """Greatest difference of any value, after any step, to one process."""
    cell = folder.name
    ours, theirs = torch.load(folder / f"{run}-0.pt"), torch.load(folder.parent / "alone" / cell / f"{run}-0.pt")
    pairs = [(one[key], other[key]) for one, other in zip(ours, theirs, strict=True) for key in other]
    return max(float((one - other).abs().max()) for one, other in pairs if other.numel())


def cells_of(folder: Path, engine: str) -> list[dict[str, Any]]:
    """One for each of an engine's cases; bytes are those of the first rank."""
    results, found = json.loads((folder / "results.json").read_text()), []
    for arch, case in PLAN[engine]:
        runs = results[f"{arch}-{case}"]
        parts = [runs["run"]] if "run" in runs else [runs["first"], runs["second"]]
        # Where a run stops at the boundary, the next begins behind it.
        held, sent = [number for part in parts for number in part["state"]], [part["sent"] for part in parts]
        names = ["run"] if "run" in runs else ["first", "second"]
        cell = {
            "engine": engine,
            "arch": arch,
            "case": case,
            "one_run": "works" if "run" in runs else "refused",
            "two_runs": None if "run" in runs else "works",
            "difference": max(difference(folder / f"{arch}-{case}", name) for name in names),
            "state_bytes": [held[0], held[BOUNDARY]],
            "gradient_bytes": None if engine == "ddp" else [sent[0][0], sent[-1][0 if len(sent) > 1 else 1]],
        }
        found.append(cell)
    return found


def main(root: Path) -> None:
    for engine in PLAN:
        for cell in cells_of(root / engine, engine):
            print(json.dumps(cell))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
