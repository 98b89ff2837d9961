"""Weighted sums of adapters, as one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from .config import is_number, is_positive_int
from .layers.base import DeltaLayer, adapter_parameters, check_adapter_name, refuse_merged
from .layers.linear import DeltaLinear
from .ops.low_rank import Factored, concat_factors, nearest, total, without_idle
from .ops.terms import sum_of

TYPES = ("cat", "svd")


@dataclass
class Combined:
    """`sum_i w_i * delta_i` over adapters, by module name.

    Attributes:
        low_rank: of linear layers, as one pair of factors.
        dense: dense deltas, (out_features, in_features).
        biases: (out_features,).
        norms: of norms' weights, (features,).
    """

    low_rank: dict[str, Factored] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All modules that have something."""
        return {*self.low_rank, *self.dense, *self.biases, *self.norms}

    def acting(self) -> Combined:
        """The same without what is zero: ranks, and biases as a whole."""
        low_rank = {name: without_idle(pair) for name, pair in self.low_rank.items()}
        return Combined(
            {name: pair for name, pair in low_rank.items() if pair.rank},
            self.dense,
            {name: bias for name, bias in self.biases.items() if bool(bias.any())},
            self.norms,
        )


def check_combination(
    known: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """Refuse a call of `add_weighted_adapter` before anything is made.

    Raises:
        ValueError: unknown or missing adapters, a name that is taken, another type of combination.
    """
    missing = [adapter for adapter in adapters if adapter not in known]
    if missing or not adapters or len(set(adapters)) < len(adapters):
        raise ValueError(
            f"adapters must be different names of adapters of the model {list(known)}, got {list(adapters)}."
        )
    if len(weights) != len(adapters) or not all(is_number(weight) for weight in weights):
        raise ValueError(f"weights must be one finite number for each of {len(adapters)} adapters, got {weights!r}.")
    check_adapter_name(name)
    if name in known:
        raise ValueError(f"adapter_name must be a new name, got {name!r}, which is there: delete_adapter({name!r}).")
    if combination_type not in TYPES:
        raise ValueError(
            f"combination_type must be one of {TYPES}, got {combination_type!r}, which combines the factors of LoRA "
            "one by one and not the updates that they make. combination_type='cat' is their exact sum."
        )
    if svd_rank is not None and (combination_type != "svd" or not is_positive_int(svd_rank)):
        raise ValueError(
            "svd_rank must be None, or a whole number of at least 1 with combination_type='svd', got "
            f"{svd_rank!r} with {combination_type!r}."
        )


def combine(
    layers: Mapping[str, DeltaLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None = None,
) -> Combined:
    """Weighted sum of the deltas of adapters.

    Args:
        layers: of the model, by name.
        combination_type: "cat": factors are put side by side, exact; "svd": the nearest pair of rank `svd_rank` (None:
            the largest rank that an adapter has there). Dense deltas, biases and norms are summed in both.
    """
    found = Combined()
    for name, layer in layers.items():
        own = [
            (adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if layer.has_adapter(adapter)
        ]
        if not own:
            continue
        if isinstance(layer, DeltaLinear):
            _combine_weights(found, name, layer, own, combination_type, svd_rank)
        else:
            deltas = [(layer.get_deltas(adapter), weight) for adapter, weight in own]
            _put(found.norms, name, [d["weight"] * weight for d, weight in deltas if "weight" in d])
            _put(found.biases, name, [d["bias"] * weight for d, weight in deltas if "bias" in d])
    return found


def _combine_weights(
    found: Combined,
    name: str,
    layer: DeltaLinear,
    own: Sequence[tuple[str, float]],
    combination_type: str,
    svd_rank: int | None,
) -> None:
    pairs, dense, biases = [], [], []
    for adapter, weight in own:
        low_rank, deltas = layer.matrices(adapter)
        pairs += [(a, b, factor * weight) for a, b, factor in low_rank]
        dense += [delta * (factor * weight) for delta, factor in deltas]
        bias = layer.bias_delta(adapter)
        biases += [bias.detach() * weight] if bias is not None else []
    if pairs and combination_type == "svd" and (len(pairs) > 1 or svd_rank is not None):
        pair = nearest(total(pairs, []), svd_rank or max(len(a) for a, _, _ in pairs))
        found.low_rank[name] = Factored(pair.a.to(pairs[0][0].dtype), pair.b.to(pairs[0][1].dtype), pair.error)
    elif pairs:
        found.low_rank[name] = concat_factors(pairs)
    _put(found.dense, name, dense)
    _put(found.biases, name, biases)


def _put(target: dict[str, Tensor], name: str, terms: list[Tensor]) -> None:
    whole = sum_of(None, terms)
    if whole is not None:
        target[name] = whole


def add_combined(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """Put the weighted sum of adapters of a tuner on its model as a new adapter; see `PhasedModel`."""
    check_combination(tuner.peft_config, adapters, weights, name, combination_type, svd_rank)
    root: nn.Module = tuner.model
    wrappers = {n: m for n, m in root.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    saved = {n: [a for a in adapters if a in m.modules_to_save] for n, m in wrappers.items()}
    twice = [n for n, owners in saved.items() if len(owners) > 1]
    if twice:
        raise ValueError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, but {twice[0]} "
            f"belongs to several of {list(adapters)}: no one head does what the others do. Use them together in a "
            "mixed batch (adapter_names=[...]), or combine adapters of a model without a new head."
        )
    layers = {n: m for n, m in root.named_modules() if isinstance(m, DeltaLayer)}
    refuse_merged(layers.values())
    found = combine(layers, adapters, weights, combination_type, svd_rank)
    config, found = tuner._config_of_sum([tuner.peft_config[adapter] for adapter in adapters], found)
    config.modules_to_save = sorted({n for a in adapters for n in tuner.peft_config[a].modules_to_save or ()}) or None
    tuner.peft_config[name] = config
    try:
        tuner.inject_adapter(root, name)
        set_additional_trainable_modules(root, config, tuner.get_model_config(root), name, activate_adapter=False)
        with torch.no_grad():
            for module, owners in saved.items():
                if owners:
                    copies = wrappers[module].modules_to_save
                    copies[name].load_state_dict(copies[owners[0]].state_dict())
            tuner._take_sum(name, found)
    except BaseException:
        with suppress(Exception):
            tuner.delete_adapter(name)
        tuner.peft_config.pop(name, None)
        raise
    for parameter in adapter_parameters(root, name):
        parameter.requires_grad_(False)
