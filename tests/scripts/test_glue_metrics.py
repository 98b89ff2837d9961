"""`scripts/glue/metrics.py` on fixed predictions.

The `evaluate` package does not ship the GLUE metric's code: `evaluate.load("glue", task)` fetches it. Without network
the numbers are compared with hand computation, which each test shows, and with constants that were computed once by
the functions of the official `metrics/glue/glue.py` (huggingface/evaluate, commit 3a62fc3) run by `evaluate` 0.4.6;
with network, also with `evaluate.load` itself.
"""

import math

import numpy as np
import pytest

from scripts.glue import metrics as glue_metrics

# true positives 4 (rows 0, 1, 2, 8), false negatives 1 (row 3), false positives 2 (rows 6, 7), true negatives 3
REFERENCES = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0])
PREDICTIONS = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1, 0])
SCORES = np.array([0.0, 1.25, 5.0, 3.2, 3.2, 4.75, 2.4, 0.6, 1.25, 3.8])
PREDICTED_SCORES = np.array([0.31, 1.9, 4.4, 2.2, 3.9, 4.1, 2.8, 0.2, 0.7, 4.6], dtype=np.float32)


def fixed(task: str) -> tuple[np.ndarray, np.ndarray]:
    return (PREDICTED_SCORES, SCORES) if task == "stsb" else (PREDICTIONS, REFERENCES)


@pytest.mark.parametrize("task", ["sst2", "mnli", "qnli", "rte", "wnli"])
def test_accuracy(task):
    # 4 + 3 of 10 rows are right
    assert glue_metrics.compute_locally(task, PREDICTIONS, REFERENCES) == {"accuracy": 0.7}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1(task):
    # f1 of class 1: 2 TP / (2 TP + FP + FN) = 8 / 11
    values = glue_metrics.compute_locally(task, PREDICTIONS, REFERENCES)
    assert values == {"accuracy": 0.7, "f1": pytest.approx(8 / 11, rel=1e-12)}


def test_matthews():
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (12 - 2) / sqrt(6 * 5 * 5 * 4)
    values = glue_metrics.compute_locally("cola", PREDICTIONS, REFERENCES)
    assert values == {"matthews_correlation": pytest.approx(10 / math.sqrt(600), rel=1e-12)}
    assert glue_metrics.compute_locally("cola", np.ones(10), REFERENCES) == {"matthews_correlation": 0.0}


def test_correlations():
    # references 0..4: deviations -2..2, squares sum to 10. Predictions: mean 2.8, deviations -2.8, -0.8, -1.8, 5.2,
    # 0.2, squares sum to 38.8, products to 12. Ranks of the predictions 1, 3, 2, 5, 4: 1 - 6 * 4 / (5 * 24) = 0.8
    values = glue_metrics.compute_locally("stsb", np.array([0, 2, 1, 8, 3]), np.arange(5))
    assert values == {
        "pearson": pytest.approx(12 / math.sqrt(388), rel=1e-6),
        "spearmanr": pytest.approx(0.8, rel=1e-6),
    }
    # ties take their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3 give 1.5 / sqrt(1.5 * 2)
    tied = glue_metrics.compute_locally("stsb", np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0]))
    assert tied["spearmanr"] == pytest.approx(1.5 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(
    "task, official",
    [
        ("cola", {"matthews_correlation": 0.408248290463863}),
        ("mrpc", {"accuracy": 0.7, "f1": 0.7272727272727273}),
        ("rte", {"accuracy": 0.7}),
        ("stsb", {"pearson": 0.9243022799491882, "spearmanr": 0.9268464986450384}),
    ],
)
def test_equal_to_the_official_code(task, official):
    assert glue_metrics.compute_locally(task, *fixed(task)) == pytest.approx(official, rel=1e-6)


@pytest.mark.parametrize("task", list(glue_metrics.METRIC_NAMES))
def test_offline(task, monkeypatch):
    """Offline metric is local and immediate."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric, source = glue_metrics.load_metric(task)
    assert source == "scikit-learn/scipy"
    assert tuple(metric(*fixed(task))) == glue_metrics.METRIC_NAMES[task]


@pytest.mark.slow
@pytest.mark.parametrize("task", list(glue_metrics.METRIC_NAMES))
def test_equal_to_evaluate(task):
    metric, source = glue_metrics.load_metric(task)
    if source != "evaluate":
        pytest.skip('evaluate.load("glue") needs network to fetch the metric\'s code')
    assert metric(*fixed(task)) == pytest.approx(glue_metrics.compute_locally(task, *fixed(task)), abs=1e-12)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"task must be one of cola, .*got 'ax'"):
        glue_metrics.load_metric("ax")
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\)"):
        glue_metrics.compute_locally("rte", np.zeros(3), np.zeros(2))
