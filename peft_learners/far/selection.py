"""Scores of nodes in, which are kept out. Tensors only. Exact, with a stated rule for ties."""

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
