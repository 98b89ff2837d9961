"""The tuners under the contract: how to make one on a zoo model, and how many phases it goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftConfig

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.registry import methods


@dataclass(frozen=True)
class Tuner:
    config: Callable[..., PeftConfig]
    prefix: str
    phases: tuple[str, ...]
    #: Whether a fresh adapter leaves the function as it is.
    fresh_is_identity: bool = True
    #: Whether a weight can hold an adapter, so that it can be merged.
    merges: bool = True


def refuses_to_merge(tuner: str, model: Any) -> bool:
    """Whether no weight can hold the tuner's adapters; then it is checked that every verb says so and changes nothing.

    Args:
        model: a `PeftModel` with such an adapter.
    """
    if TUNERS[tuner].merges:
        return False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for verb in ("merge_adapter", "merge_and_unload"):
        for settings in ({}, {"safe_merge": True}, {"adapter_names": ["default"]}):
            with pytest.raises(NotImplementedError, match=r"not linear.*model\.unload\(\).*disable_adapter\(\)"):
                getattr(model, verb)(**settings)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(value.is_meta or torch.equal(after[name], value) for name, value in before.items())
    return True


def _learner(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_epochs": 1, "priming_lr_scale": 0.5, **settings})


def _learner_unprimed(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_epochs": 0, "scaling": 2.0, **settings})


def _learner_fold(**settings: Any) -> LearnerConfig:
    return _learner(**{"after_priming": "fold", "fold_rank": 3, "scaling": -2.0, **settings})


def _far(**settings: Any) -> FARConfig:
    settings.pop("r", None)  # a FAR adapter has no rank
    return FARConfig(**{"retention_ratio": 0.25, "priming_epochs": 1, **settings})


def _far_rows(**settings: Any) -> FARConfig:
    return _far(**{"granularity": "output_node", "selection": "l2", **settings})


def _far_discard(**settings: Any) -> FARConfig:
    return _far(**{"discard_unkept": True, **settings})


def _nas_unstructured(**settings: Any) -> NASLoRAConfig:
    return NASLoRAConfig(**{"r": 4, "parameter_budget": 0.4, **settings})


def _nas_structured(**settings: Any) -> NASLoRAConfig:
    return _nas_unstructured(**{"granularity": "structured", **settings})


def _sequential(**settings: Any) -> BottleneckConfig:
    settings.pop("r", None)  # a bottleneck adapter has no rank
    return BottleneckConfig(**{"bottleneck_dim": 8, "non_linearity": "gelu", "scaling": 4.0, **settings})


def _parallel(**settings: Any) -> BottleneckConfig:
    return _sequential(**{"mode": "parallel", **settings})


TUNERS: dict[str, Tuner] = {
    "learner": Tuner(_learner, "learner_", ("priming", "learning")),
    "learner-unprimed": Tuner(_learner_unprimed, "learner_", ("learning",)),
    "learner-fold": Tuner(_learner_fold, "learner_", ("priming", "learning")),
    "far": Tuner(_far, "far_", ("priming", "reconfigured")),
    "far-output-node": Tuner(_far_rows, "far_", ("priming", "reconfigured")),
    "far-discard": Tuner(_far_discard, "far_", ("priming", "reconfigured")),
    "nas-unstructured": Tuner(_nas_unstructured, "nas_lora_", ("search", "retraining"), fresh_is_identity=False),
    "nas-structured": Tuner(_nas_structured, "nas_lora_", ("search", "retraining"), fresh_is_identity=False),
    "bottleneck-sequential": Tuner(_sequential, "bottleneck_", ("training",), merges=False),
    "bottleneck-parallel": Tuner(_parallel, "bottleneck_", ("training",), merges=False),
}

# A method that is registered and not named above goes through the contract as its config is by default.
for _method, _config in methods().items():
    if not any(tuner.prefix == f"{_method}_" for tuner in TUNERS.values()):
        TUNERS[_method] = Tuner(_config, f"{_method}_", tuple(phase.name for phase in _config().outline().phases))
