"""A checkpoint is checked as a whole before any of it is loaded, so that a foreign one leaves the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: `{name as in a file: shape}` of an adapter's values: names in a file are without the adapter's.
Shapes = dict[str, tuple[int, ...]]


def refuse_foreign(expected: Mapping[str, Any], prefix: str, adapter: str, state_dict: Mapping[str, Any]) -> None:
    """Compare the names of an adapter's values in a file with those it should hold.

    Raises:
        ValueError: values are missing, or have no place.
    """
    # An adapter's own name may begin with the prefix, too, and stands in the names of a head's values.
    found = {key for key in state_dict if any(part.startswith(prefix) for part in key.split(".")[-2:])}
    missing, unknown = sorted(set(expected) - found), sorted(found - set(expected))
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(expected)} values are missing (first: {missing[0]})")
    if unknown:
        parts.append(f"{len(unknown)} values have no place in the model (first: {unknown[0]})")
    if parts:
        raise ValueError(_misfit(adapter, "; ".join(parts)))


def refuse_shapes(expected: Shapes, adapter: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Compare the shapes of values in a file with those they should have.

    Raises:
        ValueError: some differ.
    """
    shapes = [
        f"{key}: {tuple(value.shape)} in the file, {expected[key]} in the model"
        for key, value in state_dict.items()
        if key in expected and expected[key] != tuple(value.shape)
    ]
    if shapes:
        raise ValueError(_misfit(adapter, f"{len(shapes)} shapes differ (size mismatch for {shapes[0]})"))


def refuse_other_form(own: Shapes, given: Shapes, adapter: str, strict: bool) -> None:
    """Compare a model's state with the adapter that it is about to be loaded into.

    Args:
        own, given: shapes of the adapter's values, by key, in the model and in the state.
        strict: whether the state must hold all of them.

    Raises:
        ValueError: the state is that of an adapter in another form: of another phase, or of another config.
    """
    parts = []
    unknown = [key for key in given if key not in own]
    missing = [key for key in own if key not in given] if strict else []
    shapes = [key for key in given if key in own and own[key] != given[key]]
    if unknown:
        parts.append(f"{len(unknown)} values have no place in the model (first: {unknown[0]})")
    if missing:
        parts.append(f"{len(missing)} are missing (first: {missing[0]})")
    if shapes:
        key = shapes[0]
        parts.append(f"{len(shapes)} shapes differ (size mismatch for {key}: {given[key]}, {own[key]} in the model)")
    if parts:
        raise ValueError(
            f"The state does not fit the adapter {adapter!r}: {'; '.join(parts)}. Nothing of the adapter was loaded. "
            "It was saved in another phase, or with another config. Load the adapter of that step first, "
            "PeftModel.from_pretrained(base_model, folder, is_trainable=True), and then the state."
        )


def _misfit(adapter: str, what: str) -> str:
    return (
        f"The checkpoint does not fit the adapter {adapter!r}: {what}. Nothing was loaded. Load it with the "
        "adapter_config.json it was saved with (PeftModel.from_pretrained does), on the same base model."
    )
