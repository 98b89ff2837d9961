"""Mixed types and autocast: against a float64 reference, and against PEFT's own LoRA of equal A and B."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import (
    CORNERS,
    D_IN,
    D_OUT,
    PATHS,
    RANK,
    SCALE,
    bound_of,
    call,
    exact_results,
    lora,
    make,
    near,
    ours,
    parts_of,
    reference,
    results,
    stored_bytes,
    upstream,
)
from torch import Tensor

from peft_learners.ops.cut import cut_linear
from peft_learners.ops.delta_linear import effective_linear, linear_with_updates, separate_linear

BF16 = torch.bfloat16


@pytest.mark.parametrize("rows", [5, 300])
def test_mixed_near_as_lora(rows):
    """Mixed types come as near to the exact result as LoRA."""
    layer = lora()
    parts = parts_of(layer)
    inputs = torch.randn(rows, D_IN).to(BF16)
    g = torch.randn(rows, D_OUT).to(BF16)
    own, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    doubles = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in parts.items()}
    exact_x = inputs.double().requires_grad_()
    a, b = doubles["a"], doubles["b"]
    exact = F.linear(exact_x, doubles["weight"] + SCALE * b @ a, doubles["bias"])
    wanted = [exact.detach(), *torch.autograd.grad(exact, [exact_x, a, b], g.double())]

    out, lora_out = ours(parts, own), layer(theirs)
    assert out.dtype == lora_out.dtype == BF16
    got = [out, *torch.autograd.grad(out, [own, parts["a"], parts["b"]], g)]
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    peer = [lora_out, *torch.autograd.grad(lora_out, [theirs, *weights], g)]
    assert [t.dtype for t in got] == [BF16, BF16, torch.float32, torch.float32]
    for mine, its, best in zip(got, peer, wanted, strict=True):
        error, its_error = ((t.double() - best).abs().mean() for t in (mine, its))
        # Both round at random: the means of hundreds of errors differ by some per cent.
        assert error <= 1.1 * its_error + 1e-7 * best.abs().mean()


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mixed_stored(rows, dropout):
    """Mixed types store no more than LoRA."""
    layer = lora(dropout).train()
    parts = parts_of(layer)
    x = torch.randn(rows, D_IN).to(BF16).requires_grad_()
    own = stored_bytes(lambda: ours(parts, x, dropout=dropout), *parts.values())
    its = stored_bytes(lambda: layer(x), *layer.parameters())
    # x in bfloat16 and x A^T in float32, and the mask; LoRA has a float32 copy of x
    assert own == rows * (2 * D_IN + 4 * RANK + (D_IN if dropout else 0))
    assert own <= its


def tiny_update(kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor], float]:
    """W of +1 and -1, so that x of ones gives 0; an update of 1/1000, which W's 8 bits can't hold."""
    weight = torch.ones(D_OUT, D_IN, dtype=BF16)
    weight[:, ::2] = -1
    delta = torch.full((D_OUT, D_IN), 1e-3)
    everything = torch.arange(D_OUT)
    runs = {
        "low rank": lambda x: linear_with_updates(
            x, weight, None, [(torch.full((1, D_IN), 1e-3), torch.ones(D_OUT, 1), 1.0)]
        ),
        "dense": lambda x: linear_with_updates(x, weight, None, (), [(delta, 1.0)]),
        "bias": lambda x: linear_with_updates(x, weight, torch.full((D_OUT,), 1e-3 * D_IN), ()),
        "FAR": lambda x: effective_linear(x, weight, None, (), [(delta, 1.0)]),
        "FAR, cut rows": lambda x: cut_linear(x, weight, None, delta, None, None, None, everything, 0),
        "FAR, cut columns": lambda x: cut_linear(x, weight, None, delta, None, None, None, torch.arange(D_IN), 1),
    }
    return weight, runs[kind], 1e-3 * D_IN


@pytest.mark.parametrize(
    "kind,rows",
    [(kind, rows) for kind in ("low rank", "dense", "bias") for rows in (1, 40, 300)]
    + [(kind, 40) for kind in ("FAR", "FAR, cut rows", "FAR, cut columns")],
)
def test_small_updates(kind, rows):
    """Updates below the weight's resolution aren't swallowed."""
    weight, run, exact = tiny_update(kind)
    assert torch.equal(weight + torch.full((), 1e-3, dtype=BF16), weight)
    out = run(torch.ones(rows, D_IN, dtype=BF16))
    assert out.dtype == BF16
    torch.testing.assert_close(out.double(), torch.full_like(out, exact).double(), rtol=2**-7, atol=0)


def test_float32_bias():
    """Biases in float32 reach half-precision outputs in full. W x = 256 and b = 1.5: 257.5 is 258 in bfloat16, but b
    rounded after W x + b would be lost twice."""
    weight = torch.ones(3, 256, dtype=BF16)
    x = torch.ones(2, 256, dtype=BF16)
    out = linear_with_updates(
        x, weight, torch.full((3,), 1.5), [(torch.full((1, 256), 1 / 512), torch.ones(3, 1), 1.0)]
    )
    assert torch.equal(out, torch.full((2, 3), 258, dtype=BF16))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CORNERS)
def test_autocast(name, path, dtype):
    """Autocast agrees with the reference, and gives gradients in the parameters' types."""
    tensors = {n: t.detach().float().requires_grad_(t.requires_grad) for n, t in CORNERS[name].tensors.items()}
    problem = CORNERS[name]._replace(tensors=tensors)
    g = upstream(problem)

    def run(t: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):
            out = call(path, problem, t)
        assert out.dtype == dtype
        return out

    exact, magnitude = exact_results(lambda t: reference(problem, t), tensors, g)
    got = results(run, tensors, g)
    assert all(gradient.dtype == torch.float32 for gradient in got[1:])
    near(got, exact, magnitude, bound_of(dtype))


