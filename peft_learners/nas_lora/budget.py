"""Scores in, what is kept out. Tensors only: no modules, no adapters. Exact, with a stated rule for ties."""

from __future__ import annotations

import logging
import math
import warnings

import torch
from torch import Tensor, nn

from ..phases.ddp import agreed
from ..phases.optimizer import live_optimizers, resize
from ..phases.schedule import ScheduleError
from ..structure.modules import new_head
from .config import NASLoRAConfig
from .layer import NASLoRALayer, kept_of, layers_of, space_of
from .rewind import generator_of, rewind_saved_modules, shuffled


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


logger = logging.getLogger("peft_learners")


def prune(root: nn.Module, adapter: str, config: NASLoRAConfig, round_: int) -> None:
    """Keep what fits the budget of a round, at its initial values; the head goes back to its own. On all ranks alike.

    Args:
        round_: counted from 1.

    Raises:
        ScheduleError: the search has gathered no scores.

    Source: arXiv 2305.16597, sections 3.1 and 3.2.
    """
    layers = layers_of(root, adapter)
    space = space_of(layers, adapter)
    budget = budget_path(space, config.budget_in(space), config.rounds)[round_ - 1]
    scored = [(layer, part) for layer in layers.values() for part, _ in layer.scored(adapter)]
    scores = _unit_scores(adapter, config, scored, round_)
    costs = [
        torch.full((len(own),), layer.nas_lora_space[adapter].cost(part))
        for (layer, part), own in zip(scored, scores, strict=True)
    ]
    mask = within_budget(torch.cat(scores), torch.cat(costs) if config.granularity == "structured" else 1, budget)
    mask = agreed(root, {"kept": mask.to(torch.uint8)})["kept"].bool().cpu()
    nothing = torch.empty(0, dtype=torch.int32)
    positions = {
        id(layer): dict.fromkeys(layer.nas_lora_space[adapter].indexed(), nothing) for layer in layers.values()
    }
    for (layer, part), own in zip(scored, mask.split([len(s) for s in scores]), strict=True):
        positions[id(layer)][part] = layer.kept_positions(adapter)[part][own]
    salt = f"/round {round_}" if config.rewind == "fresh" else ""
    changes = [c for layer in layers.values() for c in layer.take_form(adapter, positions[id(layer)], salt)]
    resize(changes, live_optimizers())
    _rewind_head(root, adapter, config, salt)
    logger.info(
        "adapter %r: %d of %d parameters of the search space are kept (budget %d; the head is not counted)",
        *(adapter, kept_of(layers, adapter), space, budget),
    )


def _unit_scores(
    adapter: str, config: NASLoRAConfig, scored: list[tuple[NASLoRALayer, str]], round_: int
) -> list[Tensor]:
    """Scores of all units, by layer and part, float64 on the CPU."""
    if config.criterion == "random":
        generator = generator_of(config.init_seed, f"random/{round_}")
        counts = [layer.units(adapter, part) for layer, part in scored]
        return [torch.rand(count, dtype=torch.float64, generator=generator) for count in counts]
    elements = [layer.nas_lora_scores.get(adapter, {}).get(part) for layer, part in scored]
    if config.init_weights and not any(own is not None and bool(own.any()) for own in elements):
        raise ScheduleError(
            f"The search has gathered no scores for the adapter {adapter!r}: no optimizer that holds its parameters "
            "has made a step, or all their gradients were zero. (Biases begin at zero, and the first step of a "
            "warm-up has a rate of 0: search for at least three steps.)"
        )
    found = [
        layer.unit_scores(adapter, part, own).cpu() if own is not None else torch.zeros(layer.units(adapter, part))
        for (layer, part), own in zip(scored, elements, strict=True)
    ]
    # What never had a gradient must not outrank what has a negative score.
    last = min(float(scores.min()) for scores in found) - 1
    idle = []
    for (layer, part), own, scores in zip(scored, elements, found, strict=True):
        if own is None:
            scores.fill_(last)
            idle.append(f"{part} of {layer.nas_lora_space[adapter].name}")
    if idle:
        warnings.warn(
            f"{len(idle)} updates of the adapter {adapter!r} (first: {idle[0]}) never had a gradient in the search. "
            "They are pruned first: the model does not use those modules, or reads their weights without a call. "
            "Leave them out with exclude_modules.",
            stacklevel=2,
        )
    return [scores.double() for scores in found]


def _rewind_head(root: nn.Module, adapter: str, config: NASLoRAConfig, salt: str) -> None:
    def fresh(name: str, value: Tensor) -> Tensor:
        return shuffled(value, config.init_seed, f"{name}{salt}")

    rewind_saved_modules(root, adapter, fresh if salt else None, new_head(root))
