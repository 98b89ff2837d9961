"""What the finished runs say, as numbers: scores, steps to a score, and what a step costs.

A *cell* is a variant on a task at its best rate, with all seeds that are finished there. A difference or a ratio to
another variant is taken seed by seed, then averaged; its standard error is that of the mean over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from scripts.evidence import costs, sweep
from scripts.evidence.plan import REFERENCE, Protocol, Run
from scripts.glue import run_record

#: How far below LoRA's score one is near it, in points.
NEAR = 1.0
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, or over tasks.

    Attributes:
        value: of the mean.
        error: its standard error; None for one value.
        count: number of values; of tasks, where it is a mean over these.
        rows: standard error of it for other test rows; None where that is not known.
        seeds: the least number of seeds in it.
        capped: whether a run that never reached the target is in it, so that the value is too small.
    """

    value: float
    error: float | None
    count: int
    rows: float | None = None
    seeds: int = 1
    capped: bool = False

    @classmethod
    def of(cls, values: Sequence[float], rows: float | None = None) -> Mean:
        """Over seeds."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values), rows, len(values))

    @classmethod
    def over_tasks(cls, means: Sequence[Mean]) -> Mean:
        """The mean of independent means."""

        def joint(errors: Sequence[float | None]) -> float | None:
            known = [error for error in errors if error is not None]
            return math.hypot(*known) / len(means) if len(known) == len(means) else None

        error, rows = joint([mean.error for mean in means]), joint([mean.rows for mean in means])
        seeds, capped = min(mean.seeds for mean in means), any(mean.capped for mean in means)
        return cls(statistics.fmean(mean.value for mean in means), error, len(means), rows, seeds, capped)

    @property
    def margin(self) -> float:
        """Half of the interval that holds the true value 95 times in 100: of seeds by Student's t, and of test rows.
        Infinite for one seed."""
        if self.error is None:
            return math.inf
        return math.hypot(float(stats.t.ppf(0.975, self.seeds - 1)) * self.error, 1.96 * (self.rows or 0.0))


def _spread(resamples: Sequence[Any]) -> float:
    """Standard error for other test rows: the mean of the seeds' errors, which is no smaller than that of their mean.
    Runs of two seeds may have their rows in other orders, and then their draws are of other rows."""
    return statistics.fmean(float(np.std(draws, ddof=1)) for draws in resamples)


@dataclass(frozen=True)
class Cost:
    """What a phase of a variant costs: times LoRA's step, in flops per step, and in bytes that a step holds."""

    time: float
    flops: int
    bytes: int


