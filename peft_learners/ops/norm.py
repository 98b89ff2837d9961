"""Norms, and modules of any other kind, at other values of their parameters, without writing to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .terms import autocasts, is_plain_torch


def norm_with(
    base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: object, **kwargs: object
) -> Tensor:
    """The norm `base` at other values of its weight and bias.

    `nn.LayerNorm` and `nn.RMSNorm` are called by their functions (a `functional_call` under FSDP's original
    parameters gave wrong output); every other kind by itself, so that its own formula holds (Gemma's
    `1 + weight`, MobileBERT's NoNorm).

    Args:
        x: (..., features).
        weight: (features,); bias: (features,) or None.
    """
    # A half-precision norm with float32 deltas is computed in float32: its own weight would swallow small deltas.
    widest = weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
    has_kernel = type(base) in (nn.LayerNorm, nn.RMSNorm)
    own: Any = base.weight.dtype
    wide = widest != own and not (has_kernel and autocasts(x))
    frozen_type = _own_type(base, x, *args, **kwargs) if wide else own

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:  # a delta on one of them alone may have widened it
            weight, bias = weight.to(widest), bias.to(widest)
        out = _norm_at(base, x.to(widest) if wide else x, weight, bias, *args, **kwargs)
        return out.to(frozen_type) if wide else out

    if not is_plain_torch() or not torch.is_grad_enabled():
        # A compiler decides by itself what to keep, and function transforms take no hooks on what is saved.
        return compute(x, weight, bias)
    # Other norms may have their features elsewhere than in the last dimension (GroupNorm, ConvNext's).
    if has_kernel and bias is not None and bias.requires_grad and not (x.requires_grad or weight.requires_grad):
        with torch.no_grad():
            out = compute(x, weight, bias)
        # The gradient of a bias alone needs nothing of x.
        return (out.to(widest) + (bias - bias.detach())).to(out.dtype)
    # Wide copies of x, and the normalised x of norms that torch has no kernel for, are made again in backward: a few
    # passes over x, which is all that is kept. The frozen norm does not need the latter.
    if (weight.requires_grad and not has_kernel) or (wide and (x.requires_grad or weight.requires_grad)):
        return checkpoint(compute, x, weight, bias, use_reentrant=False, preserve_rng_state=False)
    return compute(x, weight, bias)


def _own_type(base: nn.Module, x: Tensor, *args: object, **kwargs: object) -> torch.dtype:
    """Type of what the norm itself gives for x. Models in mixed types rely on it: T5's `wo` may be in float32, and the
    norm behind it brings what follows back to float16."""
    own: Any = base.weight.dtype
    if x.dtype == own or type(base) in (nn.LayerNorm, nn.RMSNorm):
        return torch.promote_types(x.dtype, own)
    with torch.no_grad():
        return base.forward(torch.zeros_like(x[:1]), *args, **kwargs).dtype  # without the norm's hooks


def _norm_at(
    base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: object, **kwargs: object
) -> Tensor:
    if type(base) is nn.LayerNorm:
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    if type(base) is nn.RMSNorm:
        return F.rms_norm(x, base.normalized_shape, weight, base.eps)
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return call_with(base, values, x, *args, **kwargs)


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
    twin = _twin(module, values)
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return twin.forward(*args, **kwargs)  # ZeRO-3's hooks would fetch what has been replaced
    return twin(*args, **kwargs)


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
