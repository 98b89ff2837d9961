"""The arithmetic of the layers, apart from modules and adapters. Shapes are stated.

A linear layer with updates is `y = x W'^T + b`, `W' = W + sum_j c_j D_j + sum_k s_k B_k A_k`. Let T be the number of
rows of x (all leading dimensions), d and h the in and out features, N = d h, r the ranks' sum, rho = r (d + h) / N.
There are two paths to the same values and gradients:

- *separate path*: the terms are computed one after the other; nothing of W's size is formed.
- *effective weight*: W' is formed, used in one product, and dropped; backward forms it again, so that x alone is kept.

`wants_effective_weight` picks by shape only. What trains has no influence on the path of the forward pass, so an
adapter gives the same bits in each of its phases, and after it was saved and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LowRank = tuple[Tensor, Tensor, float]
Dense = tuple[Tensor, float]


def wants_effective_weight(rows: int, in_features: int, out_features: int) -> bool:
    """Whether forming W' pays.

    Per unit of rank, forming `B A` costs `2 d h` flops, and carrying x through A and B costs `2 T (d + h)`; a dense
    update costs `2 d h` (to add) against `2 T d h`. Both are cheaper to form once `T > d h / (d + h)`.

    Args:
        rows: T.
    """
    return rows * (in_features + out_features) > in_features * out_features


def effective_weight(weight: Tensor, low_rank: Sequence[LowRank], dense: Sequence[Dense]) -> Tensor:
    """`W + sum_j c_j D_j + sum_k s_k B_k A_k`: (out_features, in_features). W itself is not written to."""
    for delta, factor in dense:
        weight = torch.add(weight, delta, alpha=factor)
    for a, b, factor in low_rank:
        weight = torch.addmm(weight, b, a, alpha=factor)
    return weight


def separate_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Sequence[LowRank], dense: Sequence[Dense] = ()
) -> Tensor:
    """`x W^T + b + sum_k s_k (x A_k^T) B_k^T + sum_j c_j x D_j^T`, term by term.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        low_rank: triples `(A, B, s)` with A (r, in_features), B (out_features, r), s a factor.
        dense: pairs `(D, c)` with D (out_features, in_features), c a factor.

    Returns:
        (..., out_features).

    Cost: forward `2 T N (1 + rho + number of dense updates)` flops; keeps x and each (T, r) product.
    """
    out = F.linear(x, weight, bias)
    flat = out.reshape(-1, out.shape[-1])
    for a, b, factor in low_rank:
        middle = F.linear(x, a)
        flat = torch.addmm(flat, middle.reshape(-1, middle.shape[-1]), b.t(), alpha=factor)
    for delta, factor in dense:
        flat = torch.addmm(flat, x.reshape(-1, x.shape[-1]).to(flat.dtype), delta.t(), alpha=factor)
    return flat.view_as(out)


class _EffectiveLinear(torch.autograd.Function):
    """`x W'^T + b` with `W' = W + c D + s B A`, keeping x (and references to the parameters) for backward.

    x is (T, d) here: flattened by the caller, so that the output is no view and may be written to in place.

    Gradients, with g the gradient of y as (T, h):
        dx = g W';  db = sum of g's rows
        if D (or W) trains:  G = g^T x,  dD = c G,  dA = s B^T G,  dB = s G A^T
        else:                dA = s (g B)^T x,  dB = s g^T (x A^T)

    Flops: forward `2 T N + 2 N r`; backward `2 T N + 2 N r` for dx, and `2 T N + 4 N r` or `4 rho T N` for the rest.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        delta: Tensor | None,
        low_factor: float,
        dense_factor: float,
    ) -> Tensor:
        full = _full(weight, a, b, delta, low_factor, dense_factor)
        return F.linear(x, full.to(x.dtype), bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, a, b, delta, ctx.low_factor, ctx.dense_factor = inputs
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.save_for_backward(x, weight, a, b, delta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, delta = ctx.saved_tensors
        s, c = ctx.low_factor, ctx.dense_factor
        needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_delta = ctx.needs_input_grad[:6]
        dx = dw = db = da = d_b = ddelta = None
        if needs_x:
            full = _full(weight, a, b, delta, s, c).to(g.dtype)
            dx = g @ full
        if needs_bias:
            db = g.sum(0).to(ctx.bias_dtype)
        if needs_weight or needs_delta:
            product = (g.t() @ rows).to(weight.dtype)
            dw = product if needs_weight else None
            ddelta = (product if c == 1 else product * c) if needs_delta else None
            da = (b.t() @ product) * s if needs_a else None
            d_b = (product @ a.t()) * s if needs_b else None
        else:
            da = ((g @ b.to(g.dtype)).t() @ rows).to(a.dtype) * s if needs_a else None
            d_b = (g.t() @ (rows @ a.to(g.dtype).t())).to(b.dtype) * s if needs_b else None
        return dx, dw, db, da, d_b, ddelta, None, None


def _full(
    weight: Tensor, a: Tensor | None, b: Tensor | None, delta: Tensor | None, low_factor: float, dense_factor: float
) -> Tensor:
    low_rank = [(a, b, low_factor)] if a is not None and b is not None else []
    return effective_weight(weight, low_rank, [(delta, dense_factor)] if delta is not None else [])


def effective_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Sequence[LowRank], dense: Sequence[Dense] = ()
) -> Tensor:
    """The same as `separate_linear` by the effective weight; see `_EffectiveLinear` for gradients and costs.

    Under autocast the sum W' is formed in the parameters' own type and then cast, as autocast casts a weight.
    """
    a, b, low_factor = low_rank[0] if low_rank else (None, None, 1.0)
    if len(low_rank) > 1:  # several adapters are one of the ranks' sum
        a = torch.cat([a for a, _, _ in low_rank])
        b, low_factor = torch.cat([b * factor for _, b, factor in low_rank], dim=1), 1.0
    delta, dense_factor = dense[0] if dense else (None, 1.0)
    if len(dense) > 1 and delta is not None:
        delta, dense_factor = effective_weight(delta * dense_factor, (), dense[1:]), 1.0
    return apply_to_rows(
        lambda rows: _EffectiveLinear.apply(rows, weight, bias, a, b, delta, low_factor, dense_factor), x, weight
    )


def apply_to_rows(function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """`function` of x as (rows, in_features), given back in x's leading shape: (..., out_features).

    Under autocast `function` runs without it, on rows in the type that autocast would cast them to (double precision
    is left alone, as there). It must cast its weights to the type of its rows.

    Args:
        weight: the layer's weight, whose type x must have where there is no autocast.
    """
    rows, device = x.reshape(-1, x.shape[-1]), x.device.type
    if not torch.is_autocast_enabled(device):
        if x.dtype != weight.dtype:
            F.linear(x, weight)  # raises, as the layer without updates does
        out = function(rows)
    else:
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            out = function(rows.to(dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


def linear_with_updates(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Sequence[LowRank], dense: Sequence[Dense] = ()
) -> Tensor:
    """`x W'^T + b` by the path that is cheaper at this shape; arguments as for `separate_linear`."""
    out_features, in_features = weight.shape
    rows = x.numel() // max(1, in_features)
    path = effective_linear if wants_effective_weight(rows, in_features, out_features) else separate_linear
    return path(x, weight, bias, low_rank, dense)


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
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        out = torch.func.functional_call(base, values, (x, *args), kwargs)
    return out.to(dtype) if wide else out
