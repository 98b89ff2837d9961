"""An adapter's file: in full, or what is kept with its positions; during a search, scores beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..checkpoint import Indices, Shapes, warn_not_finite
from .config import CONTAINERS
from .layer import NASLoRALayer

Layers = Mapping[str, NASLoRALayer]
_POSITIONS, _SCORES = "_positions", "_scores"


def is_pruned_file(state_dict: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(_POSITIONS) and ".nas_lora_" in key for key in state_dict)


def shapes_in_form_of(layers: Layers, adapter: str, state_dict: Mapping[str, Tensor]) -> Shapes:
    """What a file must hold to fit the adapter in the form that this file has."""
    pruned, shapes = is_pruned_file(state_dict), Shapes()
    for name, layer in layers.items():
        space = layer.nas_lora_space[adapter]
        for part in space.shapes:
            key = f"{name}.{layer.file_key(CONTAINERS[part])}"
            positions = state_dict.get(f"{name}.nas_lora_{space.index_of(part)}{_POSITIONS}")
            if not pruned:
                shapes[key] = space.shapes[part]
            elif positions is not None or key in state_dict:
                units = positions.numel() if positions is not None else 0
                shapes[key] = space.shape(part, units)
                if part == space.index_of(part):
                    shapes[f"{name}.nas_lora_{part}{_POSITIONS}"] = (units,)
    return shapes


def position_indices(layers: Layers, adapter: str) -> dict[str, Indices]:
    """What the positions in a file must be, by name."""
    return {
        f"{name}.nas_lora_{part}{_POSITIONS}": Indices(name, f"positions of {part}", space.whole(part))
        for name, layer in layers.items()
        for space in [layer.nas_lora_space[adapter]]
        for part in space.indexed()
    }


def check_scores(adapter: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse scores in a file that are not those of its values.

    Raises:
        ValueError: scores without a value, of another shape, or that are no numbers.
    """
    values = {f"nas_lora_{part}{_SCORES}": container for part, container in CONTAINERS.items()}
    rest = without_scores(state_dict)
    scores = {key: value for key, value in state_dict.items() if key not in rest}
    for key, value in scores.items():
        module, _, last = key.rpartition(".")
        of = state_dict.get(f"{module}.{values.get(last)}.{'bias' if '_bias_' in last else 'weight'}")
        if of is None or of.shape != value.shape or not value.is_floating_point():
            right = "no such scores" if of is None else f"floating-point numbers of shape {tuple(of.shape)}"
            raise ValueError(
                f"The checkpoint does not fit the adapter {adapter!r}: {key} must be {right}, got {value.dtype} of "
                f"shape {tuple(value.shape)}. Nothing was loaded."
            )
    warn_not_finite(adapter, scores)


def scores_of(layers: Layers, adapter: str) -> dict[str, Tensor]:
    """The scores of a search under way, by names for a file."""
    return {
        f"{name}.nas_lora_{part}{_SCORES}": scores
        for name, layer in layers.items()
        for part, scores in layer.nas_lora_scores.get(adapter, {}).items()
    }


def without_scores(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: v for key, v in state_dict.items() if not (key.endswith(_SCORES) and ".nas_lora_" in key)}


def take_scores(layers: Layers, adapter: str, state_dict: Mapping[str, Tensor], keep: bool) -> None:
    """Give layers the scores of a file, if it has some, in place of their own.

    Args:
        keep: False: let go of all.
    """
    for name, layer in layers.items():
        layer.nas_lora_scores.pop(adapter, None)
        scores = {
            part: state_dict[key].to("cpu" if theta.is_meta else theta.device)
            for part, theta in layer.scored(adapter)
            if (key := f"{name}.nas_lora_{part}{_SCORES}") in state_dict
        }
        if scores and keep:
            layer.nas_lora_scores[adapter] = scores
