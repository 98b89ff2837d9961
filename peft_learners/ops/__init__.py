"""The arithmetic of the layers, apart from modules and adapters: shapes, flops and stored bytes are stated.

- `costs`: which path pays, from shapes alone;
- `updates`: what adds to a weight, and shared pieces;
- `effective`, `separate`: the two paths of a linear layer with updates; `linear`: the choice between them;
- `cut`: a linear layer of which some rows or columns train;
- `norm`: norms at other values; `call`: modules of any kind at other values.
"""

from .call import call_with
from .costs import forms_weight_again, wants_effective_weight, wants_summed_weight
from .cut import cut_linear, order_of, others_of, uncut
from .effective import effective_linear
from .linear import linear_with_updates
from .norm import norm_with, sum_of
from .separate import separate_linear
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
    "forms_weight_again",
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
