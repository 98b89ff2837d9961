"""Linear layers with updates: random problems, a reference that goes entry by entry, and what may differ from it.

The bounds are rigorous. Every result is a polynomial of the inputs with positive coefficients, so that a computation
of n roundings in relative precision u errs by at most about n u times what the same polynomial gives for the inputs'
absolute values. Sums run over at most `24 + 20 + 64` terms in float32 or wider; a half-precision type rounds less than
a dozen times on the way (the sum of the updates, W', a product, a factor, the result).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_learners.ops.delta_linear import effective_linear, linear_with_updates, separate_linear
from peft_learners.ops.terms import Entries

BF16 = torch.bfloat16

PATHS = (separate_linear, effective_linear)


#: Roundings of the wide type in sums, and of a half-precision type elsewhere.
SUM_ROUNDINGS, TYPE_ROUNDINGS = 200, 12


#: s and c of the k-th update; c = 1 has a branch of its own.
S, C = (0.5, 1.5, 2.0), (0.25, 1.0)


class Problem(NamedTuple):
    """A layer's tensors by name (`x`, `weight`, `bias`, `a0`, `b0`, `D0`, ...), and what else describes it.

    Attributes:
        at: positions of the factors that come as entries.
        ranks: of the low-rank updates.
        dense: the number of dense updates.
    """

    tensors: dict[str, Tensor]
    at: dict[str, Tensor]
    ranks: tuple[int, ...]
    dense: int

    def trained(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.requires_grad]


def make(
    seed: int,
    lead: Sequence[int],
    d: int,
    h: int,
    ranks: Sequence[int],
    dense: int = 0,
    bias: bool = True,
    entries: Collection[str] = (),
    dtype: torch.dtype = torch.float64,
    trains: Collection[str] | None = None,
) -> Problem:
    """A random problem.

    Args:
        entries: names of the factors that come as entries: about half of them, and none of the last rank.
        trains: names of what requires a gradient; None: all does.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    draw("x", *lead, d)
    draw("weight", h, d)
    if bias:
        draw("bias", h)
    for k, r in enumerate(ranks):
        for name, features, shape in ((f"a{k}", d, (r, d)), (f"b{k}", h, (h, r))):
            if name in entries:
                chosen = torch.randperm(max(1, r - 1) * features, generator=generator)[: r * features // 2]
                at[name] = chosen.sort().values.int()
                shape = (len(chosen),)
            draw(name, *shape)
    for j in range(dense):
        draw(f"D{j}", h, d)
    for name, tensor in tensors.items():
        tensor.requires_grad_(trains is None or name in trains)
    return Problem(tensors, at, tuple(ranks), dense)


def call(path: Callable[..., Tensor], problem: Problem, tensors: dict[str, Tensor] | None = None, **options: Any):
    """The path at the problem's tensors, or at others of their names."""
    t = problem.tensors if tensors is None else tensors
    h, d = t["weight"].shape[-2:]

    def factor(name: str, rank: int) -> Any:
        if name not in problem.at:
            return t[name]
        turned = name[0] == "b"
        return Entries(t[name], problem.at[name], rank, h if turned else d, turned)

    low = [(factor(f"a{k}", r), factor(f"b{k}", r), S[k]) for k, r in enumerate(problem.ranks)]
    dense = [(t[f"D{j}"], C[j]) for j in range(problem.dense)]
    return path(t["x"], t["weight"], t.get("bias"), low, dense, **options)


def reference(problem: Problem, tensors: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Entry by entry: y[t, o] = sum_i x[t, i] W'[o, i] + b[o]; `mask` multiplies x in the low-rank terms."""
    h, d = tensors["weight"].shape
    base, low = tensors["weight"], torch.zeros_like(tensors["weight"])
    for j in range(problem.dense):
        base = base + C[j] * tensors[f"D{j}"]
    for k, r in enumerate(problem.ranks):
        a, b = tensors[f"a{k}"], tensors[f"b{k}"]
        if f"a{k}" in problem.at:
            a = (a[:, None] * F.one_hot(problem.at[f"a{k}"].long(), r * d)).sum(0).view(r, d)
        if f"b{k}" in problem.at:
            b = (b[:, None] * F.one_hot(problem.at[f"b{k}"].long(), r * h)).sum(0).view(r, h).t()
        low = low + S[k] * (b[:, :, None] * a[None]).sum(1)
    x = tensors["x"].unsqueeze(-2)
    out = (x * base).sum(-1) + ((x if mask is None else x * mask.unsqueeze(-2)) * low).sum(-1)
    return out + tensors["bias"] if "bias" in tensors else out


def bound_of(dtype: torch.dtype) -> float:
    half = dtype in (torch.bfloat16, torch.float16)
    unit = torch.finfo(torch.float32 if half else dtype).eps / 2
    return SUM_ROUNDINGS * unit + (TYPE_ROUNDINGS * torch.finfo(dtype).eps / 2 if half else 0)


def near(got: Sequence[Tensor], wanted: Sequence[Tensor], magnitude: Sequence[Tensor], bound: float) -> None:
    for ours, exact, size in zip(got, wanted, magnitude, strict=True):
        assert ours.shape == exact.shape
        assert torch.isfinite(ours).all()
        # Below a type's normal numbers its spacing no longer shrinks with the value.
        spacing = TYPE_ROUNDINGS * torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
        assert ((ours.double() - exact).abs() <= bound * size + spacing).all()


def results(function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], g: Tensor) -> list[Tensor]:
    """The output, and the gradients of what trains."""
    out = function(tensors)
    inputs = [tensor for tensor in tensors.values() if tensor.requires_grad]
    assert out.requires_grad == bool(inputs)
    return [out.detach(), *(torch.autograd.grad(out, inputs, g.to(out.dtype)) if inputs else ())]


def exact_results(function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], g: Tensor):
    """The float64 results, and those of absolute values, which bound the errors."""
    both = []
    for turn in (torch.Tensor.clone, torch.abs):
        doubles = {n: turn(t.detach().double()).requires_grad_(t.requires_grad) for n, t in tensors.items()}
        both.append(results(function, doubles, turn(g.double())))
    return both


