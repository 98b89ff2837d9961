"""How much each parameter of a search space matters, gathered while it trains, and what of it fits a budget.

Source: arXiv 2305.16597, sections 3.1 and 3.2.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..phases.ddp import broadcast_choice
from ..phases.driver import Training
from ..phases.optimizer import Observer
from ..phases.schedule import ScheduleError
from ..phases.shards import assembled, is_in_deepspeed, is_sharded, piece_of, split
from .config import NASLoRAConfig
from .layer import NASLoRALayer, kept_of, layers_of, space_of
from .rewind import generator_of, rewind_saved_modules

logger = logging.getLogger("peft_learners")


def _unscaled(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor] | None:
    """The gradients as the optimizer is about to use them; None if it is about to skip the step.

    A fused optimizer is handed scaled gradients by GradScaler, with the scale beside them.
    """
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return None
    return gradients if scale is None else [gradient / scale.to(gradient.device) for gradient in gradients]


class Gatherer(Observer):
    """Adds up the scores of an adapter's parameters, one optimizer step after the other.

    Before a step with gradient g (of the whole step: accumulated, averaged over ranks, unscaled and clipped) each
    parameter theta scores `-theta * g`, the first-order change of the loss if it were pruned; for the criterion
    "magnitude", `|theta|`. Scores are summed over the steps, which ranks as their mean does, or only the last step's
    are kept. What an engine has split is scored where it lies.
    """

    def __init__(self, layers: Sequence[NASLoRALayer], adapter: str, magnitude: bool, last: bool) -> None:
        self._layers, self._adapter, self._magnitude, self._last = list(layers), adapter, magnitude, last
        #: By layer and part: the parameter and this process's scores of it, where it has a piece.
        self._pieces: dict[tuple[NASLoRALayer, str], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        scores, thetas, gradients = [], [], []
        for layer in self._layers:
            for part, theta in layer.scored(self._adapter):
                piece = piece_of(theta, optimizer)
                if piece is not None:
                    scores.append(self._scores(layer, part, theta, piece.value))
                    thetas.append(piece.value)
                    gradients.append(piece.gradient)
        unscaled = _unscaled(optimizer, gradients) if scores else None
        if unscaled is None:
            return
        if self._last:
            torch._foreach_zero_(scores)
        if any(theta.dtype != score.dtype for theta, score in zip(thetas, scores, strict=True)):
            thetas, unscaled = [t.float() for t in thetas], [g.float() for g in unscaled]
        if self._magnitude:
            torch._foreach_add_(scores, torch._foreach_abs(thetas))
        else:
            torch._foreach_addcmul_(scores, thetas, unscaled, value=-1)

    def _scores(self, layer: NASLoRALayer, part: str, theta: Tensor, value: Tensor) -> Tensor:
        """The scores to add to, of the entries in `value`."""
        own = layer.nas_lora_scores[self._adapter]
        if is_sharded(theta) or is_in_deepspeed(theta):
            if (layer, part) not in self._pieces:
                begun = split(theta, own[part]) if part in own else torch.zeros_like(value, dtype=torch.float32)
                self._pieces[layer, part] = theta, begun
            own.pop(part, None)  # a save that nobody has collected for holds none, not those of an earlier step
            return self._pieces[layer, part][1]
        if part not in own:
            own[part] = torch.zeros_like(theta, dtype=torch.float32, requires_grad=False)
        return own[part]

    def collect(self) -> None:
        """Put the scores together of which the processes have pieces. To be called by all of them."""
        # In the order of the model, since each process has begun with its own pieces.
        keys = [(layer, part) for layer in self._layers for part, _ in layer.scored(self._adapter)]
        for layer, part in [key for key in keys if key in self._pieces]:
            theta, piece = self._pieces[layer, part]
            scores = assembled(theta, piece)
            if bool(scores.any()) or is_sharded(theta):  # DeepSpeed has gradients, of zeros, for what had none
                layer.nas_lora_scores[self._adapter][part] = scores


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


def prune(root: nn.Module, adapter: str, config: NASLoRAConfig, round_: int, training: Training) -> None:
    """Keep what fits the budget of a round, at its initial values; the head goes back to its own. On all ranks alike.

    Args:
        round_: counted from 1.
        training: whose optimizer is pruned with the parameters, and whose ranks keep the same.

    Raises:
        ScheduleError: the search has gathered no scores.
    """
    layers = layers_of(root, adapter)
    space = space_of(layers, adapter)
    budget = budget_path(space, config.budget_in(space), config.rounds)[round_ - 1]
    scored = [(layer, part) for layer in layers.values() for part, _ in layer.scored(adapter)]
    scores = _unit_scores(adapter, config, scored, round_)
    costs = [
        torch.full((len(own),), layer.nas_lora_space[adapter].cost(part), device=own.device)
        for (layer, part), own in zip(scored, scores, strict=True)
    ]
    mask = within_budget(torch.cat(scores), torch.cat(costs) if config.granularity == "structured" else 1, budget)
    mask = broadcast_choice({"kept": mask.to(torch.uint8)}, training.ranks)["kept"].bool().cpu()
    positions: dict[NASLoRALayer, dict[str, Tensor]] = {layer: {} for layer in layers.values()}
    for (layer, part), own in zip(scored, mask.split([len(s) for s in scores]), strict=True):
        positions[layer][part] = layer.kept_positions(adapter)[part][own]
    salt = f"/round {round_}" if config.rewind == "fresh" else ""
    for layer in layers.values():
        layer.set_kept(adapter, positions[layer], training.optimizer, salt)
    rewind_saved_modules(root, adapter, config.init_seed, salt)
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
        return [torch.rand(count, dtype=torch.float64, generator=generator, device="cpu") for count in counts]
    elements = [layer.nas_lora_scores.get(adapter, {}).get(part) for layer, part in scored]
    if config.init_weights and not any(own is not None and bool(own.any()) for own in elements):
        raise ScheduleError(
            f"The search has gathered no scores for the adapter {adapter!r}: the optimizer that was handed over, "
            "set_schedule(..., optimizer=optimizer), has made no step, or all gradients were zero. (Biases begin at "
            "zero, and the first step of a warm-up has a rate of 0: search for at least three steps.)"
        )
    found = [
        torch.zeros(layer.units(adapter, part), dtype=torch.float64, device="cpu")
        if own is None
        else layer.unit_scores(adapter, part, own).cpu()
        for (layer, part), own in zip(scored, elements, strict=True)
    ]
    # What never had a gradient must not outrank what has a negative score.
    last = min(float(scores.min()) for scores in found) - 1
    idle = []
    for (layer, part), own, scores in zip(scored, elements, found, strict=True):
        if own is None:
            scores.fill_(last)
            if dict(layer.scored(adapter))[part].requires_grad:  # else someone froze it
                idle.append(f"{part} of {layer.nas_lora_space[adapter].name}")
    if idle:
        warnings.warn(
            f"{len(idle)} updates of the adapter {adapter!r} (first: {idle[0]}) never had a gradient in the search. "
            "They are pruned first. The model may have skipped those modules in each step of the search (layer-drop), "
            "not need them for this task, or read their weights without calling them; in the latter cases leave them "
            "out with exclude_modules.",
            stacklevel=2,
        )
    return [scores.double() for scores in found]
