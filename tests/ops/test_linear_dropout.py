"""Dropout on the input of the low-rank terms: what it draws, keeps and leaves alone."""

from __future__ import annotations

import pytest
import torch
from problems import call, lora, make, near, ours, parts_of, reference, results, stored_bytes, upstream
from torch import Tensor

from peft_learners.ops.delta_linear import linear_with_updates, separate_linear

TINY = torch.finfo(torch.float64).eps


def draw(problem, p: float, seed: int = 0, **changes: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return call(linear_with_updates, problem, {**problem.tensors, **changes}, dropout=p)


def mask_of(rows: int, d: int, p: float, seed: int) -> Tensor:
    """The mask that a draw takes, told from its output: x = 1, W = 0, A = B = s = 1, rank d."""
    torch.manual_seed(seed)
    eye = torch.eye(d, dtype=torch.float64)
    ones = torch.ones(rows, d, dtype=torch.float64)
    return separate_linear(ones, torch.zeros_like(eye), None, [(eye, eye, 1.0)], dropout=p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    """Entries are kept at the asked rate, and scaled up."""
    mask = mask_of(200, 50, p, seed=1)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    # 10 000 draws: a standard deviation of sqrt(p (1 - p) / 10 000) <= 0.005
    assert abs((mask == 0).double().mean() - p) < 0.02
    by_column, by_row = ((mask == 0).double().mean(dim) for dim in (0, 1))
    assert by_column.std() < 0.1 and by_row.std() < 0.15  # no column or row is dropped as one


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("rows", [4, 40])
def test_reference(rows, dense):
    """Values and gradients agree with the reference at the same mask."""
    problem = make(1, (rows,), 6, 7, (3,), dense)
    mask, g = mask_of(rows, 6, 0.4, seed=5), upstream(problem)
    wanted = results(lambda t: reference(problem, t, mask), problem.tensors, g)
    got = results(lambda t: draw(problem, 0.4, 5, **t), problem.tensors, g)
    near(got, wanted, [t.abs().amax().expand_as(t) for t in wanted], 1000 * TINY)


def test_mean():
    """The mean over many draws approaches the output without dropout."""
    problem = make(1, (3,), 6, 7, (2,), 1)
    draws = torch.stack([draw(problem, 0.3, seed).detach() for seed in range(2000)])
    exact = reference(problem, problem.tensors).detach()
    error = (draws.mean(0) - exact).abs()
    assert (draws.std(0) > 0.01).all()
    assert (error < 5 * draws.std(0) / 2000**0.5).all()  # 21 outputs, five standard errors


def test_extremes():
    """No dropout is exact, and full dropout leaves the base."""
    problem = make(1, (40,), 6, 7, (2,), 1)
    assert torch.equal(draw(problem, 0.0), call(linear_with_updates, problem))
    without = problem._replace(ranks=())
    torch.testing.assert_close(draw(problem, 1.0), reference(without, problem.tensors), rtol=1e-12, atol=1e-12)
    gradients = results(lambda t: draw(problem, 1.0, **t), problem.tensors, upstream(problem))
    by_name = dict(zip(problem.trained(), gradients[1:], strict=True))
    assert not by_name["a0"].any() and not by_name["b0"].any() and by_name["D0"].any()


def test_seed():
    """The generator's seed decides, and each call draws anew."""
    problem = make(1, (5,), 6, 7, (2,))
    assert torch.equal(draw(problem, 0.5, 3), draw(problem, 0.5, 3))
    assert not torch.equal(draw(problem, 0.5, 3), draw(problem, 0.5, 4))
    again = call(linear_with_updates, problem, dropout=0.5)
    assert not torch.equal(again, call(linear_with_updates, problem, dropout=0.5))


@pytest.mark.parametrize("entries", [(), ("a0", "b0")])
def test_backward_mask(entries):
    """Backward takes the mask of its forward pass."""
    problem = make(1, (4,), 5, 6, (3,), entries=entries)

    def run(*tensors: Tensor) -> Tensor:
        return draw(problem, 0.5, 9, **dict(zip(problem.tensors, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, list(problem.tensors.values()))
    out = run(*problem.tensors.values())
    torch.manual_seed(77)  # whatever is drawn between forward and backward
    later = torch.autograd.grad(out.sum(), problem.tensors["a0"])[0]
    assert torch.equal(later, torch.autograd.grad(run(*problem.tensors.values()).sum(), problem.tensors["a0"])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored(dtype):
    """A byte per entry is stored, and less than by LoRA."""
    layer = lora(0.2, dtype).train()
    parts, (rows, d, rank) = parts_of(layer), (30, 64, 4)
    x = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    own = stored_bytes(lambda: ours(parts, x, dropout=0.2), *parts.values())
    its = stored_bytes(lambda: layer(x), *layer.parameters())
    assert own == rows * (d * dtype.itemsize + d + 4 * rank)
    # LoRA's dropout keeps a mask, and a float32 copy of x that is dropped
    assert its >= own + rows * d * (4 - dtype.itemsize)


def test_nothing_to_drop():
    """No mask is drawn or kept where there is nothing to drop."""
    problem = make(1, (5,), 6, 7, (), 1)
    state = torch.get_rng_state()
    own = stored_bytes(lambda: call(linear_with_updates, problem, dropout=0.5), *problem.tensors.values())
    assert own == 0 and torch.equal(torch.get_rng_state(), state)
