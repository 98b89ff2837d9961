"""Each path as one graph of torch.compile, forward and backward: no breaks, and the values of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import call, make
from torch import Tensor
from torch._dynamo.utils import counters

from peft_learners.ops.cut import cut_linear
from peft_learners.ops.delta_linear import effective_linear, linear_with_updates, separate_linear

pytestmark = pytest.mark.usefixtures("nothing_compiled")
AB = {"x", "a0", "b0"}


def mixed(rows: int) -> Any:
    problem = make(3, (rows,), 6, 7, (2,), 1, dtype=torch.float32)
    for name in ("x", "weight"):
        problem.tensors[name] = problem.tensors[name].detach().bfloat16().requires_grad_(name == "x")
    return problem


CASES: dict[str, tuple[Callable[..., Tensor], Any, dict[str, Any]]] = {
    "effective, rows below h": (effective_linear, make(3, (2, 3), 6, 7, (2,), trains=AB), {}),
    "effective, D trains": (effective_linear, make(3, (9,), 6, 7, (2,), 1, dtype=torch.float32), {}),
    "effective, wide": (effective_linear, make(3, (40,), 6, 7, (17,), trains=AB), {}),
    "effective, entries": (effective_linear, make(3, (9,), 6, 7, (3,), entries={"a0", "b0"}, trains=AB), {}),
    "separate, dropout": (separate_linear, make(3, (2, 3), 6, 7, (2,), trains=AB), {"dropout": 0.5}),
    "separate, D": (separate_linear, make(3, (40,), 6, 7, (17,), 1), {}),
    "separate, entries": (separate_linear, make(3, (3,), 6, 7, (3,), entries={"a0", "b0"}, trains=AB), {}),
    "mixed types, few rows": (linear_with_updates, mixed(3), {}),
    "mixed types, many rows": (linear_with_updates, mixed(40), {"dropout": 0.5}),
    "two adapters": (linear_with_updates, make(3, (40,), 6, 7, (2, 3), entries={"b1"}), {}),
}


def step(run: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    out = run(tensors)
    trained = [t for t in tensors.values() if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.double().sin().sum(), trained)]


def same(compiled: list[Tensor], eager: list[Tensor], rtol: float | None = None) -> None:
    for ours, plain in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=None if rtol is None else rtol)


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name):
    """Each path is one graph."""
    path, problem, options = CASES[name]
    run = lambda tensors: call(path, problem, tensors, **options)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    same(step(compiled, problem.tensors), step(run, problem.tensors))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_cut_one_graph(axis, rest):
    """Cut layers are one graph."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    values = draw(2, 6) if axis == 0 else draw(7, 2)
    others = (draw(5, 6) if axis == 0 else draw(7, 4)) if rest else None
    bias_values = draw(2 if axis == 0 else 7)
    bias_rest = draw(5) if rest and axis == 0 else None
    weight, bias, kept = draw(7, 6), draw(7), torch.tensor([1, 4])

    def run(t: dict[str, Tensor]) -> Tensor:
        return cut_linear(t["x"], weight, bias, t["values"], others, t["bias"], bias_rest, kept, axis)

    tensors = {"x": draw(2, 3, 6), "values": values, "bias": bias_values}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    same(step(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors), step(run, tensors))
    assert counters["stats"]["unique_graphs"] == 1


def test_autocast_one_graph():
    """One graph under autocast."""
    problem = make(3, (40,), 6, 7, (2,), 1, dtype=torch.float32)

    def run(tensors: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(linear_with_updates, problem, tensors)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    # W' may be rounded once more or once less on the way
    same(step(compiled, problem.tensors), step(run, problem.tensors), rtol=0.05)


def test_dynamic_rows():
    """Other numbers of rows compile once per path. 6 * 7 / 13 = 3.2 rows: one graph below, one above, where backward
    also asks for 7 rows."""
    problems = {rows: make(3, (rows,), 6, 7, (2,), trains=AB) for rows in (20, 30, 40, 3, 2)}
    compiled = torch.compile(
        lambda t: call(linear_with_updates, problems[20], t), fullgraph=True, backend="aot_eager", dynamic=True
    )
    graphs = []
    for problem in problems.values():
        eager = step(lambda t, p=problem: call(linear_with_updates, p, t), problem.tensors)
        same(step(compiled, problem.tensors), eager)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's own calls of the compiler fail in a folder with a space")
def test_inductor():
    for name in ("effective, D trains", "separate, entries", "mixed types, few rows"):
        path, problem, options = CASES[name]
        run = lambda tensors, a=path, b=problem, c=options: call(a, b, tensors, **c)  # noqa: E731
        compiled = torch.compile(run, fullgraph=True, backend="inductor")
        same(step(compiled, problem.tensors), step(run, problem.tensors), rtol=0.05 if "mixed" in name else 1e-4)
