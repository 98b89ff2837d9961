"""Norms with deltas: values, types, gradients, and what they keep for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peft_learners.ops.norm import norm_with


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
