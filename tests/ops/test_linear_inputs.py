"""Inputs as callers have them: layouts, few dimensions, no rows, writes in place, reuse, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import training
import zoo
from problems import PATHS, call, make, near, reference, results, upstream
from torch import Tensor

from peft_learners.ops.cut import cut_linear
from peft_learners.ops.delta_linear import linear_with_updates

each_path = pytest.mark.parametrize("path", [*PATHS, linear_with_updates])


def agrees(path, problem, tensors: dict[str, Tensor]) -> None:
    g = upstream(problem._replace(tensors=tensors))
    wanted = results(lambda t: reference(problem, t), tensors, g)
    got = results(lambda t: call(path, problem, t), tensors, g)
    near(got, wanted, [t.abs().amax().expand_as(t) for t in wanted], 1e-12)


@each_path
@pytest.mark.parametrize("rows", [3, 40])
def test_layouts(path, rows):
    """Each tensor may have any layout. Transposed (as Conv1D's weight is read), every second entry, expanded,
    reversed."""
    problem = make(6, (rows,), 6, 7, (2,), 1)
    for name, tensor in problem.tensors.items():
        value = tensor.detach()
        wide = torch.stack([value, value], -1)[..., 0]
        layouts = [value.mT.contiguous().mT if value.dim() == 2 else value, wide, value[:1].expand_as(value)]
        for layout in layouts:
            agrees(path, problem, {**problem.tensors, name: layout.detach().requires_grad_()})


@each_path
@pytest.mark.parametrize("layout", ["transposed", "strided rows", "expanded batch"])
def test_leading_dimensions(path, layout):
    """Leading dimensions that don't flatten into a view work."""
    problem = make(6, (2, 3, 4), 5, 7, (2,), 1)
    x = problem.tensors["x"].detach()
    turned = {"transposed": x.transpose(0, 2), "strided rows": x[:, ::2], "expanded batch": x[:1].expand(6, 3, 4, 5)}
    agrees(path, problem, {**problem.tensors, "x": turned[layout].detach().requires_grad_()})


@each_path
@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (0, 3), (1,), (1, 1, 1, 1)])
def test_shapes(path, lead):
    """Shapes are those of the plain layer."""
    problem = make(6, lead, 5, 7, (2,), 1)
    plain = F.linear(problem.tensors["x"], problem.tensors["weight"])
    out = call(path, problem)
    assert out.shape == plain.shape
    gradients = torch.autograd.grad(out.sum(), list(problem.tensors.values()))
    for tensor, gradient in zip(problem.tensors.values(), gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert bool(gradient.any()) == (out.numel() > 0)


@each_path
def test_no_inputs(path):
    """Layers without inputs give their bias, as the plain layer does."""
    problem = make(6, (3,), 0, 7, (2,))
    t = problem.tensors
    assert torch.equal(F.linear(t["x"], t["weight"], t["bias"]), call(path, problem))


@each_path
@pytest.mark.parametrize("lead", [(5,), (2, 20)])
def test_output_written(path, lead):
    """Callers may write to the output."""
    problem = make(6, lead, 5, 7, (2,), 1)
    tensors = list(problem.tensors.values())
    out = call(path, problem)
    out.mul_(2.0)
    F.relu_(out)
    got = torch.autograd.grad(out.sum(), tensors)
    wanted = torch.autograd.grad((F.relu(reference(problem, problem.tensors)) * 2).sum(), tensors)
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("axis", [0, 1])
def test_cut_output_written(axis):
    """Callers may write to the output of a cut layer."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 4)
    values = torch.randn((2, 4) if axis == 0 else (6, 2), requires_grad=True)
    run = lambda: cut_linear(x, weight, None, values, None, None, None, torch.tensor([0, 3]), axis)  # noqa: E731
    plain = torch.autograd.grad(F.relu(run()).sum(), [x, values])
    for ours, exact in zip(torch.autograd.grad(F.relu_(run()).sum(), [x, values]), plain, strict=True):
        assert torch.equal(ours, exact)


@each_path
def test_saved_written(path):
    """Writes to what backward needs are noticed."""
    problem = make(6, (40,), 5, 7, (2,))
    x = problem.tensors["x"].detach().clone()
    out = call(path, problem, {**problem.tensors, "x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_path
def test_inputs_untouched(path):
    """Inputs and parameters aren't written to."""
    for rows in (3, 40):
        problem = make(6, (rows,), 6, 7, (2,), 1)
        before = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
        out = call(path, problem)
        g = upstream(problem)
        kept = g.clone()
        first = torch.autograd.grad(out, list(problem.tensors.values()), g, retain_graph=True)
        copies = [t.clone() for t in first]
        second = torch.autograd.grad(out, list(problem.tensors.values()), g)
        assert torch.equal(g, kept)
        for name, tensor in problem.tensors.items():
            assert torch.equal(tensor, before[name])
        for one, was, two in zip(first, copies, second, strict=True):
            assert torch.equal(one, was) and torch.equal(one, two)


@each_path
def test_called_twice(path):
    """A layer that is called twice in one graph sums its gradients."""
    problem = make(6, (4,), 6, 6, (2,), 1)
    tensors = list(problem.tensors.values())

    def twice(function) -> Tensor:
        middle = function(problem.tensors).tanh()
        return function({**problem.tensors, "x": middle}).sin().sum()

    got = torch.autograd.grad(twice(lambda t: call(path, problem, t)), tensors)
    wanted = torch.autograd.grad(twice(lambda t: reference(problem, t)), tensors)
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@each_path
def test_no_grad(path):
    """Without gradients nothing is recorded."""
    problem = make(6, (40,), 6, 7, (2,), 1)
    exact = reference(problem, problem.tensors).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = call(path, problem)
        assert not out.requires_grad
        torch.testing.assert_close(out.clone(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tuner", ["learner", "far", "nas"])
def test_copy_after_call(tuner):
    """Models are copied and pickled after a call."""
    model = {"learner": training.learner, "far": training.far, "nas": training.nas}[tuner]()
    inputs = zoo.inputs_of("distilbert", model)
    out = model.train()(**inputs)
    out.loss.backward()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for twin in copies:
        again = twin(**inputs)
        assert torch.equal(again.logits, out.logits)
        again.loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in twin.parameters())
