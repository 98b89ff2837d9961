"""The effective weight: W' is formed, used in one product and dropped; backward keeps x alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .costs import forms_weight_again, takes_dense_gradient
from .separate import separate_linear
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
    effective_weight,
    factors_of,
    is_plain_torch,
    outer_gradient,
    through_factor,
    wide_type,
    without_autocast,
)


class _EffectiveLinear(torch.autograd.Function):
    """`x W'^T + b` with `W' = W + c D + s B A`, keeping x (and references to the parameters) for backward.

    x is (T, d) here: flattened by the caller, so that the output is no view and may be written to in place. W' is
    formed in the parameters' own type, and the products are computed in that of x.

    Gradients, with g the gradient of y as (T, h):
        dx = g W', or g W + s (g B) A where that is cheaper (see `costs.forms_weight_again`)
        db = sum of g's rows
        if D (or W) trains, or r is large:  G = g^T x,  dW = G,  dD = c G,  dA = s B^T G,  dB = s G A^T
        else:                dA = s (g B)^T x,  dB = s g^T (x A^T)

    Flops, N = d h, rho N = r (d + h): forward `2 T N + 2 r N`; backward `2 T N` and `2 r N` or `2 T r d` for dx, and
    `2 T N + 4 r N` or `4 rho T N` for the rest.
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
    ) -> Tensor:
        pair = factors_of(weight, a, b, a_at, b_at, form) if a is not None and b is not None else None
        full = _formed(weight, pair, delta, form)
        return F.linear(x, full.to(x.dtype), bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, a, b, delta, a_at, b_at, ctx.form = inputs
        ctx.bias_dtype = bias.dtype if bias is not None else None
        _, needs_weight, _, *needs_factors = ctx.needs_input_grad[:6]
        ctx.save_for_backward(x if needs_weight or any(needs_factors) else None, weight, a, b, delta, a_at, b_at)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, delta, a_at, b_at = ctx.saved_tensors
        form, (needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_delta) = ctx.form, ctx.needs_input_grad[:6]
        rows, (out_features, in_features) = len(g), weight.shape
        by_dense = needs_weight or needs_delta
        if needs_a and needs_b and not by_dense and is_plain_torch():  # a compiler would have to guard one more size
            by_dense = takes_dense_gradient(rows, in_features, out_features, form.rank)
        pair: Any = factors_of(weight, a, b, a_at, b_at, form) if a is not None else None
        has_gb = needs_a and not by_dense
        again = pair is None or forms_weight_again(rows, out_features, in_features, delta is not None, has_gb)
        gb: Any = None
        product: Any = None
        dx = dw = d_bias = da = db = ddelta = None
        if pair is not None and ((needs_a and not by_dense) or (needs_x and not again)):
            gb = through_factor(g, pair[1].to(g.dtype))
        if needs_x and again:
            dx = g @ _formed(weight, pair, delta, form).to(g.dtype)
        elif needs_x:
            dx = add_product(g @ weight.to(g.dtype), gb, pair[0].to(g.dtype), form.low_factor)
        if by_dense:
            product = (g.t() @ x).to(weight.dtype)
            dw = product if needs_weight else None
            if needs_delta:
                ddelta = product if form.dense_factor == 1 else product * form.dense_factor
        if needs_a:
            da = a_gradient(pair[1].t() @ product if by_dense else gb.t() @ x, a, a_at, form.low_factor)
        if needs_b:
            a_t = pair[0].t()
            db = product @ a_t if by_dense else outer_gradient(g, x @ a_t.to(g.dtype))
            db = b_gradient(db, b, b_at, form.low_factor)
        if needs_bias:
            d_bias = g.sum(0).to(ctx.bias_dtype)
        return dx, dw, d_bias, da, db, ddelta, None, None, None


def _formed(weight: Tensor, pair: tuple[Tensor, Tensor] | None, delta: Tensor | None, form: Form) -> Tensor:
    low_rank = [(*pair, form.low_factor)] if pair is not None else []
    return effective_weight(weight, low_rank, [(delta, form.dense_factor)] if delta is not None else [])


def effective_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Sequence[Pair], dense: Sequence[Dense] = ()
) -> Tensor:
    """`x W'^T + b` by the effective weight: arguments as for `separate_linear`, costs as for `_EffectiveLinear`.

    Under autocast the sum W' is formed in the parameters' own type and then cast, as autocast casts a weight.
    """
    updates = as_one(low_rank, dense)
    if wide_type(x, bias, updates.a, updates.b, updates.delta) not in (None, x.dtype):
        return separate_linear(x, weight, bias, low_rank, dense)  # W' would be rounded to the type of x
    return apply_to_rows(lambda rows: applied(_EffectiveLinear, rows, weight, bias, *updates), x, weight)
