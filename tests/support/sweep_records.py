"""Records of finished runs, invented: what a sweep's results files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.docs.runs import Papers, Results
from scripts.sweep.plan import VARIANTS, Run, settings

ROOT = Path(__file__).resolve().parents[2]
PAPERS = Papers.read(ROOT / "results/papers.json")
METRICS = {"rte": ("accuracy",), "mrpc": ("accuracy", "f1"), "cola": ("matthews_correlation",),
           "stsb": ("pearson", "spearmanr")}  # fmt: skip
ROWS = {"rte": 2490, "mrpc": 3668, "cola": 8551, "stsb": 5749}


def record(run: Run, *metrics: float | None, held_out: float | None = None, **more: Any) -> dict[str, Any]:
    """What scripts.glue.train writes about a run with these metrics on dev, in percent."""
    values = {
        f"eval_{name}": None if v is None else v / 100 for name, v in zip(METRICS[run.task], metrics, strict=True)
    }
    holdout = {} if held_out is None else {"holdout": dict.fromkeys(METRICS[run.task], held_out / 100)}
    rows = {"train": ROWS[run.task], "dev": 277, **({"holdout": 249} if holdout else {})}
    return {
        "method": VARIANTS[run.variant].method,
        "task": run.task,
        "model": "all-MiniLM-L6-v2",
        "config": {**settings(run), "total_batch_size": 16, "max_steps": -1},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "device": {"type": "cpu", "name": "a machine", "processes": 1, "threads": 2},
        "rows": rows,
        "parameters": {"trained_first_phase": 6_000_000, "trained_last_phase": 2_000_000, "total": 9_000_000},
        "epochs": [
            {"epoch": 1.0, "step": 10, "train_loss": 0.7, **dict.fromkeys(values, 0.5)},
            {"epoch": 2.0, "step": 20, "train_loss": 0.5, **values},
        ],
        "final": values,
        **holdout,
        "metrics_source": "scikit-learn/scipy",
        "phases": [{"name": "train", "first_step": 0, "steps": 20, "seconds": 9.0, "trained_parameters": 2_000_000}],
        "wall_seconds": {"train": 9.0, "eval": 1.0, "total": 1800.0},
        "date": "2026-11-22T01:00:00+00:00",
        "finished": True,
        **more,
    }


def paper(task: str, variant: str, seed: int = 0) -> Run:
    return Run("paper", task, variant, 2e-5, seed)


def results(*found: tuple[Run, dict[str, Any]]) -> Results:
    return Results(dict(found))


def scored(scores: dict[Run, float]) -> Results:
    """Runs whose metrics all have one value."""
    return Results({run: record(run, *[value] * len(METRICS[run.task])) for run, value in scores.items()})


def lines_with(lines: list[str], begin: str) -> list[str]:
    return [line for line in lines if line.startswith(begin)]


def grid(task: str, variant: str, held_out: dict[float, float], dev: float = 60.0) -> dict[Run, dict[str, Any]]:
    runs = {Run("tuned", task, variant, lr, 0): score for lr, score in held_out.items()}
    return {run: record(run, dev + 1e4 * run.lr, held_out=score) for run, score in runs.items()}
