"""What is kept of scored units: counts, budgets, ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_learners.far.selection import highest, kept_count
from peft_learners.nas_lora.budget import budget_path, within_budget


@pytest.mark.parametrize(
    "ratio,nodes,count",
    [(0.1, 3072, 307), (0.1, 768, 77), (0.1, 1536, 154), (0.5, 5, 3), (0.0, 7, 0), (1.0, 7, 7), (0.01, 10, 0)],
)
def test_kept_count(ratio, nodes, count):
    """Counts are rounded to the nearest, halves up."""
    assert kept_count(ratio, nodes) == count


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.data())
@settings(deadline=None, max_examples=80)
def test_highest(scores, data):
    """The highest scores are kept, and of equal ones the lower index."""
    count = data.draw(st.integers(0, len(scores)))
    kept = highest(torch.tensor(scores, dtype=torch.float64), count).tolist()
    by_hand = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
    assert kept == by_hand


def test_highest_not_finite():
    """Scores that aren't finite are refused."""
    with pytest.raises(ValueError, match="not finite"):
        highest(torch.tensor([1.0, float("nan")]), 1)


def remove_one_by_one(scores: list[float], costs: list[int], budget: int) -> list[bool]:
    """The rule in words: what alone is too expensive goes first; then, while too much is kept, the lowest score; of
    equal ones that of the higher index."""
    kept = {i for i in range(len(scores)) if costs[i] <= budget}
    while sum(costs[i] for i in kept) > budget:
        kept.remove(min(kept, key=lambda i: (scores[i], -i)))
    return [i in kept for i in range(len(scores))]


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=25),
    st.integers(0, 120),
)
@settings(deadline=None, max_examples=150)
def test_within_budget(units, budget):
    """The lowest scores go first, until the budget holds."""
    scores, costs = [float(s) for s, _ in units], [c for _, c in units]
    kept = within_budget(torch.tensor(scores), torch.tensor(costs), budget)
    assert kept.tolist() == remove_one_by_one(scores, costs, budget)
    alike = within_budget(torch.tensor(scores), 4, budget)
    assert alike.tolist() == remove_one_by_one(scores, [4] * len(scores), budget)


def test_within_budget_not_finite():
    """Scores that aren't finite are refused."""
    with pytest.raises(ValueError, match="not finite"):
        within_budget(torch.tensor([1.0, float("inf")]), 1, 1)


@pytest.mark.parametrize(
    "space,budget,rounds,path",
    [
        (1000, 10, 1, [10]),
        (1000, 10, 2, [100, 10]),  # ratio 1/10
        (4096, 64, 3, [1024, 256, 64]),  # ratio 1/4
        (100, 100, 3, [100, 100, 100]),
    ],
)
def test_budget_path(space, budget, rounds, path):
    """Budgets of rounds follow a geometric path."""
    assert budget_path(space, budget, rounds) == path
