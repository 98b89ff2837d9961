"""What adds to the weight of a linear layer, and the pieces that all ways of computing with it share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

#: Below this rank a matrix product of which one side is that narrow is bound by memory, and it matters which way the
#: tall operand is read: `(B^T g^T)` and `(g^T m)^T = m^T g` read g row by row.
NARROW = 16


@dataclass(frozen=True)
class Entries:
    """A factor of which some entries are there, the others being zero: `A: (r, features)` or `B: (features, r)`.

    Attributes:
        values: (k,), the entries.
        positions: (k,) whole numbers: `i * features + j` for the j-th number of rank i.
        rank, features: r, and the length of what belongs to each rank.
        turned: whether the factor is B.
    """

    values: Tensor
    positions: Tensor
    rank: int
    features: int
    turned: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def detach(self) -> Entries:
        return replace(self, values=self.values.detach())

    def dense(self) -> Tensor:
        """The factor as a dense matrix, differentiable."""
        full = _by_rank(self.values, self.positions, self.rank, self.features)
        return full.t() if self.turned else full


Factor = Union[Tensor, Entries]
#: `(A, B, s)`; whoever multiplies takes factors of either kind.
LowRank = tuple[Tensor, Tensor, float]
Pair = tuple[Factor, Factor, float]
#: `(D, c)`
Dense = tuple[Tensor, float]


def dense_factor(factor: Factor) -> Tensor:
    """A factor as a dense matrix, differentiable."""
    return factor.dense() if isinstance(factor, Entries) else factor


def _by_rank(values: Tensor, positions: Tensor, rank: int, features: int) -> Tensor:
    return values.new_zeros(rank * features).index_add(0, positions, values).view(rank, features)


def sum_of(base: Tensor | None, deltas: Sequence[Tensor]) -> Tensor | None:
    """`base + sum(deltas)`; None if there is neither."""
    for delta in deltas:
        base = delta if base is None else base + delta
    return base


def effective_weight(weight: Tensor, low_rank: Sequence[Pair], dense: Sequence[Dense]) -> Tensor:
    """`W + sum_j c_j D_j + sum_k s_k B_k A_k`: (out_features, in_features). W itself is not written to.

    `2 r N` flops for the ranks' sum r, and a pass over N numbers for each D; one matrix of W's size.
    """
    total = weight
    for delta, factor in dense:
        in_place = total is not weight and is_plain_torch()
        total = total.add_(delta, alpha=factor) if in_place else torch.add(total, delta, alpha=factor)
    for a, b, factor in low_rank:
        left, right = dense_factor(b), dense_factor(a)
        if total is weight:
            total = torch.addmm(weight, left, right, alpha=factor)
        else:
            total = add_product(total, left, right, factor)
    return total


# -- updates as the arguments of an autograd function ----------------------------------------------------------------


class Form(NamedTuple):
    """What describes the updates `c D + s B A` beside their tensors.

    Attributes:
        low_factor, dense_factor: s and c.
        rank: r, where A and B may come as entries.
    """

    low_factor: float
    dense_factor: float
    rank: int


class Updates(NamedTuple):
    """Updates as one: A, B and D, each may be missing; positions where A and B come as the values of entries."""

    a: Tensor | None
    b: Tensor | None
    delta: Tensor | None
    a_at: Tensor | None
    b_at: Tensor | None
    form: Form


def as_one(low_rank: Sequence[Pair], dense: Sequence[Dense]) -> Updates:
    """Several updates as one: of the ranks' sum, and with the sum of the dense ones."""
    delta, c = dense[0] if dense else (None, 1.0)
    if len(dense) > 1 and delta is not None:
        delta, c = effective_weight(delta * c, (), dense[1:]), 1.0
    if not low_rank:
        return Updates(None, None, delta, None, None, Form(1.0, c, 0))
    first, second, s = low_rank[0]
    if len(low_rank) > 1:
        first = torch.cat([dense_factor(a) for a, _, _ in low_rank])
        second, s = torch.cat([dense_factor(b) * factor for _, b, factor in low_rank], dim=1), 1.0
    rank = first.rank if isinstance(first, Entries) else len(first)
    a, a_at = (first.values, first.positions) if isinstance(first, Entries) else (first, None)
    b, b_at = (second.values, second.positions) if isinstance(second, Entries) else (second, None)
    return Updates(a, b, delta, a_at, b_at, Form(s, c, rank))


