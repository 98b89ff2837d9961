"""What an adapter adds, module by module, in the form that a LoRA adapter wants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PhasedConfig
from ..layers.base import DeltaLayer, parameter_at, refuse_merged
from ..ops.low_rank import Factored, concat_factors, nearest, total, without_idle
from ..structure.modules import linear_names
from ..structure.weights import for_float64, sizes

Values = Mapping[str, Tensor]


def config_of(root: nn.Module, adapter: str) -> PhasedConfig:
    """Config of an adapter; ValueError if the model has no such one of ours, NotImplementedError if no LoRA could be
    it."""
    configs: Mapping[str, Any] = getattr(root, "peft_config", {})
    ours = [name for name, config in configs.items() if isinstance(config, PhasedConfig)]
    if adapter not in ours:
        raise ValueError(f"adapter_name must be one of this package's adapters in the model {ours}, got {adapter!r}.")
    if configs[adapter].unmergeable:
        raise NotImplementedError(configs[adapter].unmergeable)
    return configs[adapter]


def checked_rank(rank: float | None) -> float | None:
    """The rank that a user gave as None, int or float; ValueError if it is none that could be."""
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    share = isinstance(rank, Real) and not isinstance(rank, Integral)
    if rank is None or (whole and rank >= 1) or (share and 0 < rank <= 1):
        return int(rank) if whole and rank is not None else rank
    raise ValueError(
        f"rank must be a whole number of at least 1, or a share of the energy in (0, 1] (1.0: all), got {rank!r}."
    )


def refuse_unreadable(modules: Mapping[str, nn.Module], layers: Mapping[str, DeltaLayer]) -> None:
    """Refuse adapters whose values are not there, or that stock LoRA would not compute with."""
    refuse_merged(layers.values())
    for name, layer in layers.items():
        if any(p.is_meta for p in layer.parameters()):
            raise ValueError(
                f"The weights of {name} are offloaded, or on meta. Load the base model on one device first."
            )
        if isinstance(modules.get(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name} is part of a torch.nn.TransformerEncoderLayer, which in eval mode reads weights without "
                "calling their layers: a LoRA there would have no effect. Merge instead: model.merge_and_unload()."
            )


def factors_of(
    layers: Mapping[str, Any], adapter: str, config: PhasedConfig, rank: float | None
) -> tuple[dict[str, Factored], dict[str, Tensor], float]:
    """The update of each linear layer as a pair (rank 1, zeros, where there is none), the biases, and what all pairs
    are still to be multiplied by: the factor of the low-rank updates, where they have one in common."""
    found = {name: (*layer.matrices(adapter), layer.bias_delta(adapter)) for name, layer in layers.items()}
    dense = [name for name, (_, deltas, _) in found.items() if any(bool(delta.any()) for delta, _ in deltas)]
    if dense and rank is None:
        raise ValueError(
            f"{len(dense)} of the {len(found)} linear layers of this {type(config).__name__} have trained dense "
            f"updates (first: {dense[0]}), which no LoRA holds exactly. Say how close it should come: rank=64 (the "
            "rank of each such layer) or rank=0.99 (the share of each update's energy to keep)."
        )
    factors = {factor for low_rank, _, _ in found.values() for _, _, factor in low_rank}
    scaling = factors.pop() if len(factors) == 1 and not dense else 1.0
    pairs: dict[str, Factored] = {}
    biases: dict[str, Tensor] = {}
    for name, (low_rank, deltas, bias) in found.items():
        if name in dense:
            assert rank is not None
            pair = nearest(total(low_rank, deltas), rank)
        else:
            unscaled = [(a, b, 1.0 if factor == scaling else factor) for a, b, factor in low_rank]
            pair = without_idle(concat_factors(unscaled)) if low_rank else _zeros(layers[name])
        pairs[name] = pair if pair.rank else _zeros(layers[name])
        if bias is not None:
            biases[name] = bias.detach()
    return pairs, biases, scaling


def _zeros(layer: nn.Module) -> Factored:
    like, (in_features, out_features) = next(layer.parameters()), sizes(layer)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device": like.device}
    return Factored(torch.zeros(1, in_features, **options), torch.zeros(out_features, 1, **options))


def nothing_on_one_layer(root: nn.Module) -> dict[str, Factored]:
    """Zeros for the first linear layer: a LoRA adapter has at least one target."""
    modules, names = dict(root.named_modules()), linear_names(root)
    if not names:
        raise ValueError("The model has no linear layer that a LoRA adapter could be put on.")
    return {names[0]: _zeros(modules[names[0]])}


@dataclass(frozen=True)
class Whole:
    """A module that is stored whole.

    Attributes:
        values: its parameters and buffers.
        error: `||stored - base - delta|| / ||delta||`, which a base of half precision rounds.
    """

    values: Values
    error: float = 0.0


def whole_module(layer: DeltaLayer, adapter: str) -> Whole | None:
    """The module behind a layer at its parameters plus the adapter's deltas; None where they are all zero."""
    base: Any = layer.get_base_layer()
    values, lost, moved = dict(base.state_dict()), 0.0, 0.0
    for key, delta in layer.effective_deltas(adapter).items():
        exact = parameter_at(base, key).detach() + delta  # in the wider of both types, as the layer sums
        values[key] = layer.sum_with(base, key, delta, 1)
        lost += float((for_float64(values[key]).double() - for_float64(exact).double()).square().sum())
        moved += float(for_float64(delta).double().square().sum())
    return Whole(values, math.sqrt(lost / moved)) if moved > 0 else None


def padded(pair: Factored, rank: int) -> Factored:
    """The same product at a larger rank."""
    more = rank - pair.rank
    a = torch.cat([pair.a, pair.a.new_zeros(more, pair.a.shape[1])])
    return Factored(a, torch.cat([pair.b, pair.b.new_zeros(len(pair.b), more)], dim=1), pair.error)


def refuse_to_lose(config: PhasedConfig, biases: Mapping[str, Tensor], whole: Mapping[str, Whole]) -> None:
    """ValueError where a server of A and B alone would drop something, with what and how much."""
    lost, fields = [], []
    trained = {name: bias for name, bias in biases.items() if bool(bias.any())}
    if trained:
        count = sum(bias.numel() for bias in trained.values())
        lost.append(f"biases of linear layers ({count:,} parameters in {len(trained)}; first: {next(iter(trained))})")
        fields.append("train_biases=False")
    if whole:
        count = sum(value.numel() for own in whole.values() for value in own.values.values())
        first = ", ".join(list(whole)[:3])
        lost.append(f"what is stored whole ({count:,} parameters in {len(whole)} modules; first: {first})")
        fields += [f"{name}=False" for name in ("train_norms", "train_embeddings") if hasattr(config, name)]
    if lost:
        without = f", or train without them: {type(config).__name__}({', '.join(fields)})" if fields else ""
        raise ValueError(
            f"strict_serving: servers that take A and B of linear layers alone would lose {', and '.join(lost)}. "
            "Serve the merged model instead (model.merge_and_unload()), load an export without strict_serving with "
            f"PEFT{without}."
        )