@dataclass
class Evidence:
    """The finished runs and the measured costs."""

    protocol: Protocol
    runs: Mapping[Run, Record]
    cost_rows: Sequence[Record] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """What lies in a folder of results."""
        protocol = Protocol.read()
        runs = sweep.finished(protocol, folder / sweep.OUT.name)
        return cls(protocol, runs, run_record.read_lines(folder / costs.OUT.name))

    @cached_property
    def choice(self) -> dict[Run, float]:
        """Score on the rows to choose by, at the end of each run."""
        return sweep.scores(self.protocol, self.runs)

    def rate(self, task: str, variant: str) -> float | None:
        """The best rate of a variant on a task; None as long as it is not known."""
        return self.protocol.best_rate(self.choice, task, variant)

    def cell(self, task: str, variant: str) -> dict[int, Record]:
        """Records by seed, at the best rate."""
        rate = self.rate(task, variant)
        if rate is None:
            return {}
        found = {seed: self.runs.get(Run(task, variant, rate, seed)) for seed in self.protocol.seeds}
        return {seed: record for seed, record in found.items() if record is not None}

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that LoRA has finished rates on."""
        return [task for task in self.protocol.tasks if self.cell(task, REFERENCE)]

    def grid(self, task: str, variant: str) -> dict[float, Run]:
        """The finished runs of the first seed, by rate."""
        runs = {rate: Run(task, variant, rate, self.protocol.seeds[0]) for rate in self.protocol.rates(task, variant)}
        return {rate: run for rate, run in runs.items() if run in self.runs}

    # -- scores ----------------------------------------------------------------------------------------------------

    def test(self, task: str, variant: str) -> Mean | None:
        """Score on the test part."""
        records = self.cell(task, variant).values()
        if not records or any(record["test"] is None for record in records):
            return None
        return Mean.of([record["test"] for record in records], _spread([record["resampled"] for record in records]))

    def difference(self, task: str, variant: str, other: str = REFERENCE) -> Mean | None:
        """Of the scores on the test part, over the seeds that both have."""
        own, others = self.cell(task, variant), self.cell(task, other)
        pairs = [(own[seed], others[seed]) for seed in own if seed in others]
        if not pairs or any(record["test"] is None for pair in pairs for record in pair):
            return None
        resamples = [np.subtract(a["resampled"], b["resampled"]) for a, b in pairs]
        return Mean.of([a["test"] - b["test"] for a, b in pairs], _spread(resamples))

    # -- steps to a score ------------------------------------------------------------------------------------------

    def target(self, task: str) -> float | None:
        """LoRA's score on the rows to choose by at the end of its training, in the mean over seeds."""
        ends = [record["curve"][-1]["score"] or 0.0 for record in self.cell(task, REFERENCE).values()]
        return statistics.fmean(ends) if ends else None

    def arrival(self, task: str, record: Record, less: float = 0.0) -> int | None:
        """The first evaluated step of a run's last phase with the target's score, `less` so many points; None if none.

        What is there before that phase is not yet what the run ends with: a LoRA once folded, a searched architecture.
        """
        target, first = self.target(task), record["phases"][-1]["first_step"]
        later = (point for point in record["curve"] if point["step"] > first and target is not None)
        return next((point["step"] for point in later if (point["score"] or 0.0) >= target - less), None)

    def arrived(self, task: str, variant: str) -> int:
        """How many seeds reach the target."""
        return sum(self.arrival(task, record) is not None for record in self.cell(task, variant).values())

    def spent(self, task: str, record: Record, variant: str, what: str) -> float:
        """What a run has spent as it reaches the target. One that doesn't counts with as many steps as LoRA's training
        has, if these are more than its own.

        Args:
            what: "steps"; "near", in steps to a score near the target; "time", in steps of LoRA; or "flops".
        """
        full = max(other["curve"][-1]["step"] for other in self.cell(task, REFERENCE).values())
        end = self.arrival(task, record, NEAR if what == "near" else 0.0) or max(record["curve"][-1]["step"], full)
        if what in ("steps", "near"):
            return float(end)
        starts = [phase["first_step"] for phase in record["phases"]]
        steps = [max(0, min(end, b) - a) for a, b in zip(starts, [*starts[1:], end], strict=True)]
        found = self.costs(variant, self.protocol.tasks[task].tokens)
        return sum(count * getattr(cost, what) for count, cost in zip(steps, found, strict=True))

    def ratio(self, task: str, variant: str, what: str) -> Mean | None:
        """What a variant spends to the target, to what LoRA spends: the ratio of means over the seeds that both have.
        Its error is that of the mean of what remains, seed by seed, of the variant's less the ratio times LoRA's."""
        own, others = self.cell(task, variant), self.cell(task, REFERENCE)
        seeds = [seed for seed in own if seed in others]
        if not seeds or (what in ("time", "flops") and not self.costs(variant, self.protocol.tasks[task].tokens)):
            return None
        spent = [self.spent(task, own[seed], variant, what) for seed in seeds]
        reference = [self.spent(task, others[seed], REFERENCE, what) for seed in seeds]
        mean = statistics.fmean(reference)
        value = statistics.fmean(spent) / mean
        rest = Mean.of([(a - value * b) / mean for a, b in zip(spent, reference, strict=True)])
        near = NEAR if what == "near" else 0.0
        capped = variant != REFERENCE and any(self.arrival(task, own[seed], near) is None for seed in seeds)
        return Mean(value, rest.error, len(seeds), seeds=len(seeds), capped=capped)

    # -- costs -----------------------------------------------------------------------------------------------------

    def costs(self, variant: str, tokens: int) -> list[Cost]:
        """Of a variant's phases, in their order; those of a variant with the same settings, whatever its length."""
        known = {row["variant"] for row in self.cost_rows}
        measured = next((name for name in self.protocol.alike(variant) if name in known), None)
        rows = [row for row in self.cost_rows if (row["variant"], row["tokens"]) == (measured, tokens)]
        return [
            Cost(row["ratio_to_lora"]["median"], sum(row["flops"].values()), row["bytes"]["total"])
            for row in sorted(rows, key=lambda row: row["phase"])
        ]
