"""Bottleneck adapters: their arithmetic against references by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from bottlenecks import adapted, adapter, llama_network
from peft import get_peft_model
from torch import Tensor

from peft_learners import BottleneckConfig

# -- the arithmetic -------------------------------------------------------------------------------------------------


def norm(layer: Any, x: Tensor) -> Tensor:
    """LayerNorm with the base's weight and bias plus the deltas."""
    base = layer.base_layer
    weight = base.weight + layer.bottleneck_layernorm_delta["default"].weight
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + base.eps).sqrt()
    return scaled * weight + base.bias + layer.bottleneck_bias_delta["default"].bias


def bert_block(block: Any, x: Tensor, mode: str, scaling: float) -> Tensor:
    """A block of BERT with adapters, from its parameters; two heads, no mask, no dropout."""
    rows, tokens, width = x.shape
    attention = block.attention.self
    q, k, v = (
        (x @ p.weight.T + p.bias).view(rows, tokens, 2, width // 2).transpose(1, 2)
        for p in (attention.query, attention.key, attention.value)
    )
    mixed = (q @ k.transpose(-1, -2) / math.sqrt(width // 2)).softmax(-1) @ v
    joined = mixed.transpose(1, 2).reshape(rows, tokens, width)
    out = block.attention.output.dense
    y = joined @ out.weight.T + out.bias
    if mode == "sequential":
        y = y + scaling * adapter(out, y, torch.tanh)
    x = norm(block.attention.output.LayerNorm, y + x)
    up, down = block.intermediate.dense, block.output.dense
    y = F.gelu(x @ up.weight.T + up.bias) @ down.weight.T + down.bias
    y = y + scaling * adapter(down, y if mode == "sequential" else x, torch.tanh)
    return norm(block.output.LayerNorm, y + x)


@pytest.mark.parametrize(("mode", "given", "scaling"), [("sequential", None, 1), ("parallel", None, 4), *[
    (mode, -2.5, -2.5) for mode in ("sequential", "parallel")
]])  # fmt: skip
def test_bert_blocks(mode, given, scaling):
    """Blocks of BERT are those of the formulas."""
    model = adapted("bert", mode, scaling=given, non_linearity="tanh")
    bert = model.base_model.model.bert
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    x = bert.embeddings(ids)
    for block in bert.encoder.layer:
        x = bert_block(block, x, mode, scaling)
    found = bert(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-12)
    trained = [p for n, p in bert.named_parameters() if p.requires_grad]
    assert len(trained) == {"sequential": 4, "parallel": 2}[mode] * 4 + 4 * 2
    wanted = torch.autograd.grad(x.sin().sum(), trained)
    for ours, theirs in zip(torch.autograd.grad(found.sin().sum(), trained), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def gpt2_network(mlp: Any, x: Tensor) -> Tensor:
    h = x @ mlp.c_fc.weight + mlp.c_fc.bias  # Conv1D: (in, out)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ mlp.c_proj.weight + mlp.c_proj.bias


NETWORKS = {
    "gpt2": (lambda model: model.transformer.h[1].mlp, gpt2_network, lambda mlp: mlp.c_proj),
    "llama": (lambda model: model.model.layers[1].mlp, llama_network, lambda mlp: mlp.down_proj),
}


@pytest.mark.parametrize("arch", list(NETWORKS))
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_conv1d_and_gates(arch, mode):
    """Networks with Conv1D and with gates are those of the formula."""
    find, network, last = NETWORKS[arch]
    mlp = find(adapted(arch, mode, non_linearity="silu", scaling=3.0).base_model.model)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    y = network(mlp, x)
    expected = y + 3.0 * adapter(last(mlp), y if mode == "sequential" else x, lambda h: h * h.sigmoid())
    torch.testing.assert_close(mlp(x), expected, rtol=1e-10, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected.sin().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(mlp(x).sin().sum(), x)[0], wanted, rtol=1e-8, atol=1e-10)


def test_several_active():
    """Active adapters add up, and sequential ones get what the base gives."""
    model = adapted("llama", "parallel")
    others = {"two": {"non_linearity": "tanh"}, "three": {"mode": "parallel", "scaling": 0.5}, "four": {}}
    for name, settings in others.items():
        config = BottleneckConfig(bottleneck_dim=3, init_weights=False, task_type="CAUSAL_LM", **settings)
        model.add_adapter(name, config)
    model.double().base_model.set_adapter(["two", "default", "three", "four"])
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, layer = llama_network(mlp, x), mlp.down_proj
    expected = y + 4 * adapter(layer, x, torch.relu) + adapter(layer, y, torch.tanh, "two")
    expected = expected + 0.5 * adapter(layer, x, torch.relu, "three") + adapter(layer, y, torch.relu, "four")
    torch.testing.assert_close(mlp(x), expected, rtol=1e-10, atol=1e-12)


def test_shared_block():
    """A shared block gets each of its inputs. ALBERT calls one block for all layers: the block of block, by hand."""
    model = adapted("albert", train_norms=False)
    albert = model.base_model.model.albert
    block = albert.encoder.albert_layer_groups[0].albert_layers[0]
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))

    def by_hand(x: Tensor) -> Tensor:
        x = block.attention(x)[0]
        y = F.gelu(block.ffn(x), approximate="tanh") @ block.ffn_output.weight.T + block.ffn_output.bias
        return block.full_layer_layer_norm(y + 4 * adapter(block.ffn_output, x, torch.relu) + x)

    x = albert.encoder.embedding_hidden_mapping_in(albert.embeddings(ids))
    expected = by_hand(by_hand(x))
    torch.testing.assert_close(albert(input_ids=ids).last_hidden_state, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("kept_wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, kept_wide, mode):
    """Half-precision bases give the values of float64, to rounding, with adapters in float32 (PEFT's default) and in
    the base's type; 8 or 11 bits, a few roundings."""
    torch.manual_seed(1)
    config = BottleneckConfig(mode=mode, bottleneck_dim=5, init_weights=False, scaling=4.0, task_type="CAUSAL_LM")
    model = get_peft_model(zoo.build("llama").to(dtype), config, autocast_adapter_dtype=kept_wide).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32 if kept_wide else dtype}
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 16, dtype=dtype)
    found = mlp(x)
    assert found.dtype == dtype
    mlp, x = mlp.double(), x.double()
    y = llama_network(mlp, x)
    expected = y + 4 * adapter(mlp.down_proj, y if mode == "sequential" else x, torch.relu)
    assert (expected - y).abs().max() > 0.1
    error = 2**-6 if dtype == torch.bfloat16 else 2**-9
    assert (found.double() - expected).abs().max() < error * expected.abs().max()


def test_dropout():
    """Dropout drops hidden units, in training alone."""
    model = adapted("llama", dropout=0.5, train_norms=False)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.bottleneck_up["default"].weight.fill_(0.0)
        layer.bottleneck_up["default"].weight[:5] = torch.eye(5)  # hidden unit i alone makes output i
    x = torch.randn(50, 16, dtype=torch.float64)
    y, kept = torch.zeros(50, 16, dtype=torch.float64), adapter(layer, x, torch.relu)
    assert torch.equal(layer._plus(y, "default", x), 4 * kept)
    model.train()
    torch.manual_seed(0)
    bias = layer.bottleneck_up["default"].bias
    ratio = ((layer._plus(y, "default", x) / 4 - bias) / (kept - bias))[:, :5][(kept - bias)[:, :5] > 0]
    assert ratio.isclose(torch.tensor(2.0).double()).logical_or(ratio == 0).all()  # kept units count 1 / (1 - 0.5)
    assert 0.3 < float((ratio == 0).double().mean()) < 0.7
