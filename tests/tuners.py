"""The tuners under the contract: how to make one on a zoo model, and how many phases it goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from peft_learners import LearnerConfig


@dataclass(frozen=True)
class Tuner:
    config: Callable[..., PeftConfig]
    prefix: str
    phases: tuple[str, ...]


def _learner(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_epochs": 1, "priming_lr_scale": 0.5, **settings})


def _learner_unprimed(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_epochs": 0, "scaling": 2.0, **settings})


TUNERS: dict[str, Tuner] = {
    "learner": Tuner(_learner, "learner_", ("priming", "learning")),
    "learner-unprimed": Tuner(_learner_unprimed, "learner_", ("learning",)),
}
