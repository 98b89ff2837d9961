"""Norms at other values of their weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .call import call_with
from .terms import autocasts, is_plain_torch


def sum_of(base: Tensor | None, deltas: Sequence[Tensor]) -> Tensor | None:
    """`base + sum(deltas)`; None if there is neither."""
    for delta in deltas:
        base = delta if base is None else base + delta
    return base


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
