"""A linear layer with low-rank and dense updates, by the cheaper of two paths to the same values and gradients.

    y = x W'^T + b,   W' = W + sum_k s_k B_k A_k + sum_j c_j D_j

Let T be the number of rows of x (all leading dimensions), d and h the in and out features, N = d h, r the ranks' sum
and rho = r (d + h) / N. A frozen linear layer costs `2 T N` flops forward and `2 T N` for the gradient of x, and dA
and dB take `4 rho T N` more: `4 T N + 4 rho T N` is what training A and B can't do without.

| path | forward | backward, where no D trains | kept for backward |
|---|---|---|---|
| effective weight | `2 T N + 2 r N` | `2 T N + 4 rho T N`, and `2 r N` or `2 T r d` | x |
| separate | `2 T N + 2 rho T N` | `2 T N + 4 rho T N` | x, and x A^T: (T, r) |
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .costs import wants_effective_weight
from .effective import effective_linear
from .separate import separate_linear
from .terms import Dense, Pair


def linear_with_updates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: Sequence[Pair],
    dense: Sequence[Dense] = (),
    dropout: float = 0.0,
) -> Tensor:
    """`x W'^T + b` by the path that is cheaper at this shape; arguments as for `separate_linear`.

    A weight in half precision would swallow small updates (bfloat16 has 8 significant bits), and dropout on the
    low-rank terms has no effective weight: these take the separate path at every shape.
    """
    out_features, in_features = weight.shape
    rows = x.numel() // max(1, in_features)
    parts = [part for a, b, _ in low_rank for part in (a, b)] + [delta for delta, _ in dense]
    exact = weight.element_size() >= 4 and all(part.dtype == weight.dtype for part in parts)
    if dropout or not exact or not wants_effective_weight(rows, in_features, out_features):
        return separate_linear(x, weight, bias, low_rank, dense, dropout)
    return effective_linear(x, weight, bias, low_rank, dense)
