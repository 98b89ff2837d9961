"""Scores in, what is kept out. Tensors only: no modules, no adapters. Exact, with a stated rule for ties."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_count(ratio: float, nodes: int) -> int:
    """Number of nodes that `ratio` of `nodes` keeps: rounded to the nearest, halves up (307.2 -> 307, 76.8 -> 77).

    Args:
        ratio: retention ratio in [0, 1].
        nodes: number of nodes of one layer.
    """
    return min(nodes, math.floor(ratio * nodes + 0.5))


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, in ascending order of index. Of equal scores the lower index wins.

    Args:
        scores: (nodes,), finite.

    Returns:
        (count,) int64, on the scores' device.

    Raises:
        ValueError: a score that is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("Some scores are not finite: the weights they come from hold NaN or infinity.")
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def drawn(nodes: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `nodes` indices, each set equally likely, in ascending order: (count,) int64 on the CPU."""
    return torch.randperm(nodes, generator=generator)[:count].sort().values


def within_budget(scores: Tensor, costs: Tensor | int, budget: int) -> Tensor:
    """Which units are kept if the lowest scores are removed first, one by one, until the budget holds.

    Of equal scores the higher index is removed first. Units that alone cost more than the budget can't be part of any
    choice and are removed before all others. Nothing is put back afterwards: a cheap unit with a lower score than an
    expensive one that was removed goes too, even if it would fit.

    Args:
        scores: (units,), finite.
        costs: parameters of each unit, (units,) of whole numbers of at least 1, or one number for all.
        budget: parameters that may be kept, at least 0.

    Returns:
        (units,) bool: their costs sum to at most `budget`, and to more than that with the unit removed last.

    Raises:
        ValueError: a score that is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("Some scores are not finite: the gradients they come from hold NaN or infinity.")
    order = torch.sort(scores, descending=True, stable=True).indices
    if isinstance(costs, int):
        count = min(len(scores), budget // costs)
    else:
        order = order[costs[order] <= budget]
        count = int((costs[order].cumsum(0) <= budget).sum())
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[order[:count]] = True
    return kept


def budget_path(space: int, budget: int, rounds: int) -> list[int]:
    """Budgets of iterative pruning: from `space` to `budget` in `rounds` steps of one ratio (a geometric path).

    Returns:
        `rounds` whole numbers that do not increase, the last of which is `budget`.
    """
    ratio = (budget / space) ** (1 / rounds)
    return [max(budget, math.floor(space * ratio**step + 0.5)) for step in range(1, rounds)] + [budget]
