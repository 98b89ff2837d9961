"""Calling a module at other values of some of its parameters, without writing to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .terms import is_plain_torch


def call_with(module: nn.Module, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Output of a module at other values of some of its parameters, its hooks included.

    `torch.func.functional_call` puts the values into the module and takes them out again, which several threads that
    use one model can't do at once. So a shallow copy is called, and `functional_call` where that won't do: under
    compilers and function transforms, and where someone has put another `forward` on the module itself.

    Args:
        values: by the (dotted) names of the parameters.
    """
    forward = module.__dict__.get("forward")
    # accelerate's goes to the module itself; an offloaded module's hook has been called by the layer already
    offloaded = getattr(module.__dict__.get("_hf_hook"), "offload", False)
    if not is_plain_torch() or (forward is not None and not offloaded):
        return torch.func.functional_call(module, dict(values), args, kwargs)
    return _twin(module, values)(*args, **kwargs)


def _twin(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy with other values; what is not replaced is shared."""
    twin: nn.Module = object.__new__(type(module))  # `copy.copy` is refused by parametrized modules
    twin.__dict__.update(module.__dict__)
    own = {name: value for name, value in values.items() if "." not in name}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        if "." in name:
            child, _, rest = name.partition(".")
            inner.setdefault(child, {})[rest] = value
    for name in ("forward", *own):  # FSDP leaves plain tensors there
        twin.__dict__.pop(name, None)
    twin.__dict__["_parameters"] = {**module._parameters, **own}
    children = {child: _twin(module.get_submodule(child), found) for child, found in inner.items()}
    twin.__dict__["_modules"] = {**module._modules, **children}
    return twin
