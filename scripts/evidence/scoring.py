"""Scores of the protocol's tasks, and what other test rows would have given."""

from __future__ import annotations

import numpy as np

from scripts.glue import metrics

#: Resamples of the test part. Two runs of one seed have their rows in one order, and can be compared draw by draw.
RESAMPLES, RESAMPLE_SEED = 200, 0


def score(task: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the task's metrics, times 100; not a number where one is none."""
    found = metrics.compute_locally(task, predictions, labels)
    return 100 * sum(found.values()) / len(found)


def resampled(task: str, predictions: np.ndarray, labels: np.ndarray) -> list[float]:
    """The score on as many rows as there are, drawn with repetition, `RESAMPLES` times."""
    chance = np.random.default_rng(RESAMPLE_SEED)
    draws = chance.integers(0, len(labels), (RESAMPLES, len(labels)))
    return [round(score(task, predictions[draw], labels[draw]), 3) for draw in draws]
