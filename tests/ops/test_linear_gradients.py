"""Linear layers with updates, of random shapes: values and all gradients against a float64 reference, and twice."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from problems import CORNERS, PATHS, Problem, bound_of, call, exact_results, make, near, reference, results, upstream
from torch import Tensor
from torch.autograd import gradgradcheck

from peft_learners.ops.delta_linear import (
    _EffectiveLinear,
    _SeparateLinear,
    effective_linear,
    linear_with_updates,
    separate_linear,
)


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
