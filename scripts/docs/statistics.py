"""Means over seeds with their standard errors, medians, and differences that are paired by seed. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean, median, stdev

#: Of a cell that nothing stands behind.
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in the unit of its values.

    Attributes:
        mean: of the values.
        error: standard error of the mean, `sd / sqrt(n)` with `sd` over n - 1; None with one seed.
        seeds: n.
    """

    mean: float
    error: float | None
    seeds: int

    @property
    def tie(self) -> bool:
        """Of a difference: whether it is smaller than its own error. One seed can't tell."""
        return self.error is not None and (abs(self.mean) < self.error or self.mean == 0)


def estimate(values: Collection[float]) -> Estimate | None:
    """The mean of one value per seed; None if there are none."""
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """`ours - theirs` of each seed that both have.

    Args:
        ours, theirs: values by seed.
    """
    return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]


def score_cell(found: Estimate | None) -> str:
    """`mean ± standard error (n seeds)`, `mean (one seed)`, or a dash."""
    return MISSING if found is None else f"{found.mean:.1f}{_spread(found)}"


def median_cell(values: Collection[float]) -> str:
    """`median (median of n seeds)`, `value (one seed)`, or a dash."""
    return MISSING if not values else f"{median(values):.1f}{_count(values, 'seeds')}"


def difference_cell(found: Estimate | None) -> str:
    """A difference with its sign, and the word "tie" where it is one."""
    return MISSING if found is None else f"{_signed(found.mean)}{_spread(found)}{', tie' if found.tie else ''}"


def median_difference_cell(values: Collection[float]) -> str:
    """`median (median of n pairs)` of paired differences with its sign, `value (one seed)`, or a dash."""
    return MISSING if not values else f"{_signed(median(values))}{_count(values, 'pairs')}"


def short_cell(found: Estimate | None) -> str:
    """As `score_cell`, with the number of seeds alone in the brackets."""
    if found is None:
        return MISSING
    error = "" if found.error is None else f" ± {found.error:.1f}"
    return f"{found.mean:.1f}{error} ({found.seeds})"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # no minus before a zero


def _count(values: Collection[float], what: str) -> str:
    return f" (median of {len(values)} {what})" if len(values) > 1 else " (one seed)"


def _spread(found: Estimate) -> str:
    return " (one seed)" if found.error is None else f" ± {found.error:.1f} ({found.seeds} seeds)"
