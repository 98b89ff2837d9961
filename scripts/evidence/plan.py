"""Which runs a protocol makes, and in which order. What there is to train stands in protocol.yaml.

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

FILE = Path(__file__).parent / "protocol.yaml"
#: The variant that others are compared with.
REFERENCE = "lora"
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
        if not match:
            raise ValueError(f"A run is called <task>-<variant>-lr<rate>-seed<seed>, got {name!r}.")
        return cls(match[1], match[2], float(match[3]), int(match[4]))


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        label: its name in tables.
        rows: numbers of its rows to train on, to choose by and to test with.
        epochs: how often a run sees those to train on.
        tokens: of a row, about: the length at which steps are timed.
        recipe: arguments of `transformers.TrainingArguments`, beside those of the protocol.
        causal: whether it is the decoder's.
        rates: of variants that have others here than usual.
    """

    label: str
    rows: Mapping[str, int]
    epochs: float
    tokens: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A method with its settings; protocol.yaml says what the fields mean."""

    label: str
    method: str
    rates: Sequence[float]
    fields: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Variants that are trained on tasks before the next stage begins.

    Attributes:
        seeds: how many of the protocol's; None: all.
    """

    tasks: Sequence[str]
    variants: Sequence[str]
    seeds: int | None = None


@dataclass(frozen=True)
class Protocol:
    """A recipe, tasks and variants.

    Attributes:
        recipe: arguments of `transformers.TrainingArguments`.
        evaluations: on the rows to choose by, in a training of usual length.
        precision: what `torch.set_float32_matmul_precision` gets.
        max_length: tokens of a row; longer ones are cut.
        page: variants in each table of the page, by the names of the tables.
    """

    recipe: Mapping[str, Any]
    evaluations: int
    precision: str
    max_length: int
    seeds: Sequence[int]
    tasks: Mapping[str, Task]
    variants: Mapping[str, Variant]
    stages: Sequence[Stage]
    page: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path = FILE) -> Protocol:
        """The protocol in a YAML file."""
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values["tasks"] = {name: Task(**entry) for name, entry in values["tasks"].items()}
        values["variants"] = {name: Variant(**entry) for name, entry in values["variants"].items()}
        values["stages"] = [Stage(**entry) for entry in values["stages"]]
        return cls(**values)

    def recipe_of(self, task: str) -> dict[str, Any]:
        """Arguments of `transformers.TrainingArguments` for a task."""
        return {**self.recipe, **self.tasks[task].recipe}

    def epochs(self, run: Run) -> float:
        """Of the whole training."""
        return self.tasks[run.task].epochs * self.variants[run.variant].length

    def settings(self, run: Run) -> dict[str, Any]:
        """What decides what a run computes, besides the rows and the code."""
        variant = self.variants[run.variant]
        return {
            **self.recipe_of(run.task),
            "method": variant.method,
            "fields": dict(variant.fields),
            "epochs": self.epochs(run),
            "precision": self.precision,
            "max_length": self.max_length,
        }

    def identity(self, run: Run) -> dict[str, Any]:
        """The settings and the numbers of rows: what a checkpoint or a record of the run must have been made with."""
        return {**self.settings(run), "rows": dict(self.tasks[run.task].rows)}

    def alike(self, variant: str) -> list[str]:
        """The variants with the same method and fields, itself among them: a step of each costs the same."""
        own = self.variants[variant]
        return [name for name, v in self.variants.items() if (v.method, v.fields) == (own.method, own.fields)]

    def value(self, task: str, point: Mapping[str, Any]) -> float:
        """What an evaluation on the rows to choose by is judged by: the score, or the decoder's loss with a minus,
        for one row more or less would decide there. Minus infinity where it is no number."""
        if point["score"] is None or point["loss"] is None:
            return float("-inf")
        return -point["loss"] if self.tasks[task].causal else point["score"]

    def rates(self, task: str, variant: str) -> Sequence[float]:
        """The three rates of a variant on a task."""
        return self.tasks[task].rates.get(variant, self.variants[variant].rates)

    def best_rate(self, scores: Scores, task: str, variant: str) -> float | None:
        """The rate with the best score of the first seed; None as long as one of them is not finished, or where all
        diverged. Of two equal ones the lower."""
        found = {rate: scores.get(Run(task, variant, rate, self.seeds[0])) for rate in self.rates(task, variant)}
        known = {rate: score for rate, score in found.items() if score is not None}
        if len(known) < len(found) or not any(score > float("-inf") for score in known.values()):
            return None
        return max(known, key=lambda rate: (known[rate], -rate))

    def planned(self, scores: Scores) -> list[Run]:
        """All runs in their order, finished ones too, as far as the finished ones tell which come."""
        return list(dict.fromkeys(run for stage in self.stages for run in self._stage(scores, stage)))

    def _stage(self, scores: Scores, stage: Stage) -> Iterator[Run]:
        cells = [(task, variant) for variant in stage.variants for task in stage.tasks]
        first, *others = self.seeds[: stage.seeds]
        for index in (1, 0, 2):
            for task, variant in cells:
                yield Run(task, variant, self.rates(task, variant)[index], first)
        for seed in others:
            for task, variant in cells:
                if (rate := self.best_rate(scores, task, variant)) is not None:
                    yield Run(task, variant, rate, seed)
