"""The arithmetic of a linear layer of which only some rows or some columns train. Shapes are stated.

A *cut delta* D of shape (h, d) is kept as values, rest and indices along one axis:

- axis 0: rows `kept` of D are `values: (k, d)`, the others, ascending, `rest: (h - k, d)`;
- axis 1: columns `kept` of D are `values: (h, k)`, the others, ascending, `rest: (h, d - k)`.

`rest` is frozen; None stands for zeros. `kept: (k,)` is ascending.

With T rows of x: nothing of the size of the weight is kept for backward (W' is formed again there, two passes over
it against `2 T h d` flops), the gradient of `values` costs `k / n` of a dense one, and with axis 1 only the kept
columns of x are stored, `k / d` of it. Nothing is permuted: rest and values are gathered into W's own order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .terms import apply_to_rows, is_plain_torch, wide_type, without_autocast


def order_of(kept: Tensor, nodes: int) -> Tensor:
    """Where each node lies in "the kept ones, then the others": (nodes,) int64."""
    other = torch.ones(nodes, dtype=torch.bool, device=kept.device)
    other = other.index_fill(0, kept, False)
    order = other.cumsum(0) + (len(kept) - 1)
    return order.index_copy(0, kept, torch.arange(len(kept), device=kept.device))


def others_of(kept: Tensor, nodes: int) -> Tensor:
    """The indices that are not kept, ascending: (nodes - k,) int64."""
    return order_of(kept, nodes).argsort()[len(kept) :]


def uncut(values: Tensor, rest: Tensor | None, kept: Tensor, nodes: int, axis: int) -> Tensor:
    """The cut tensor in full, differentiable in `values`.

    Args:
        values, rest, kept, axis: as above; a bias delta is cut along axis 0 too.
        nodes: length of the full tensor along `axis`.
    """
    if rest is None:
        shape = list(values.shape)
        shape[axis] = nodes
        return values.new_zeros(shape).index_copy(axis, kept, values)
    return torch.cat([values, rest], axis).index_select(axis, order_of(kept, nodes))


def _summed(base: Tensor, values: Tensor, rest: Tensor | None, kept: Tensor, axis: int) -> Tensor:
    """The base plus the cut tensor, in the wider of their types: one matrix of its size is made, and no other."""
    wide = torch.promote_types(base.dtype, values.dtype)
    nodes = base.shape[axis]
    out = base.to(wide).index_add(axis, kept, values.to(wide))
    if rest is None:
        return out
    others, rest = others_of(kept, nodes), rest.to(wide)
    return out.index_add_(axis, others, rest) if is_plain_torch() else out.index_add(axis, others, rest)


class _CutLinear(torch.autograd.Function):
    """`x (W + D)^T + b + db` with D cut along `axis`; x is (T, d).

    Computed in the type `wide`, in which W + D loses nothing of D (see `terms.wide_type`).

    `stored` is what the gradient of `values` needs: None for x itself (axis 0), or its kept columns (axis 1). With
    axis 0 the bias delta is cut as D is, with axis 1 `bias_values` is all of it.

    Gradients, with g (T, h) the gradient of y:
        dx = g (W + D);  axis 0:  dvalues = g[:, kept]^T x,  dbias = sum of g[:, kept]'s rows
                         axis 1:  dvalues = g^T x[:, kept],  dbias = sum of g's rows
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        stored: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        rest: Tensor | None,
        bias_values: Tensor | None,
        bias_rest: Tensor | None,
        kept: Tensor,
        axis: int,
        wide: torch.dtype,
    ) -> Tensor:
        full = _summed(weight, values, rest, kept, axis)
        if bias is not None and bias_values is not None:
            bias = _summed(bias, bias_values, bias_rest, kept, 0) if axis == 0 else bias + bias_values
        return F.linear(x.to(wide), full.to(wide), bias.to(wide) if bias is not None else None).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, stored, weight, _, values, rest, bias_values, _, kept, ctx.axis, ctx.wide = inputs
        ctx.bias_dtype = bias_values.dtype if bias_values is not None else None
        needed = (x if stored is None else stored) if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(needed, weight, values, rest, kept)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        stored, weight, values, rest, kept = ctx.saved_tensors
        dx = dvalues = dbias = None
        wide_g = g.to(ctx.wide)
        if ctx.needs_input_grad[0]:
            dx = (wide_g @ _summed(weight, values, rest, kept, ctx.axis).to(ctx.wide)).to(g.dtype)
        part = wide_g.index_select(1, kept) if ctx.axis == 0 else wide_g
        if ctx.needs_input_grad[4]:
            dvalues = (part.t() @ stored.to(ctx.wide)).to(values.dtype)
        if ctx.needs_input_grad[6]:
            dbias = part.sum(0).to(ctx.bias_dtype)
        return dx, None, None, None, dvalues, None, dbias, None, None, None, None


def cut_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    rest: Tensor | None,
    bias_values: Tensor | None,
    bias_rest: Tensor | None,
    kept: Tensor,
    axis: int,
) -> Tensor:
    """`x (W + D)^T + b + db`, with D and db cut: see the module's docstring and `_CutLinear`.

    Args:
        x: (..., d).
        weight: (h, d); it and `bias` get no gradient here.
        bias: (h,) or None.
        bias_values: (k,) with axis 0, (h,) with axis 1, None where the bias is not trained.
        bias_rest: (h - k,) or None; axis 0 only.

    Returns:
        (..., h).
    """
    wide = wide_type(x, weight, values, bias_values)

    def run(rows: Tensor) -> Tensor:
        # With its history, for second derivatives; the first backward sends no gradient through it.
        stored = None if axis == 0 else rows.index_select(1, kept)
        deltas = (values, rest, bias_values, bias_rest, kept, axis)
        return _CutLinear.apply(rows, stored, weight, bias, *deltas, wide or rows.dtype)

    return apply_to_rows(run, x, weight)
