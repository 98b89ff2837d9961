"""The arithmetic of the layers, apart from modules and adapters: shapes, flops and stored bytes are stated.

- `delta_linear`: a linear layer with updates: two paths, and which of them pays;
- `cut`: a linear layer of which some rows or columns train;
- `norm`: norms, and modules of any other kind, at other values of their parameters;
- `terms`: what adds to a weight, and the pieces that all of them share;
- `low_rank`: updates as pairs of factors, joined and truncated.
"""
