"""Which path a linear layer with updates takes, by shapes alone: counts of flops, nothing of torch.

T are the rows of x (all leading dimensions), d and h the in and out features, r the rank. A product of (m, k) and
(k, n) is `2 m k n` flops. What a rank costs is the same factor `2 r` in every line, and left out.
"""

from __future__ import annotations

#: Below this rank a matrix product of which one side is that narrow is bound by memory, and it matters which way the
#: tall operand is read: `(B^T g^T)` and `(g^T m)^T = m^T g` read g row by row.
NARROW = 16
#: A machine does some tens of multiplications in the time of moving one number.
FEW_ROWS = 32


def wants_effective_weight(rows: int, in_features: int, out_features: int) -> bool:
    """Whether forming `W' = W + B A` pays in the forward pass.

    Forming costs `d h` per unit of rank, carrying x through A and B `T (d + h)`. Nothing here depends on whether
    anything trains, so that an adapter gives the same bits in each of its phases, and after it was saved and loaded.

    Args:
        rows: T.
    """
    return rows * (in_features + out_features) > in_features * out_features


def forms_weight_again(rows: int, out_features: int, in_features: int, dense: bool, has_gb: bool) -> bool:
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
