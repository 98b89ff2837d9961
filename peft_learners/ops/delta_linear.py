"""A linear layer with low-rank and dense updates, by the cheaper of two paths to the same values and gradients.

    y = x W'^T + b,   W' = W + sum_k s_k B_k A_k + sum_j c_j D_j

Let T be the number of rows of x (all leading dimensions), d and h the in and out features, N = d h, r the ranks' sum
and rho = r (d + h) / N. A frozen linear layer costs `2 T N` flops forward and `2 T N` for the gradient of x, and dA
and dB take `4 rho T N` more: `4 T N + 4 rho T N` is what training A and B can't do without.

| path | forward | backward, where no D trains | kept for backward |
|---|---|---|---|
| effective weight | `2 T N + 2 r N` | `2 T N + 4 rho T N`, and `2 r N` or `2 T r d` | x |
| separate | `2 T N + 2 rho T N` | `2 T N + 4 rho T N` | x, and x A^T: (T, r) |

The choice is `linear_with_updates`. It depends on shapes and types alone, and not on what trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import (
    Dense,
    Form,
    Pair,
    a_gradient,
    add_product,
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

#: A machine does some tens of multiplications in the time of moving one number.
FEW_ROWS = 32


# -- which path pays ----------------------------------------------------------------------------------------------
# A product of (m, k) and (k, n) is `2 m k n` flops. What a rank costs is the same factor `2 r` everywhere: left out.


def wants_effective_weight(rows: int, in_features: int, out_features: int) -> bool:
    """Whether forming `W' = W + B A` pays in the forward pass.

    Forming costs `d h` per unit of rank, carrying x through A and B `T (d + h)`. Nothing here depends on whether
    anything trains, so that an adapter gives the same bits in each of its phases, and after it was saved and loaded.

    Args:
        rows: T.
    """
    return rows * (in_features + out_features) > in_features * out_features


def forms_weight_again(rows: int, in_features: int, out_features: int, dense: bool, has_gb: bool) -> bool:
    """Whether backward, for the gradient of x, forms W' again, or adds `(g B) A` to `g W`.

    Forming costs `d h` per unit of rank, `(g B) A` costs `T d`, and g B another `T h` where it is not there already,
    for the gradient of A. A dense update would cost another product of W's size: with one W' is formed in any case.

    Args:
        dense: whether there is a dense update.
        has_gb: whether g B is there.
    """
    return dense or (rows > out_features if has_gb else wants_effective_weight(rows, in_features, out_features))


def takes_dense_gradient(rows: int, in_features: int, out_features: int, rank: int) -> bool:
    """Whether the gradients of both A and B come from `G = g^T x` although nothing else needs it.

    G costs `2 T d h`, and `B^T G` and `G A^T` `4 r d h`; the products with g and x cost `4 T r (d + h)`: dearer for
    ranks above about a quarter of the width.
    """
    weights = in_features * out_features
    return 2 * rows * weights + 4 * rank * weights < 4 * rows * rank * (in_features + out_features)


def wants_summed_weight(rows: int) -> bool:
    """Whether to form `W + D` of a dense D rather than to multiply twice.

    Forming moves three numbers per weight, a second product costs T multiplications per weight.
    """
    return rows > FEW_ROWS


def linear_with_updates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: Sequence[Pair],
    dense: Sequence[Dense] = (),
    dropout: float = 0.0,
) -> Tensor:
    """`x W'^T + b` by the path that is cheaper at this shape; arguments as for `separate_linear`.

    A weight in half precision would swallow small low-rank updates (bfloat16 has 8 significant bits), and dropout on
    them has no effective weight: these take the separate path at every shape.
    """
    out_features, in_features = weight.shape
    rows = x.numel() // max(1, in_features)
    if dense and not low_rank:
        effective = wants_summed_weight(rows)
    else:
        parts = [part for a, b, _ in low_rank for part in (a, b)] + [delta for delta, _ in dense]
        exact = weight.element_size() >= 4 and all(part.dtype == weight.dtype for part in parts)
        effective = exact and not dropout and wants_effective_weight(rows, in_features, out_features)
    if effective:
        return effective_linear(x, weight, bias, low_rank, dense)
    return separate_linear(x, weight, bias, low_rank, dense, dropout)


# -- the effective weight: formed, used in one product and dropped ----------------------------------------------------


class _EffectiveLinear(torch.autograd.Function):
    """`x W'^T + b` with `W' = W + c D + s B A`, keeping x (and references to the parameters) for backward.

    x is (T, d) here: flattened by the caller, so that the output is no view and may be written to in place. W' is
    formed in the parameters' own type, and the products are computed in that of x.

    Gradients, with g the gradient of y as (T, h):
        dx = g W', or g W + s (g B) A where that is cheaper (see `forms_weight_again`)
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
        again = pair is None or forms_weight_again(rows, in_features, out_features, delta is not None, has_gb)
        gb: Any = None
        product: Any = None
        dx = dw = d_bias = da = db = ddelta = None
        if pair is not None and (has_gb or (needs_x and not again)):
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
    return apply_to_rows(lambda rows: _EffectiveLinear.apply(rows, weight, bias, *updates), x, weight)


# -- the terms one after the other: nothing is formed but, for a dense D and many rows, W + D -------------------------


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
        out, _ = _SeparateLinear.apply(rows, weight, bias, *updates, mask, factor, wide or rows.dtype)
        return out

    return apply_to_rows(run, x, weight)