def factors_of(
    weight: Tensor, a: Tensor, b: Tensor, a_at: Tensor | None, b_at: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """A and B as matrices; of entries, they are made anew, and no one keeps them for backward."""
    if a_at is not None:
        a = _by_rank(a, a_at, form.rank, weight.shape[1])
    if b_at is not None:
        b = _by_rank(b, b_at, form.rank, weight.shape[0]).t()
    return a, b


def a_gradient(gradient: Tensor, a: Tensor, a_at: Tensor | None, factor: float) -> Tensor:
    """A's gradient (r, d) times a factor, at its entries where it has such, in its type."""
    gradient = gradient if a_at is None else gradient.reshape(-1).index_select(0, a_at)
    return gradient.to(a.dtype) * factor


def b_gradient(gradient: Tensor, b: Tensor, b_at: Tensor | None, factor: float) -> Tensor:
    """B's gradient (h, r) times a factor, at its entries where it has such, in its type."""
    gradient = gradient if b_at is None else gradient.t().reshape(-1).index_select(0, b_at)
    return gradient.to(b.dtype) * factor


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that computes in the types at hand wherever it is called."""

    @functools.wraps(backward)
    def run(ctx: Any, g: Tensor, *others: Any) -> Any:
        if not autocasts(g):
            return backward(ctx, g, *others)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g, *others)

    return run


# -- products --------------------------------------------------------------------------------------------------------


def is_plain_torch() -> bool:
    """Whether no compiler and no function transform is at work.

    Under the latter a tensor of our own may not be written to: it may lack a batch dimension that what is added has.
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def add_product(out: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`out + factor * left right`, into the memory of out, which belongs to the caller."""
    if is_plain_torch():
        return out.addmm_(left, right, alpha=factor)
    return torch.addmm(out, left, right, alpha=factor)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; never on the meta device."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def wide_type(x: Tensor, *parts: Tensor | None) -> torch.dtype | None:
    """The widest type of x and what it meets, in which a layer is computed; None under autocast, which has its own."""
    if autocasts(x):
        return None
    wide = x.dtype
    for part in parts:
        wide = wide if part is None else torch.promote_types(wide, part.dtype)
    return wide


def through_factor(g: Tensor, b: Tensor) -> Tensor:
    """`g B`: (T, r), for g (T, h) and B (h, r); `2 T h r` flops."""
    return (b.t() @ g.t()).t() if b.shape[1] < NARROW else g @ b


def outer_gradient(g: Tensor, middle: Tensor) -> Tensor:
    """`g^T middle`: (h, r), for g (T, h) and middle (T, r); `2 T h r` flops."""
    return (middle.t() @ g).t() if middle.shape[1] < NARROW else g.t() @ middle


def apply_to_rows(function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """`function` of x as (rows, in_features), given back in x's leading shape: (..., out_features).

    Under autocast `function` runs without it, on rows in the type that autocast would cast them to (double precision
    is left alone, as there). It must cast its weights to the type of its rows.

    Args:
        weight: the layer's weight, whose type x must have where there is no autocast.
    """
    count = -1 if x.numel() else x.shape[:-1].numel()  # a number would stay in what `torch.jit.trace` makes
    rows, device = x.reshape(count, x.shape[-1]), x.device.type
    if not autocasts(x):
        if x.dtype != weight.dtype:
            F.linear(x, weight)  # raises, as the layer without updates does
        out = function(rows)
    else:
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            out = function(rows.to(dtype))
    return out.view(*x.shape[:-1], out.shape[-1])
