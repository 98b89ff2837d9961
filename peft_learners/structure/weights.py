"""How a module stores its weight: its size, whether it can be read as a float matrix, whether it is at hand."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D


def base_of(module: nn.Module) -> nn.Module:
    """The original module behind tuner layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_plain_float(value: object) -> bool:
    """Whether a tensor holds floating-point numbers as they are.

    Quantised ones may pass for such by their dtype: torchao and quanto report that of the numbers they stand for,
    bitsandbytes that of its storage. They are told by their class. fp8 can't hold a trained sum.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.element_size() < 2:
        return False
    return type(value) in (torch.Tensor, nn.Parameter) or type(value).__name__ == "DTensor"


def shape_of(value: torch.Tensor) -> torch.Size:
    """The shape of a parameter, of which ZeRO-3 may hold a part in each process and show none."""
    return getattr(value, "ds_shape", value.shape)


def float_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer if it is a plain floating-point matrix, else None."""
    weight = getattr(base_of(module), "weight", None)
    return weight if weight is not None and is_plain_float(weight) and len(shape_of(weight)) == 2 else None


def for_float64(values: torch.Tensor) -> torch.Tensor:
    """The values on a device that has float64: where they are, and from MPS on the CPU."""
    return values.cpu() if values.device.type == "mps" else values


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether a weight is made anew from other parameters in each call (weight norm, a parametrization)."""
    older = any(f"{name}_{end}" in module._parameters for end in ("g", "v", "orig"))
    return older or nn.utils.parametrize.is_parametrized(module, name)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere, and fetches them for each of its calls."""
    return getattr(module.__dict__.get("_hf_hook"), "offload", False)


def stored_as(module: nn.Module) -> str:
    """How a module stores its weight, for error messages: a dtype, or the class of tensor or module that hides it."""
    base = base_of(module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return type(base).__name__
    passes_for_float = weight.is_floating_point() and weight.element_size() >= 2
    return type(weight).__name__ if passes_for_float and not is_plain_float(weight) else str(weight.dtype)


def readable_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer as (out_features, in_features), if the layer does nothing but multiply by it.

    None for layers that must be called: quantised, of another class, hooked (offloaded), or wrapped.
    """
    if type(module) not in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "_hf_hook" in module.__dict__ or "forward" in module.__dict__ or any(hooks):
        return None
    weight = float_weight(module)
    return weight.t() if weight is not None and isinstance(module, Conv1D) else weight


def sizes(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear layer."""
    base = base_of(module)
    into, out = _get_in_out_features(base)
    return int(into or 0), int(out or 0)
