"""Every path against a slow float64 reference written with plain sums: values and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peft_learners.ops import effective_linear, linear_with_updates, norm_with, separate_linear, wants_effective_weight

PATHS = (separate_linear, effective_linear, linear_with_updates)


def problem(seed, lead, d, h, ranks, denses, bias, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    low = [(draw(r, d), draw(h, r), 0.5 + k) for k, r in enumerate(ranks)]
    dense = [(draw(h, d), 0.25 * (j + 1)) for j in range(denses)]
    return draw(*lead, d), draw(h, d), draw(h) if bias else None, low, dense


def reference(x, weight, bias, low, dense) -> Tensor:
    """Entry by entry, in float64: y[t, o] = sum_i x[t, i] * (W + sum c D + sum s B A)[o, i] + b[o]."""
    full = weight.double()
    for delta, factor in dense:
        full = full + factor * delta.double()
    for a, b, factor in low:
        full = full + factor * sum(torch.outer(b[:, k].double(), a[k].double()) for k in range(a.shape[0]))
    out = (x.double().unsqueeze(-2) * full).sum(-1)
    return out if bias is None else out + bias.double()


def leaves(x, weight, bias, low, dense):
    return [x, weight, *([bias] if bias is not None else []), *(t for a, b, _ in low for t in (a, b)),
            *(delta for delta, _ in dense)]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(0, 2),
    st.booleans(),
)
def test_reference(seed, lead, d, h, ranks, denses, bias):
    """Values and all gradients agree with the float64 reference."""
    args = problem(seed, lead, d, h, ranks, denses, bias)
    expected = reference(*args)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves(*args))
    for path in PATHS:
        out = path(*args)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad((out * weights).sum(), leaves(*args))
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dense_trains", [True, False])
def test_partly_trained(dense_trains):
    """Gradients are right where only some inputs train. After priming D is frozen, and the gradients of A and B come
    from the low-rank products instead of dW."""
    x, weight, bias, low, dense = problem(3, (4, 5), 6, 7, (2,), 1, True)
    weight.requires_grad_(False)
    dense[0][0].requires_grad_(dense_trains)
    trained = [t for t in leaves(x, weight, bias, low, dense) if t.requires_grad]
    wanted = torch.autograd.grad(reference(x, weight, bias, low, dense).pow(2).sum(), trained)
    got = torch.autograd.grad(effective_linear(x, weight, bias, low, dense).pow(2).sum(), trained)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path):
    """First and second derivatives agree with finite differences."""
    x, weight, bias, low, dense = problem(5, (3,), 3, 4, (2,), 1, True)

    def call(x, weight, bias, a, b, delta):
        return path(x, weight, bias, [(a, b, 0.5)], [(delta, 0.25)])

    inputs = (x, weight, bias, low[0][0], low[0][1], dense[0][0])
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("rows,dtype", [(2, torch.bfloat16), (64, torch.bfloat16), (64, torch.float16)])
def test_autocast(rows, dtype):
    """Autocast gives the type and values of a plain linear layer."""
    x, weight, bias, low, dense = problem(0, (rows,), 8, 8, (2,), 1, True, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = linear_with_updates(x, weight, bias, low, dense)
        assert out.dtype == F.linear(x, weight, bias).dtype == dtype
    got = torch.autograd.grad(out.float().pow(2).sum(), leaves(x, weight, bias, low, dense))
    exact = reference(x, weight, bias, low, dense)
    wanted = torch.autograd.grad(exact.pow(2).sum(), leaves(x, weight, bias, low, dense))
    # 8 significant bits in the products, sums of about 10 terms of size 1 to 10
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_layouts():
    """Inputs may be non-contiguous and have four dimensions."""
    x, weight, bias, low, dense = problem(2, (2, 3, 4), 5, 6, (2,), 1, True)
    turned = x.transpose(0, 2)
    for path in PATHS:
        torch.testing.assert_close(path(turned, weight.t().contiguous().t(), bias, low, dense),
                                   reference(turned, weight, bias, low, dense))  # fmt: skip


def test_path():
    """The path depends on shape alone."""
    # d h / (d + h) = 192 at 384 x 384
    assert not wants_effective_weight(192, 384, 384)
    assert wants_effective_weight(193, 384, 384)


def test_effective_stored():
    """The effective path keeps its input and parameters only. Stored for backward beside the parameters: x, (T, d)
    values, and nothing of size (T, r) or (h, d)."""
    x, weight, bias, low, dense = problem(0, (50,), 8, 6, (3,), 1, True)
    own = {t.data_ptr() for t in leaves(x, weight, bias, low, dense)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        effective_linear(x, weight, bias, low, dense)
    assert kept and all(t.data_ptr() in own for t in kept)


def test_norms():
    """Norms at other values are those of the formula."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    weight, bias = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    layer = torch.nn.LayerNorm(8, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    by_hand = centred / (centred.pow(2).mean(-1, keepdim=True) + layer.eps).sqrt() * weight + bias
    torch.testing.assert_close(norm_with(layer, x, weight, bias), by_hand)
    rms = torch.nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
    by_hand = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(norm_with(rms, x, weight, None), by_hand)


