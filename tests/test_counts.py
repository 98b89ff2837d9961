"""Trained parameters of DistilBERT with 2 labels, to the unit (the paper's Table 1; the sums are shown)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_learners import LearnerConfig

ATTENTION = 6 * 4 * 768 * 768  # 14,155,776
BIASES = 6 * (4 * 768 + 3072 + 768)  # 18,432 + 23,040
NORMS = 6 * 2 * 2 * 768  # 18,432
HEAD = 768 * 768 + 768 + 768 * 2 + 2  # 592,130


def low_rank(r: int) -> int:
    return 6 * r * (4 * (768 + 768) + 2 * (768 + 3072))


def distilbert() -> torch.nn.Module:
    with torch.device("meta"):
        return DistilBertForSequenceClassification(DistilBertConfig())


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_learner_64_trains_20_million_in_priming_and_5_96_after(task_type):
    model = get_peft_model(distilbert(), LearnerConfig(r=64, priming_epochs=1, task_type=task_type))
    assert model.get_nb_trainable_parameters()[0] == 20_116_226 == low_rank(64) + BIASES + NORMS + HEAD + ATTENTION
    model.base_model.set_schedule(total_steps=20, steps_per_epoch=10)
    (start,) = model.base_model.update_and_allocate(10)
    assert (start.trained_before, start.trained_after) == (20_116_226, 5_960_450)
    assert model.get_nb_trainable_parameters()[0] == 5_960_450 == low_rank(64) + BIASES + NORMS + HEAD


@pytest.mark.parametrize("r,trained", [(8, 1_315_586), (64, 5_960_450), (256, 21_885_698)])
def test_learner_without_priming(r, trained):
    model = get_peft_model(distilbert(), LearnerConfig(r=r, priming_epochs=0))
    assert model.get_nb_trainable_parameters()[0] == trained == low_rank(r) + BIASES + NORMS + HEAD
