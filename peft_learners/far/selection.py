"""Which nodes go on training: how far each has moved, and the choice, exact and with a stated rule for ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..phases.schedule import ScheduleError
from ..structure.weights import for_float64
from .config import FARConfig
from .plan import Nodes


def select_nodes(
    config: FARConfig, adapter: str, moved: Mapping[str, Sequence[tuple[Tensor, Nodes]]]
) -> dict[str, Tensor]:
    """Nodes to keep of each unit, ascending; of nodes that moved equally far, those of lower index.

    Args:
        moved: for each unit the deltas of its weights, and how its nodes lie in them.

    Raises:
        ScheduleError: no delta has moved.
    """
    generator = torch.Generator("cpu").manual_seed(config.seed)
    selections, any_moved = {}, config.selection == "random" or not config.init_weights
    for unit, members in moved.items():
        width = members[0][1].width
        count = kept_count(config.retention_ratio, width)
        if config.selection == "random":
            selections[unit] = drawn(width, count, generator)
            continue
        scores = torch.stack([movement(config.selection, *member).cpu() for member in members]).sum(0)
        any_moved = any_moved or bool(scores.any())
        selections[unit] = highest(scores, count)
    if not any_moved:
        raise ScheduleError(
            f"Priming moved no FFN weight of the adapter {adapter!r}, so nodes can't be ranked. Was the learning "
            "rate 0, as in the first step of a warm-up? Prime for longer, FARConfig(priming_steps=...), or do "
            "without a ranking: FARConfig(selection='random')."
        )
    return selections


def movement(selection: str, delta: Tensor, nodes: Nodes) -> Tensor:
    """How far each node's weights have moved: `sum |D|` ("l1") or `sum |D|^2` ("l2"), (width,), in float64."""
    size = for_float64(delta).abs().pow(1 if selection == "l1" else 2)
    return size.sum(1 - nodes.axis, dtype=torch.float64).view(nodes.copies, nodes.width).sum(0)


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
    return torch.randperm(nodes, generator=generator, device="cpu")[:count].sort().values
