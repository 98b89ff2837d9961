"""The separate path: the terms one after the other, summed in one place; nothing of W's size has to be formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .costs import wants_summed_weight
from .terms import (
    Dense,
    Form,
    Pair,
    a_gradient,
    add_product,
    applied,
    apply_to_rows,
    as_one,
    b_gradient,
    factors_of,
    outer_gradient,
    through_factor,
    wide_type,
    without_autocast,
)


class _SeparateLinear(torch.autograd.Function):
    """`x W^T + b + s ((m * x) A^T) B^T + c x D^T`, each term added to the first in its memory.

    x is (T, d), and m, of dropout, a mask (T, d) with a factor, or missing. The base term is computed in the type of
    x, the other terms and the sum in the type `wide`. Kept for backward are x in its own type, the mask (a byte per
    entry) and x A^T: (T, r).

    Gradients, with g the gradient of y as (T, h):
        dx = g W + m * (s (g B) A) + c g D
        dA = s (g B)^T (m * x),  dB = s g^T ((m * x) A^T),  dD = c g^T x,  dW = g^T x,  db = sum of g's rows

    Flops, N = d h, rho N = r (d + h): forward `2 T N + 2 rho T N`, backward `2 T N + 2 rho T N` and `2 T r (d + h)`
    more for dA and dB. With D, `W + c D` is formed in both for more than some tens of rows, else `2 T N` more in each.

    Outputs: y, and x A^T, which is returned because only outputs can be kept.
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
        a_at: Tensor | None,
        b_at: Tensor | None,
        form: Form,
        mask: Tensor | None,
        mask_factor: float,
        wide: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        full, rest = _base_weight(x, weight, delta, form, wide)
        at_once = bias.to(wide) if bias is not None and full.dtype == wide else None
        out = F.linear(x.to(full.dtype), full, at_once).to(wide)
        if bias is not None and at_once is None:
            out = out + bias.to(wide)
        middle = None
        if a is not None and b is not None:
            a, b = factors_of(weight, a, b, a_at, b_at, form)
            middle = _masked(x.to(wide), mask, mask_factor) @ a.to(wide).t()
            out = add_product(out, middle, b.to(wide).t(), form.low_factor)
        if rest is not None:
            out = add_product(out, x.to(wide), rest.to(wide).t(), form.dense_factor)
        return out.to(x.dtype), middle

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, bias, a, b, delta, a_at, b_at, ctx.form, mask, ctx.mask_factor, ctx.wide = inputs
        ctx.bias_dtype = bias.dtype if bias is not None else None
        middle = output[1]
        if middle is not None:
            ctx.mark_non_differentiable(middle)
        _, needs_weight, _, needs_a, needs_b, needs_delta = ctx.needs_input_grad[:6]
        kept = x if needs_weight or needs_a or needs_b or needs_delta else None
        ctx.save_for_backward(kept, weight, a, b, delta, a_at, b_at, mask, middle if needs_b else None)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, a, b, delta, a_at, b_at, mask, middle = ctx.saved_tensors
        form, (needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_delta) = ctx.form, ctx.needs_input_grad[:6]
        s, wide_g = form.low_factor, g.to(ctx.wide)
        dx = dw = d_bias = da = db = ddelta = None
        if needs_x:
            full, rest = _base_weight(g, weight, delta, form, ctx.wide)
            dx = (g.to(full.dtype) @ full).to(ctx.wide)
            if rest is not None:
                dx = add_product(dx, wide_g, rest.to(ctx.wide), form.dense_factor)
        if a is not None and (needs_x or needs_a or needs_b):
            a_full, b_full = (matrix.to(ctx.wide) for matrix in factors_of(weight, a, b, a_at, b_at, form))
            gb: Any = through_factor(wide_g, b_full) if needs_x or needs_a else None
            if dx is not None and mask is None:
                dx = add_product(dx, gb, a_full, s)
            elif dx is not None:
                dx = dx + _masked((gb @ a_full) * s, mask, ctx.mask_factor)
            differentiable = torch.is_grad_enabled()  # then what was kept, which has no history, won't do
            if needs_a or (needs_b and differentiable):
                masked = _masked(x.to(ctx.wide), mask, ctx.mask_factor)
                middle = masked @ a_full.t() if differentiable else middle
                da = a_gradient(gb.t() @ masked, a, a_at, s) if needs_a else None
            db = b_gradient(outer_gradient(wide_g, middle), b, b_at, s) if needs_b else None
        if needs_weight or needs_delta:
            product = wide_g.t() @ x.to(ctx.wide)
            dw = product.to(weight.dtype) if needs_weight else None
            ddelta = (product * form.dense_factor).to(delta.dtype) if needs_delta else None
        if needs_bias:
            d_bias = wide_g.sum(0).to(ctx.bias_dtype)
        dx = dx.to(g.dtype) if dx is not None else None
        return dx, dw, d_bias, da, db, ddelta, None, None, None, None, None, None


def _base_weight(
    rows: Tensor, weight: Tensor, delta: Tensor | None, form: Form, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`(W, D)` with D to be added, W in the type of the rows; or `(W + c D, None)` where that pays and, before it is
    cast to `wide`, loses nothing."""
    if delta is None or not wants_summed_weight(len(rows)):
        return weight.to(rows.dtype), delta
    sum_type = torch.promote_types(weight.dtype, delta.dtype)
    if sum_type.itemsize < 4:
        return weight.to(rows.dtype), delta
    return torch.add(weight, delta, alpha=form.dense_factor).to(wide), None


def _masked(x: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    return x if mask is None else x * mask * factor


def separate_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: Sequence[Pair],
    dense: Sequence[Dense] = (),
    dropout: float = 0.0,
) -> Tensor:
    """`x W^T + b + sum_k s_k (x A_k^T) B_k^T + sum_j c_j x D_j^T`, term by term: see `_SeparateLinear`.

    Updates of a wider type than x (float32 beside half precision) are computed and summed in it, as PEFT's LoRA does,
    but copies of x in that type are not kept. Under autocast all is computed in its type.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        low_rank: triples `(A, B, s)` with A (r, in_features), B (out_features, r), s a factor.
        dense: pairs `(D, c)` with D (out_features, in_features), c a factor.
        dropout: probability with which entries of x are dropped for the low-rank terms, the others scaled up.

    Returns:
        (..., out_features).
    """
    updates = as_one(low_rank, dense)
    wide = wide_type(x, bias, updates.a, updates.b, updates.delta)

    def run(rows: Tensor) -> Tensor:
        mask = torch.rand_like(rows, dtype=torch.float32) >= dropout if dropout and updates.a is not None else None
        factor = 1 / (1 - dropout) if dropout < 1 else 0.0
        out, _ = applied(_SeparateLinear, rows, weight, bias, *updates, mask, factor, wide or rows.dtype)
        return out

    return apply_to_rows(run, x, weight)
