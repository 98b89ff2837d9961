"""The tuners under the contract: how to make one on a zoo model, and how many phases it goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from peft_learners import FARConfig, LearnerConfig, NASLoRAConfig


@dataclass(frozen=True)
class Tuner:
    config: Callable[..., PeftConfig]
    prefix: str
    phases: tuple[str, ...]
    #: Whether a fresh adapter leaves the function as it is.
    fresh_is_identity: bool = True


def _learner(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_epochs": 1, "priming_lr_scale": 0.5, **settings})


def _learner_unprimed(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_epochs": 0, "scaling": 2.0, **settings})


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


TUNERS: dict[str, Tuner] = {
    "learner": Tuner(_learner, "learner_", ("priming", "learning")),
    "learner-unprimed": Tuner(_learner_unprimed, "learner_", ("learning",)),
    "far": Tuner(_far, "far_", ("priming", "reconfigured")),
    "far-output-node": Tuner(_far_rows, "far_", ("priming", "reconfigured")),
    "far-discard": Tuner(_far_discard, "far_", ("priming", "reconfigured")),
    "nas-unstructured": Tuner(_nas_unstructured, "nas_lora_", ("search", "retraining"), fresh_is_identity=False),
    "nas-structured": Tuner(_nas_structured, "nas_lora_", ("search", "retraining"), fresh_is_identity=False),
}