def test_norm_half_precision():
    """A norm in half precision doesn't swallow small deltas. bfloat16 has 8 significant bits: 1 + 1/300 is 1 in it, so
    float32 deltas must be added in float32."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64, dtype=torch.bfloat16)
    x = torch.randn(100, 64, dtype=torch.bfloat16)
    weight = norm.weight.float() + 1 / 300
    out = norm_with(norm, x, weight, norm.bias.float())
    assert out.dtype == torch.bfloat16
    exact = F.layer_norm(x.float(), (64,), weight, norm.bias.float())
    assert torch.equal(out, exact.to(torch.bfloat16))
    assert torch.equal(weight.to(torch.bfloat16), norm.weight) and not torch.equal(out, norm(x))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(T5LayerNorm, torch.float16), (LlamaRMSNorm, torch.float32), (GemmaRMSNorm, torch.float32)]
)
def test_norm_other_dtype(kind, dtype):
    """A norm of another type than its input returns what it itself does. T5's goes by its weight, Llama's by the wider
    type, Gemma's by the input."""
    norm = kind(64).half()
    x = torch.randn(5, 64)
    weight = norm.weight.float() + 0.01
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    out = norm_with(norm, x, weight, None)
    assert calls == [1]
    assert out.dtype == dtype == norm(x).dtype
    scale = weight + 1 if kind is GemmaRMSNorm else weight
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()
    torch.testing.assert_close(out.double(), exact, rtol=2**-10, atol=1e-6)


def kept_bytes(call) -> int:
    """Bytes that autograd keeps of what `call` does, parameters aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, LlamaRMSNorm, T5LayerNorm])
def test_norm_stored(kind, dtype):
    """Trained norms keep no activation that the frozen norm doesn't. x is (100, 64): what a trained norm may keep
    beside what the frozen one keeps are its 64 weights and biases."""
    norm = kind(64).to(dtype).requires_grad_(False)
    x = torch.randn(100, 64).to(dtype).requires_grad_()
    frozen = kept_bytes(lambda: norm(x))
    deltas = [torch.nn.Parameter(0.1 * torch.randn(64)) for _ in range(2)]
    weight = norm.weight + deltas[0]
    bias = norm.bias + deltas[1] if kind is torch.nn.LayerNorm else None
    trained = kept_bytes(lambda: norm_with(norm, x, weight, bias))
    assert trained <= frozen + 2 * 64 * 4
    # the gradients are those of the formula, in float32
    wide = x.detach().float().requires_grad_()
    mean = wide.mean(-1, keepdim=True) if bias is not None else 0.0
    eps = norm.eps if bias is not None else norm.variance_epsilon
    by_hand = (wide - mean) / ((wide - mean).pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    by_hand = by_hand if bias is None else by_hand + bias
    wanted = torch.autograd.grad(by_hand.square().sum(), [wide, deltas[0]], retain_graph=True)
    out = norm_with(norm, x, weight, bias)
    got = torch.autograd.grad(out.float().square().sum(), [x, deltas[0]])
    limit = 1e-5 if dtype == torch.float32 else 2**-6  # bfloat16 rounds x's gradient and the output to 8 bits
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.float() - theirs).norm() <= limit * theirs.norm()


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, LlamaRMSNorm])
def test_norm_autocast(kind):
    """Under autocast a trained norm gives the type that the frozen one gives."""
    norm, x = kind(64).to(torch.bfloat16).requires_grad_(False), torch.randn(9, 64).to(torch.bfloat16)
    weight = norm.weight + torch.nn.Parameter(torch.randn(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm_with(norm, x, weight, getattr(norm, "bias", None)).dtype == norm(x).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_bias_stored(dtype):
    """A norm of which only the bias trains keeps nothing."""
    norm, x = torch.nn.LayerNorm(64).to(dtype).requires_grad_(False), torch.randn(100, 64).to(dtype)
    delta = torch.nn.Parameter(torch.randn(64))
    assert kept_bytes(lambda: norm_with(norm, x, norm.weight, norm.bias + delta)) <= 2 * 64 * 4
    out = norm_with(norm, x, norm.weight, norm.bias + delta)
    exact = F.layer_norm(x.float(), (64,), norm.weight.float(), norm.bias.float() + delta.detach())
    torch.testing.assert_close(out, exact.to(dtype))
    (gradient,) = torch.autograd.grad((out.float() * torch.arange(64)).sum(), delta)
    torch.testing.assert_close(gradient, 100.0 * torch.arange(64))


@pytest.mark.parametrize("length", [5, 8])
def test_norm_bias_gradient(length):
    """The bias of a norm with features elsewhere gets its gradient there. GroupNorm's channels are the second
    dimension: d sum(y * w) / d bias_c = sum over rows and positions of w. Of 8 positions and 8 channels a sum over the
    wrong dimension would have the right shape."""
    norm = torch.nn.GroupNorm(2, 8).requires_grad_(False)
    x, w = torch.randn(3, 8, length), torch.randn(3, 8, length)
    delta = torch.nn.Parameter(torch.randn(8))
    out = norm_with(norm, x, norm.weight, norm.bias + delta)
    torch.testing.assert_close(out, F.group_norm(x, 2, norm.weight, delta))
    (gradient,) = torch.autograd.grad((out * w).sum(), delta)
    torch.testing.assert_close(gradient, w.sum((0, 2)))
