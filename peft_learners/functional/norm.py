"""Norms at other values of their weight and bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    parameters gave wrong output); every other kind by `functional_call`, so that its own formula holds (Gemma's
    `1 + weight`, MobileBERT's NoNorm).

    Args:
        x: (..., features).
        weight: (features,); bias: (features,) or None.
    """
    # A half-precision norm with float32 deltas is computed in float32: its own weight would swallow small deltas.
    dtype, widest = x.dtype, weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
    wide = widest != base.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if bias is not None:  # a delta on one of them alone may have widened it
        weight, bias = weight.to(widest), bias.to(widest)
    if wide:
        x = x.to(widest)
    if type(base) is nn.LayerNorm:
        out = F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    elif type(base) is nn.RMSNorm:
        out = F.rms_norm(x, base.normalized_shape, weight, base.eps)
    else:
        out = _by_its_own_formula(base, x, weight, bias, *args, **kwargs)
    return out.to(dtype) if wide else out


def _by_its_own_formula(
    base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: object, **kwargs: object
) -> Tensor:
    """The norm by its own forward pass, which is a few passes over x: done again in backward, so that x alone is kept.

    Otherwise a weight that trains would have the normalised x kept too, which the frozen norm does not need.
    """

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(base, values, (x, *args), kwargs)

    # A compiler decides by itself what to keep, and function transforms take no hooks on what is saved.
    if not weight.requires_grad or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return call(x, weight, bias)
    return checkpoint(call, x, weight, bias, use_reentrant=False, preserve_rng_state=False)