def upstream(problem: Problem, seed: int = 1) -> Tensor:
    x, weight = problem.tensors["x"], problem.tensors["weight"]
    shape = (*x.shape[:-1], len(weight))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


#: By hand: rows below and above out_features (form W' again, or not) and FEW_ROWS (sum W and D, or not), ranks below
#: and from NARROW on, and what trains.
CORNERS = {
    "few rows, narrow": make(0, (3,), 6, 7, (2,), 0),
    "many rows, narrow": make(0, (9,), 6, 7, (2,), 0),
    "few rows, wide": make(0, (3,), 20, 22, (16,), 0),
    "many rows, wide": make(0, (40,), 20, 22, (16,), 0),
    "rank 15": make(0, (5,), 20, 22, (15,), 0, trains={"x", "a0", "b0"}),
    "rank 16": make(0, (5,), 20, 22, (16,), 0, trains={"x", "a0", "b0"}),
    "32 rows and D": make(0, (32,), 6, 7, (2,), 1),
    "33 rows and D": make(0, (33,), 6, 7, (2,), 1),
    "D alone, of factor 1 in sum": make(0, (33,), 6, 7, (), 2, trains={"x", "D0", "D1"}),
    "D frozen": make(0, (40,), 6, 7, (2,), 1, trains={"x", "bias", "a0", "b0"}),
    "D frozen, few rows": make(0, (4,), 6, 7, (2,), 1, trains={"x", "bias", "a0", "b0"}),
    "x frozen": make(0, (4,), 6, 7, (2,), 0, trains={"bias", "a0", "b0"}),
    "A alone": make(0, (4,), 6, 7, (2,), 0, trains={"a0"}),
    "B alone": make(0, (4,), 6, 7, (2,), 0, trains={"b0"}),
    "x alone": make(0, (4,), 6, 7, (2,), 0, trains={"x"}),
    "entries of A": make(0, (4,), 6, 7, (3,), 0, entries={"a0"}, trains={"x", "a0", "b0"}),
    "entries of B": make(0, (9,), 6, 7, (3,), 0, entries={"b0"}, trains={"x", "a0", "b0"}),
    "entries of both, dense dW": make(0, (4,), 6, 7, (3,), 1, entries={"a0", "b0"}, trains={"D0", "a0", "b0"}),
    "two adapters, one of entries": make(0, (4,), 6, 7, (3, 2), 0, entries={"a1", "b0"}),
    "no rows": make(0, (0,), 6, 7, (2,), 1),
    "no rows in two dimensions": make(0, (2, 0), 6, 7, (17,), 0),
    "one dimension": make(0, (), 6, 7, (2,), 1),
    "rank 0": make(0, (4,), 6, 7, (0,), 0),
}


D_IN, D_OUT, RANK, SCALE = 64, 48, 4, 2.0


def lora(dropout: float = 0.0, dtype: torch.dtype = BF16) -> nn.Module:
    """PEFT's LoRA on a linear layer in half precision: A and B are float32."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype)
    config = LoraConfig(
        target_modules=["0"], r=RANK, lora_alpha=SCALE * RANK, init_lora_weights=False, lora_dropout=dropout
    )
    layer = get_peft_model(base, config).base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    return layer


def parts_of(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters by our names, as leaves of their own."""
    own = {
        "weight": layer.base_layer.weight,
        "bias": layer.base_layer.bias,
        "a": layer.lora_A["default"].weight,
        "b": layer.lora_B["default"].weight,
    }
    return {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in own.items()}


def ours(parts: dict[str, Tensor], x: Tensor, **options: float) -> Tensor:
    return linear_with_updates(x, parts["weight"], parts["bias"], [(parts["a"], parts["b"], SCALE)], **options)


def stored_bytes(run: Callable[[], Tensor], *known: Tensor) -> int:
    """Bytes kept for backward, beside those of known tensors."""
    addresses = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # alive as long as its graph is counted
    assert out is not None
    return sum(kept.values())
