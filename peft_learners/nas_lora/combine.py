"""A weighted sum of structured NAS-LoRA adapters, as the architecture of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..weighted_sum import Combined
from .config import NASLoRAConfig


def config_of_sum(
    config: NASLoRAConfig, found: Combined, named: Callable[[set[str]], list[str] | str]
) -> NASLoRAConfig:
    """Config of an adapter that keeps exactly what a sum has, of a search space of its largest rank.

    Args:
        config: of one of the adapters, for what they have in common.
        named: names that match exactly the modules of a set.

    Raises:
        ValueError: the sum is zero.
    """
    if not found.names:
        raise ValueError("add_weighted_adapter: the sum is zero (nothing is kept, or all weights are 0).")
    rank = max((pair.rank for pair in found.low_rank.values()), default=0)
    counts: dict[str, dict[str, list[int]]] = {name: {} for name in sorted(found.names)}
    positions: dict[str, dict[str, torch.Tensor]] = {name: {} for name in counts}
    for name, pair in found.low_rank.items():
        for part, length in (("U", len(pair.b)), ("V", pair.a.shape[1])):
            counts[name][part] = [pair.rank * length, rank * length]
        positions[name]["U"] = torch.arange(pair.rank, dtype=torch.int32)
    for name, bias in found.biases.items():
        counts[name]["bias"] = [len(bias), len(bias)]
        positions[name]["bias"] = torch.zeros(1, dtype=torch.int32)
    summed = replace(
        config,
        init_weights=True,
        r=rank,
        target_modules=named(set(found.low_rank)) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        train_biases=bool(found.biases),
        bias_modules=named(set(found.biases)) or None,
        parameter_budget=sum(kept for parts in counts.values() for kept, _ in parts.values()),
        architecture=counts,
        rounds=1,
        pruned_rounds=1,
        completed_phases=[],
        phase_first_steps=None,
    )
    summed.completed_phases = [phase.name for phase in summed.outline().phases[:-1]]
    summed.kept_positions = positions
    return summed
