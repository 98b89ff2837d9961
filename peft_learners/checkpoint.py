"""A checkpoint is checked as a whole before any of it is loaded, so that a foreign one leaves the model as it was."""

from __future__ import annotations

import torch
from torch import nn


def refuse_foreign(model: nn.Module, prefix: str, adapter: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Compare the names of an adapter's values in a file with those in the model.

    Args:
        prefix: of the tuner's parts.
        state_dict: the file's values, under the model's names.

    Raises:
        ValueError: values are missing, or have no place.
    """
    marker = f".{adapter}"
    own = {key for key in model.state_dict() if f".{prefix}" in key and (key.endswith(marker) or f"{marker}." in key)}
    found = {key for key in state_dict if f".{prefix}" in key}
    missing, unknown = sorted(own - found), sorted(found - own)
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} values are missing (first: {missing[0]})")
    if unknown:
        parts.append(f"{len(unknown)} values have no place in the model (first: {unknown[0]})")
    if parts:
        raise ValueError(_misfit(adapter, "; ".join(parts)))


def refuse_shapes(model: nn.Module, adapter: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Compare the shapes of values in a file with those in the model.

    Raises:
        ValueError: some differ.
    """
    own = model.state_dict()
    shapes = [
        f"{key}: {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
        for key, value in state_dict.items()
        if key in own and own[key].shape != value.shape
    ]
    if shapes:
        raise ValueError(_misfit(adapter, f"{len(shapes)} shapes differ (size mismatch for {shapes[0]})"))


def _misfit(adapter: str, what: str) -> str:
    return (
        f"The checkpoint does not fit the adapter {adapter!r}: {what}. Nothing was loaded. Load it with the "
        "adapter_config.json it was saved with (PeftModel.from_pretrained does), on the same base model."
    )
