"""The arithmetic of the layers, apart from modules and adapters. Shapes are stated; T stands for the token dimensions.

Two paths for a linear layer `y = x (W + sum_k s_k B_k A_k + sum_j c_j D_j)^T + b`:

- *low-rank path*: `F.linear` with W, then `addmm` of the low-rank product. No matrix of W's size is formed.
- *effective weight*: W plus all updates is formed, then one `F.linear`. It is what a dense update wants: while D
  trains its gradient dW is needed anyway, and those of A and B follow from dW at `O(r d h)` instead of `O(T r (d+h))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Sequence[tuple[Tensor, Tensor, float]]
) -> Tensor:
    """`x W^T + b + sum_k s_k (x A_k^T) B_k^T`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        low_rank: triples `(A, B, s)` with A (r, in_features), B (out_features, r), s a factor.

    Returns:
        (..., out_features).
    """
    out = F.linear(x, weight, bias)
    for a, b, factor in low_rank:
        middle = F.linear(x, a)
        flat = torch.addmm(out.reshape(-1, out.shape[-1]), middle.reshape(-1, middle.shape[-1]), b.t(), alpha=factor)
        out = flat.view_as(out)
    return out


def effective_weight(
    weight: Tensor, low_rank: Sequence[tuple[Tensor, Tensor, float]], dense: Sequence[tuple[Tensor, float]]
) -> Tensor:
    """`W + sum_j c_j D_j + sum_k s_k B_k A_k`, all (out_features, in_features); W itself is not written to."""
    for delta, factor in dense:
        weight = torch.add(weight, delta, alpha=factor)
    for a, b, factor in low_rank:
        weight = torch.addmm(weight, b, a, alpha=factor)
    return weight


def sum_of(base: Tensor | None, deltas: Sequence[Tensor]) -> Tensor | None:
    """`base + sum(deltas)`; None if there is neither."""
    for delta in deltas:
        base = delta if base is None else base + delta
    return base


def norm_with(base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, *args: object, **kwargs: object) -> Tensor:
    """The norm `base` at other values of its weight and bias.

    `nn.LayerNorm` and `nn.RMSNorm` are called by their functions (a `functional_call` under FSDP's original
    parameters gave wrong output); every other kind by `functional_call`, so that its own formula holds (Gemma's
    `1 + weight`, MobileBERT's NoNorm).

    Args:
        x: (..., features).
        weight: (features,); bias: (features,) or None.
    """
    wide = weight.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if wide:
        # A half-precision norm with float32 deltas: small deltas would be lost in the half-precision weight.
        dtype, x = x.dtype, x.to(weight.dtype)
    if type(base) is nn.LayerNorm:
        out = F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    elif type(base) is nn.RMSNorm:
        out = F.rms_norm(x, base.normalized_shape, weight, base.eps)
    else:
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        out = torch.func.functional_call(base, values, (x, *args), kwargs)
    return out.to(dtype) if wide else out
