"""The end of a search: what is kept, and its rewind."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

from ..allocation import budget_path, within_budget
from ..boundary import agreed, live_optimizers, resize
from ..discovery import new_head
from ..saved_modules import rewind_saved_modules
from ..schedule import ScheduleError
from .config import NASLoRAConfig
from .initial import generator_of, shuffled
from .layer import NASLoRALayer, kept_of, layers_of, space_of

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
