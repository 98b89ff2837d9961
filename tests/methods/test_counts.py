"""Trained parameters of DistilBERT with 2 labels, to the unit (the paper's Table 1; the sums are shown)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from training import sgd
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig

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
def test_learner_64(task_type):
    """Learner-64 trains 20 million parameters in priming and 5.96 million after it."""
    model = get_peft_model(distilbert(), LearnerConfig(r=64, priming_epochs=1, task_type=task_type))
    assert model.get_nb_trainable_parameters()[0] == 20_116_226 == low_rank(64) + BIASES + NORMS + HEAD + ATTENTION
    model.base_model.set_schedule(total_steps=20, steps_per_epoch=10)
    (start,) = model.base_model.update_and_allocate(10)
    assert (start.trained_before, start.trained_after) == (20_116_226, 5_960_450)
    assert model.get_nb_trainable_parameters()[0] == 5_960_450 == low_rank(64) + BIASES + NORMS + HEAD


@pytest.mark.parametrize("priming_epochs,deltas", [(0, 0), (1, ATTENTION)])
def test_learner_64_total(priming_epochs, deltas):
    """Learner-64 has the paper's total. 72.26 million: DistilBERT and the low-rank modules. What trains beside the
    originals, which stay, are biases, norms, the head and in priming the attention's dense deltas; the paper's total
    holds those once."""
    model = get_peft_model(distilbert(), LearnerConfig(r=64, priming_epochs=priming_epochs))
    total = model.get_nb_trainable_parameters()[1]
    assert total - BIASES - NORMS - HEAD - deltas == 72_263_426 == ALL + low_rank(64)


@pytest.mark.parametrize("r,trained", [(8, 1_315_586), (64, 5_960_450), (256, 21_885_698)])
def test_learner_unprimed(r, trained):
    """Learner without priming."""
    model = get_peft_model(distilbert(), LearnerConfig(r=r, priming_epochs=0))
    assert model.get_nb_trainable_parameters()[0] == trained == low_rank(r) + BIASES + NORMS + HEAD


ALL, EMBEDDINGS = 66_955_010, 23_835_648
KEPT, KEPT_OUTPUTS = 307, 77  # 10 % of 3,072 and of 768, rounded to nearest
FROZEN = {
    # per block and frozen hidden unit: a row of lin1, a column of lin2, lin1's bias entry
    "hidden_unit": 6 * (3072 - KEPT) * (768 + 768 + 1),
    # frozen rows of lin1 and of lin2, each with its bias entry
    "output_node": 6 * ((3072 - KEPT) * (768 + 1) + (768 - KEPT_OUTPUTS) * (3072 + 1)),
}


@pytest.mark.parametrize("granularity,trained", [("hidden_unit", 41_456_180), ("output_node", 41_456_642)])
def test_far_10(granularity, trained):
    """FAR-10 trains everything in priming, and 41.45 million parameters after it."""
    config = FARConfig(retention_ratio=0.10, granularity=granularity, selection="random", task_type="SEQ_CLS")
    model = get_peft_model(distilbert(), config)
    assert model.get_nb_trainable_parameters()[0] == ALL == sum(p.numel() for p in distilbert().parameters())
    model.base_model.set_schedule(total_steps=1000, optimizer=sgd(model))
    (start,) = model.base_model.update_and_allocate(10)  # 1 % of 1,000 steps
    assert (start.trained_before, start.trained_after) == (ALL, trained)
    assert model.get_nb_trainable_parameters()[0] == trained == ALL - FROZEN[granularity]


def test_far_10_small():
    """The small variant of FAR-10 leaves the embeddings out."""
    model = get_peft_model(distilbert(), FARConfig(train_embeddings=False, selection="random"))
    assert model.get_nb_trainable_parameters()[0] == ALL - EMBEDDINGS
    model.base_model.set_schedule(total_steps=100, optimizer=sgd(model))
    model.base_model.update_and_allocate(1)
    assert model.get_nb_trainable_parameters()[0] == 41_456_180 - EMBEDDINGS


def test_far_10_pretrained():
    """FAR-10 selects by movement on real weights too."""
    model = get_peft_model(DistilBertForSequenceClassification(DistilBertConfig()), FARConfig(priming_steps=1))
    model.base_model.set_schedule(total_steps=3, optimizer=sgd(model))
    for layer in model.base_model.model.distilbert.transformer.layer:
        torch.nn.init.normal_(layer.ffn.lin1.far_delta["default"].weight)
    model.base_model.update_and_allocate(1)
    assert model.get_nb_trainable_parameters()[0] == 41_456_180


#: Two adapters per block, 768 -> 256 -> 768; one per block, 768 -> 512 -> 768; all with both biases.
ADAPTERS = {"sequential": 12 * (2 * 768 * 256 + 256 + 768), "parallel": 6 * (2 * 768 * 512 + 512 + 768)}


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize(
    "mode,trained,total", [("sequential", 5_341_442, 71_685_890), ("parallel", 5_336_834, 71_681_282)]
)
def test_bottleneck_paper_sizes(mode, trained, total, task_type):
    """Bottleneck adapters have the papers' sizes."""
    model = get_peft_model(distilbert(), BottleneckConfig(mode=mode, task_type=task_type))
    counts = model.get_nb_trainable_parameters()
    assert counts[0] == trained == ADAPTERS[mode] + NORMS + HEAD
    # The paper's total holds each norm and the head once; here the original ones, untouched, are beside what trains.
    assert counts[1] - NORMS - HEAD == total == ALL + ADAPTERS[mode]
    model.base_model.set_schedule(total_steps=20)
    assert model.base_model.update_and_allocate(10) == []  # no boundary
    assert model.get_nb_trainable_parameters() == counts


def test_bottleneck_any_size():
    """Bottleneck adapters may have any size. Hand-counted for hidden size 5 in one block: 2 (5 (768 + 768) + 5 + 768)
    = 16,906."""
    config = BottleneckConfig(bottleneck_dim=5, layers_to_transform=[3], train_norms=False)
    assert get_peft_model(distilbert(), config).get_nb_trainable_parameters()[0] == 16_906 + HEAD
