"""Official GLUE metrics: from `evaluate` where the network allows, else the same numbers from scikit-learn/scipy."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

#: Metrics of each task in the names of `evaluate.load("glue", task)`; the first is the task's main one.
METRIC_NAMES: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "grammar": ("accuracy",),
    "decoder": ("accuracy",),
}
#: Seconds to wait for the Hub before the metrics are computed without it.
HUB_TIMEOUT = 5.0

Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def compute_locally(task: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The task's GLUE metrics without `evaluate`.

    Args:
        task: a key of `METRIC_NAMES`.
        predictions: class ids, or scores for stsb; shape `(rows,)`.
        references: the labels, of the same shape.

    Returns:
        Values between -1 and 1 (not percent), by the names in `METRIC_NAMES`.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    names = _names(task)
    # The types that `evaluate` casts to; they decide the last digits of the correlations.
    dtype = np.float32 if task == "stsb" else np.int64
    predictions = np.asarray(predictions).astype(dtype)
    references = np.asarray(references).astype(dtype)
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions and references must have one shape, got {predictions.shape} and {references.shape}."
        )
    functions: dict[str, Callable[[], float]] = {
        "matthews_correlation": lambda: matthews_corrcoef(references, predictions),
        "accuracy": lambda: (predictions == references).mean(),
        "f1": lambda: f1_score(y_true=references, y_pred=predictions),
        "pearson": lambda: pearsonr(predictions, references)[0],
        "spearmanr": lambda: spearmanr(predictions, references)[0],
    }
    return {name: float(functions[name]()) for name in names}


def load_metric(task: str) -> tuple[Metric, str]:
    """The task's metric function and where it comes from: `"evaluate"` or `"scikit-learn/scipy"`.

    `HF_HUB_OFFLINE=1` or `HF_EVALUATE_OFFLINE=1` skips `evaluate`; so does a Hub that does not answer in time.
    """
    _names(task)
    try:
        return _from_evaluate(task), "evaluate"
    except Exception:  # no network, no package, an unwritable cache: the numbers are the same without it
        return lambda predictions, references: compute_locally(task, predictions, references), "scikit-learn/scipy"


def _names(task: str) -> tuple[str, ...]:
    if task not in METRIC_NAMES:
        raise ValueError(f"task must be one of {', '.join(METRIC_NAMES)}, got {task!r}.")
    return METRIC_NAMES[task]


def _offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def _from_evaluate(task: str) -> Metric:
    if _offline():
        raise ConnectionError("offline by environment")
    from huggingface_hub import HfApi

    # `evaluate.load` retries for minutes where packets are dropped; this request does not.
    HfApi().repo_info("evaluate-metric/glue", repo_type="space", timeout=HUB_TIMEOUT)
    import evaluate

    # In memory: several processes of one run would otherwise share a file in the cache.
    metric = evaluate.load("glue", task, keep_in_memory=True)

    def compute(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        values = metric.compute(predictions=predictions, references=references)
        return {name: float(values[name]) for name in METRIC_NAMES[task]}

    return compute
