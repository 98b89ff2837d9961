"""The arithmetic of the layers, apart from modules and adapters: shapes, flops and stored bytes are stated.

- `delta_linear`: a linear layer with updates: two paths, and which of them pays;
- `cut`: a linear layer of which some rows or columns train;
- `norm`: norms, and modules of any other kind, at other values of their parameters;
- `terms`: what adds to a weight, and the pieces that all of them share;
- `low_rank`: updates as pairs of factors, joined and truncated.
"""

from .cut import cut_linear, order_of, others_of, uncut
from .delta_linear import (
    effective_linear,
    linear_with_updates,
    separate_linear,
    wants_effective_weight,
    wants_summed_weight,
)
from .norm import call_with, norm_with, sum_of
from .terms import Dense, Entries, Factor, LowRank, Pair, apply_to_rows, autocasts, dense_factor, effective_weight

__all__ = [
    "Dense",
    "Entries",
    "Factor",
    "LowRank",
    "Pair",
    "apply_to_rows",
    "autocasts",
    "call_with",
    "cut_linear",
    "dense_factor",
    "effective_linear",
    "effective_weight",
    "linear_with_updates",
    "norm_with",
    "order_of",
    "others_of",
    "separate_linear",
    "sum_of",
    "uncut",
    "wants_effective_weight",
    "wants_summed_weight",
]
