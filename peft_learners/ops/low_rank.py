"""Low-rank updates as pairs of factors: putting several into one, and the nearest one to a dense update."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import Dense, LowRank


@dataclass(frozen=True)
class Factored:
    """A weight update as `B A`.

    Attributes:
        a: A, (rank, in_features).
        b: B, (out_features, rank).
        error: `||update - B A|| / ||update||` (Frobenius norms); 0.0 where the pair is the update itself.
    """

    a: Tensor
    b: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.a)


def concat_factors(pairs: Sequence[LowRank]) -> Factored:
    """`sum_k s_k B_k A_k` as one pair: `A = [A_1; A_2; ...]`, `B = [s_1 B_1, s_2 B_2, ...]`; exact.

    Args:
        pairs: `(A, B, s)` with A (r, in_features), B (out_features, r); at least one.
    """
    a = torch.cat([a.detach() for a, _, _ in pairs])
    b = torch.cat([b.detach() if factor == 1 else b.detach() * factor for _, b, factor in pairs], dim=1)
    return Factored(a.contiguous(), b.contiguous())


def without_idle(pair: Factored) -> Factored:
    """The same product without the ranks that add nothing: those with a zero row of A or a zero column of B."""
    acts = pair.a.any(dim=1) & pair.b.any(dim=0)
    return Factored(pair.a[acts].contiguous(), pair.b[:, acts].contiguous(), pair.error)


def total(low_rank: Sequence[LowRank], dense: Sequence[Dense]) -> Tensor:
    """`sum_k s_k B_k A_k + sum_j c_j D_j` in float32 or wider: (out_features, in_features); at least one term."""

    def wide(part: Tensor) -> Tensor:
        return part.detach().to(torch.promote_types(part.dtype, torch.float32))

    products = ((wide(b) @ wide(a)) * factor for a, b, factor in low_rank)
    return functools.reduce(torch.add, itertools.chain(products, (wide(delta) * factor for delta, factor in dense)))


def nearest(update: Tensor, rank: float) -> Factored:
    """The pair that is nearest to an update among those of its rank, in the Frobenius norm: the truncated SVD.

    With `update = sum_i s_i u_i v_i^T`, `s_1 >= s_2 >= ...`, B holds the first `sqrt(s_i) u_i` in its columns and A
    the `sqrt(s_i) v_i^T` in its rows (Eckart and Young: no pair of that rank is nearer).

    Args:
        update: (out_features, in_features), float32 or float64.
        rank: an int, the largest rank; a float in (0, 1], the share of `sum_i s_i^2` (the energy) to keep, by the
            smallest rank that does.

    Returns:
        Factors of rank 1 at least, with the error as measured. Singular values that are 0 to rounding are left out.
    """
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    count = int((s > s[0] * max(update.shape) * torch.finfo(s.dtype).eps).sum())
    if isinstance(rank, int):
        count = min(count, rank)
    elif rank < 1:
        energy = s.cpu().double().square().cumsum(0)
        count = min(count, int((energy < rank * energy[-1]).sum()) + 1)
    count = max(1, count)
    roots = s[:count].sqrt()
    a, b = (roots[:, None] * vh[:count]).contiguous(), (u[:, :count] * roots).contiguous()
    norm = float(update.norm())
    return Factored(a, b, float((update - b @ a).norm()) / norm if norm else 0.0)
