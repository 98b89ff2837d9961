"""Linear layers with updates, of random shapes: values and all gradients against a float64 reference, and twice.

The bounds are rigorous. Every result is a polynomial of the inputs with positive coefficients, so that a computation
of n roundings in relative precision u errs by at most about n u times what the same polynomial gives for the inputs'
absolute values. Sums run over at most `24 + 20 + 64` terms in float32 or wider; a half-precision type rounds less than
a dozen times on the way (the sum of the updates, W', a product, a factor, the result).
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradgradcheck

from peft_learners.ops import Entries, effective_linear, linear_with_updates, separate_linear
from peft_learners.ops.effective import _EffectiveLinear
from peft_learners.ops.separate import _SeparateLinear

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


def check(problem: Problem, *paths: Callable[..., Tensor]) -> None:
    g = upstream(problem)
    wanted, magnitude = exact_results(lambda t: reference(problem, t), problem.tensors, g)
    for path in paths:
        got = results(lambda t, path=path: call(path, problem, t), problem.tensors, g)
        for name, gradient in zip(["x", *problem.trained()], got, strict=True):
            assert gradient.dtype == problem.tensors[name].dtype, name
        near(got, wanted, magnitude, bound_of(problem.tensors["x"].dtype))


names = st.sampled_from(("x", "weight", "bias", "a0", "b0", "a1", "b1", "D0", "D1"))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lead=st.lists(st.integers(0, 6), max_size=3),
    d=st.integers(1, 24),
    h=st.integers(1, 24),
    ranks=st.lists(st.integers(1, 20), max_size=2),
    dense=st.integers(0, 2),
    bias=st.booleans(),
    entries=st.sets(st.sampled_from(("a0", "b0", "a1", "b1"))),
    trains=st.sets(names) | st.none(),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
)
@example(339, [], 5, 1, [], 0, False, set(), None, torch.float16)  # a gradient below float16's normal numbers
def test_random_problems(seed, lead, d, h, ranks, dense, bias, entries, trains, dtype):
    """Values and gradients agree with the reference, whatever trains."""
    problem = make(seed, lead, d, h, ranks, dense, bias, entries, dtype, trains)
    check(problem, separate_linear, effective_linear, linear_with_updates)


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


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name):
    """Corner cases agree too."""
    check(CORNERS[name], *PATHS)


def executed(codes: set[Any], run: Callable[[], object]) -> set[tuple[Any, int]]:
    """Lines of these functions that `run` executes."""
    seen: set[tuple[Any, int]] = set()

    def trace(frame: Any, event: str, arg: object) -> Any:
        if frame.f_code not in codes:
            return None
        seen.add((frame.f_code, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return seen


def test_corner_coverage():
    """The corners reach every line of both passes."""
    functions = (f for c in (_EffectiveLinear, _SeparateLinear) for f in (c.forward, c.setup_context, c.backward))
    codes = {inspect.unwrap(function).__code__ for function in functions}
    mixed = make(0, (4,), 6, 7, (2,), 1)
    mixed.tensors.update(x=mixed.tensors["x"].detach().bfloat16(), weight=mixed.tensors["weight"].detach().bfloat16())

    def run() -> None:
        for problem in [*CORNERS.values(), mixed]:
            for path in PATHS if problem is not mixed else (separate_linear,):
                out = call(path, problem)
                out.backward(torch.ones_like(out), inputs=[problem.tensors[n] for n in problem.trained()])
        call(separate_linear, CORNERS["few rows, narrow"], dropout=0.5).sum().backward()

    lines = {(code, line) for code in codes for _, line in dis.findlinestarts(code) if line}
    seen = executed(codes, run)
    for problem in CORNERS.values():
        for tensor in problem.tensors.values():
            tensor.grad = None
    missed = {line for code, line in lines - seen if line > code.co_firstlineno + 1}  # beyond decorators and `def`
    assert len(seen) > 80 and not missed


TWICE = {
    "narrow": make(2, (3,), 3, 4, (2,)),
    "many rows": make(2, (6,), 3, 4, (2,)),
    "wide": make(2, (2,), 2, 2, (16,)),
    "D trains": make(2, (3,), 3, 4, (2,), 1),
    "D frozen": make(2, (3,), 3, 4, (2,), 1, trains={"x", "bias", "a0", "b0"}),
    "D and many rows": make(2, (33,), 2, 2, (1,), 1, trains={"x", "D0", "a0"}),
    "D alone": make(2, (3,), 3, 4, (), 1, trains={"x", "D0"}),
    "entries of both": make(2, (3,), 3, 4, (2,), 0, entries={"a0", "b0"}, trains={"x", "a0", "b0"}),
    "entries of one of two": make(2, (3,), 3, 4, (2, 2), 0, entries={"b1"}, trains={"x", "a0", "b0", "b1"}),
    "W frozen": make(2, (3,), 3, 4, (2,), trains={"x", "a0", "b0"}),
}


@pytest.mark.parametrize(
    "name,path,dropout",
    [(name, path, 0.0) for name in TWICE for path in PATHS]
    + [(name, separate_linear, 0.4) for name, problem in TWICE.items() if problem.ranks],
)
def test_gradgradcheck(name, path, dropout):
    """Second derivatives agree with finite differences."""
    problem = TWICE[name]
    options = {"dropout": dropout} if dropout else {}

    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same mask each time
        return call(path, problem, problem.tensors | dict(zip(problem.trained(), tensors, strict=True)), **options)

    assert gradgradcheck(run, [problem.tensors[name] for name in problem.trained()])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", TWICE)
def test_gradient_penalty(name, path):
    """Gradient penalties go through a second backward. A step on the size of the first gradients, in place of another
    product of the loss."""
    problem, steps = TWICE[name], []
    for function in (lambda t: call(path, problem, t), lambda t: reference(problem, t)):
        tensors = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in problem.tensors.items()}
        trained = [t for t in tensors.values() if t.requires_grad]
        first = torch.autograd.grad(function(tensors).pow(2).sum(), trained, create_graph=True)
        sum(g.pow(2).sum() for g in first).backward()
        steps.append([t.grad for t in trained])
    for ours, exact in zip(*steps, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
