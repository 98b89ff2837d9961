"""The cut linear layer against a dense float64 reference, and what its autograd function keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bound_of, exact_results, near, results

from peft_learners.ops.cut import cut_linear, order_of, others_of, uncut

IN, OUT = 10, 6


def parts(axis: int, kept: list[int], discard: bool, bias: bool, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(OUT, IN, generator=generator).to(dtype)
    shift = torch.randn(OUT, generator=generator).to(dtype) if bias else None
    index = torch.tensor(kept, dtype=torch.long)
    other = others_of(index, (OUT, IN)[axis])
    values = full.index_select(axis, index).requires_grad_()
    rest = None if discard else full.index_select(axis, other)
    bias_values = bias_rest = None
    if shift is not None:
        bias_values = (shift[index] if axis == 0 else shift.clone()).requires_grad_()
        bias_rest = shift[other] if axis == 0 and not discard else None
    if discard:
        full = full.index_fill(axis, other, 0)
        shift = shift.index_fill(0, other, 0) if shift is not None and axis == 0 else shift
    return full, shift, values, rest, bias_values, bias_rest, index


@pytest.mark.parametrize("kept_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_dense_layer(axis, discard, bias, kept_share):
    """Values and gradients agree with the dense layer."""
    length = (OUT, IN)[axis]
    kept = sorted(
        torch.randperm(length, generator=torch.Generator().manual_seed(1))[: int(kept_share * length)].tolist()
    )
    full, shift, values, rest, bias_values, bias_rest, index = parts(axis, kept, discard, bias)
    weight, own_bias = torch.randn(OUT, IN).double(), torch.randn(OUT).double() if bias else None
    x = torch.randn(2, 3, IN).double().requires_grad_()
    reference = x.detach().clone().requires_grad_()
    delta = full.clone().requires_grad_()
    delta_bias = shift.clone().requires_grad_() if shift is not None else None
    expected = F.linear(reference, weight + delta, own_bias + delta_bias if own_bias is not None else None)
    out = cut_linear(x, weight, own_bias, values, rest, bias_values, bias_rest, index, axis)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values.grad, delta.grad.index_select(axis, index), rtol=1e-12, atol=1e-12)
    if bias:
        wanted = delta_bias.grad[index] if axis == 0 else delta_bias.grad
        torch.testing.assert_close(bias_values.grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradcheck(axis, discard):
    """First and second derivatives agree with finite differences."""
    _, _, values, rest, bias_values, bias_rest, index = parts(axis, [1, 3, 4], discard, True)
    weight, bias = torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    x = torch.randn(3, IN).double().requires_grad_()

    def run(x: torch.Tensor, values: torch.Tensor, bias_values: torch.Tensor) -> torch.Tensor:
        return cut_linear(x, weight, bias, values, rest, bias_values, bias_rest, index, axis)

    assert torch.autograd.gradcheck(run, (x, values, bias_values))
    assert torch.autograd.gradgradcheck(run, (x, values, bias_values))


def scattered(part: torch.Tensor, index: torch.Tensor, nodes: int, axis: int) -> torch.Tensor:
    """A part put at its nodes, as a product with a 0-1 matrix."""
    places = F.one_hot(index, nodes).to(part.dtype).view(-1, nodes)
    return places.t() @ part if axis == 0 else part @ places


def cut_reference(t: dict[str, torch.Tensor], index: torch.Tensor, axis: int) -> torch.Tensor:
    nodes = t["weight"].shape[axis]
    other = torch.tensor([i for i in range(nodes) if i not in index.tolist()], dtype=torch.long)
    full = t["weight"] + scattered(t["values"], index, nodes, axis)
    if "rest" in t:
        full = full + scattered(t["rest"], other, nodes, axis)
    out = (t["x"].unsqueeze(-2) * full).sum(-1)
    for name, where in (("bias", None), ("bias_values", index), ("bias_rest", other)):
        if name in t:
            whole = where is None or axis == 1
            out = out + (t[name] if whole else scattered(t[name][:, None], where, nodes, 0)[:, 0])
    return out


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lead=st.lists(st.integers(0, 5), max_size=3),
    d=st.integers(1, 12),
    h=st.integers(1, 12),
    axis=st.integers(0, 1),
    share=st.sampled_from((0.0, 0.3, 0.7, 1.0)),
    rest=st.booleans(),
    bias=st.sampled_from(("none", "frozen", "trained")),
    trains=st.sets(st.sampled_from(("x", "values", "bias_values"))),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
)
def test_random_cuts(seed, lead, d, h, axis, share, rest, bias, trains, dtype):
    """Random cuts agree with the float64 reference."""
    generator = torch.Generator().manual_seed(seed)
    nodes = (h, d)[axis]
    k = round(share * nodes)
    index = torch.randperm(nodes, generator=generator)[:k].sort().values
    shapes: dict[str, tuple[int, ...]] = {"x": (*lead, d), "weight": (h, d)}
    shapes["values"] = (k, d) if axis == 0 else (h, k)
    if rest:
        shapes["rest"] = (h - k, d) if axis == 0 else (h, d - k)
    if bias != "none":
        shapes["bias"] = (h,)
    if bias == "trained":
        shapes["bias_values"] = (k,) if axis == 0 else (h,)
        if rest and axis == 0:
            shapes["bias_rest"] = (h - k,)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_(name in trains)
        for name, shape in shapes.items()
    }

    def run(t: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = (t.get(name) for name in ("bias_values", "bias_rest"))
        return cut_linear(t["x"], t["weight"], t.get("bias"), t["values"], t.get("rest"), *parts, index, axis)

    g = torch.randn((*lead, h), generator=generator).to(dtype)
    exact, magnitude = exact_results(lambda t: cut_reference(t, index, axis), tensors, g)
    near(results(run, tensors, g), exact, magnitude, bound_of(dtype))


@pytest.mark.parametrize("axis,stored", [(0, 5 * IN), (1, 5 * 2)])
def test_stored(axis, stored):
    """Kept for backward are the rows, or the kept columns, of x alone. 5 rows: all 10 columns are needed for kept rows
    of the gradient, 2 of them for kept columns."""
    _, _, values, rest, bias_values, bias_rest, index = parts(axis, [0, 5], False, True, torch.float32)
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(5, IN)
    known = {t.untyped_storage().data_ptr() for t in (weight, bias, values, rest, bias_values, index)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = cut_linear(x, weight, bias, values, rest, bias_values, bias_rest, index, axis)
    assert sum(kept.values()) == stored * 4
    out.sum().backward()


@pytest.mark.parametrize("axis", [0, 1])
def test_autocast(axis):
    """Under autocast the sum is formed in full precision."""
    _, _, values, rest, bias_values, bias_rest, index = parts(axis, [0, 2], False, True, torch.float32)
    weight, bias, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        out = cut_linear(x, weight, bias, values, rest, bias_values, bias_rest, index, axis)
    full = weight + uncut(values, rest, index, (OUT, IN)[axis], axis)
    shift = uncut(bias_values, bias_rest, index, OUT, 0) if axis == 0 else bias_values
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x.bfloat16(), full.bfloat16(), (bias + shift).bfloat16()))
    out.float().sum().backward()
    assert values.grad.dtype == torch.float32


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
@settings(deadline=None, max_examples=50)
def test_order(case):
    """`order` puts every node back in its place."""
    nodes, kept_set = case
    kept = torch.tensor(sorted(kept_set), dtype=torch.long)
    other = others_of(kept, nodes)
    assert torch.cat([kept, other])[order_of(kept, nodes)].tolist() == list(range(nodes))
