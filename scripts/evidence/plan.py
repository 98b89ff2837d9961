"""Which runs the protocol makes, and in which order. What there is to train stands in protocol.yaml.

A *variant* is a method with its settings. A *run* is a variant trained on a task with one learning rate and one seed.
Each variant has three rates in half decades. The first seed trains all three; the best on the rows to choose by is the
rate of the other seeds. Variants come in stages: one stage is finished on all its tasks before the next one begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.evidence.data import Sizes

_DATA = yaml.safe_load((Path(__file__).parent / "protocol.yaml").read_text(encoding="utf-8"))
MODEL: str = _DATA["model"]
EVALUATIONS: int = _DATA["evaluations"]
PRECISION: str = _DATA["precision"]
MAX_LENGTH: int = _DATA["max_length"]
SEEDS: Sequence[int] = _DATA["seeds"]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        sizes: numbers of its rows.
        epochs: how often a run sees those to train on.
        recipe: arguments of `transformers.TrainingArguments`.
        tokens: of a row, about: the length at which steps are timed.
    """

    sizes: Sizes
    epochs: float
    recipe: Mapping[str, Any]
    tokens: int


@dataclass(frozen=True)
class Variant:
    """A method with its settings; protocol.yaml says what the fields mean."""

    label: str
    method: str
    rates: Sequence[float]
    fields: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0


TASKS = {
    name: Task(
        Sizes(**entry["rows"]), entry["epochs"], {**_DATA["recipe"], **entry.get("recipe", {})}, entry["tokens"]
    )
    for name, entry in _DATA["tasks"].items()
}
VARIANTS = {name: Variant(**entry) for name, entry in _DATA["variants"].items()}
STAGES: Sequence[Mapping[str, Sequence[str]]] = _DATA["stages"]
#: Variants in each table of the page.
PAGE: Mapping[str, Sequence[str]] = _DATA["page"]
#: Score on the rows to choose by at the end of each finished run; minus infinity where training diverged.
Scores = Mapping["Run", float]


@dataclass(frozen=True, order=True)
class Run:
    """One training run."""

    task: str
    variant: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """What it is called in files."""
        return f"{self.task}-{self.variant}-lr{self.rate:g}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Run:
        """The run of that name.

        Raises:
            ValueError: it is no name of a run.
        """
        match = re.fullmatch(r"([a-z0-9]+)-(\w+)-lr([0-9.e+-]+)-seed(\d+)", name)
        if not match or match[1] not in TASKS or match[2] not in VARIANTS:
            raise ValueError(f"A run is called <task>-<variant>-lr<rate>-seed<seed>, got {name!r}.")
        return cls(match[1], match[2], float(match[3]), int(match[4]))


def best_rate(scores: Scores, task: str, variant: str) -> float | None:
    """The rate with the best score; None as long as one of them is not finished, or where all diverged. Of two equal
    ones the lower."""
    found = {rate: scores.get(Run(task, variant, rate, SEEDS[0])) for rate in VARIANTS[variant].rates}
    known = {rate: score for rate, score in found.items() if score is not None}
    if len(known) < len(found) or not any(score > float("-inf") for score in known.values()):
        return None
    return max(known, key=lambda rate: (known[rate], -rate))


def planned(scores: Scores) -> list[Run]:
    """All runs in their order, finished ones too, as far as the finished ones tell which come."""
    return list(dict.fromkeys(run for stage in STAGES for run in _stage(scores, stage)))


def _stage(scores: Scores, stage: Mapping[str, Sequence[str]]) -> Iterator[Run]:
    cells = [(task, variant) for task in stage["tasks"] for variant in stage["variants"]]
    first, *others = SEEDS
    for index in (1, 0, 2):
        yield from (Run(task, variant, VARIANTS[variant].rates[index], first) for task, variant in cells)
    for seed in others:
        for task, variant in cells:
            if (rate := best_rate(scores, task, variant)) is not None:
                yield Run(task, variant, rate, seed)