@pytest.mark.parametrize("path", [*PATHS, linear_with_updates])
def test_autocast_double(path):
    """Autocast leaves double precision alone."""
    problem = make(0, (5,), 6, 7, (2,), 1)
    with torch.autocast("cpu", BF16):
        out = call(path, problem)
    torch.testing.assert_close(out, reference(problem, problem.tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forward_inside", [False, True])
@pytest.mark.parametrize("kind", ["float32", "mixed"])
@pytest.mark.parametrize("rows", [3, 40])
def test_autocast_backward(rows, kind, forward_inside):
    """Backward may run under autocast. As that of `nn.Linear` may: in a region without autocast inside one with it,
    and `loss.backward()` in there."""
    problem = make(0, (rows,), 6, 7, (2,), 1, dtype=torch.float32)
    if kind == "mixed":
        for name in ("x", "weight", "bias"):
            problem.tensors[name] = problem.tensors[name].detach().to(BF16).requires_grad_()
    tensors = list(problem.tensors.values())
    exact, magnitude = exact_results(lambda t: reference(problem, t), problem.tensors, upstream(problem))
    with torch.autocast("cpu", BF16, enabled=forward_inside):
        out = call(linear_with_updates, problem)
    with torch.autocast("cpu", BF16):
        got = torch.autograd.grad(out, tensors, upstream(problem).to(out.dtype))
    assert [t.dtype for t in got] == [t.dtype for t in tensors]
    near([out, *got], exact, magnitude, bound_of(BF16))


@pytest.mark.parametrize("axis", [0, 1])
def test_cut_gradient_types(axis):
    """Cut layers of mixed types keep the gradients' types."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 6).to(BF16).requires_grad_(), torch.randn(7, 6).to(BF16)
    values = torch.randn((2, 6) if axis == 0 else (7, 2)).requires_grad_()
    kept, g = torch.tensor([1, 4]), torch.randn(40, 7).to(BF16)
    out = cut_linear(x, weight, None, values, None, None, None, kept, axis)
    dx, dvalues = torch.autograd.grad(out, [x, values], g)
    assert (out.dtype, dx.dtype, dvalues.dtype) == (BF16, BF16, torch.float32)
    full = g.double().t() @ x.detach().double()
    size = g.double().abs().t() @ x.detach().double().abs()
    near([dvalues], [full.index_select(axis, kept)], [size.index_select(axis, kept)], bound_of(BF16))


@pytest.mark.parametrize("path", [separate_linear, effective_linear, linear_with_updates])
def test_wrong_input_dtype(path):
    """Inputs of another type are refused as by the plain layer."""
    problem = make(0, (5,), 6, 7, (2,))
    x = problem.tensors["x"].detach().float()
    with pytest.raises(RuntimeError) as plain:
        F.linear(x, problem.tensors["weight"])
    with pytest.raises(RuntimeError) as own:
        call(path, problem, {**problem.tensors, "x": x})
    assert str(own.value) == str(plain.value)
