"""Parallel bottleneck adapters: what passes from a feed-forward network's input to its last layer."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from bottlenecks import adapted, adapter, llama_network
from peft import get_peft_model
from torch import Tensor, nn
from zoo import logits_of

from peft_learners import BottleneckConfig


class Boom(Exception):
    pass


class Failing(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        raise Boom


def attempt(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the forward pass failed; nothing of its frames is left."""
    try:
        model(**inputs)
    except Boom:
        return True
    return False


@pytest.mark.parametrize("grad", [True, False])
def test_error_in_forward(grad):
    """An error in mid-forward leaves nothing behind."""
    model = adapted("distilbert")
    inputs = zoo.inputs_of("distilbert", model)
    logits = logits_of(model, inputs)
    ffn = model.base_model.model.distilbert.transformer.layer[0].ffn
    activation, seen = ffn.activation, []
    ffn.lin1.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    ffn.activation = Failing()
    with torch.set_grad_enabled(grad):
        assert attempt(model, inputs)
    gc.collect()
    assert [ref() for ref in seen] == [None]
    ffn.activation = activation
    assert torch.equal(logits_of(model, inputs), logits)


def test_nothing_kept():
    """Nothing is kept of a forward pass, nor of a network that is left halfway."""
    model = adapted("llama")
    inputs = zoo.inputs_of("llama", model)
    mlp = model.base_model.model.model.layers[0].mlp
    seen: list[Any] = []
    mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    logits = logits_of(model, inputs)
    whole = mlp.forward
    mlp.forward = lambda x: mlp.gate_proj(x)[..., :16]
    logits_of(model, inputs)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    mlp.forward = whole
    assert torch.equal(logits_of(model, inputs), logits)


def test_threads():
    """Threads get what belongs to their own inputs."""
    model = adapted("bert")
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randint(3, 60, (1 + i % 3, 3 + i % 5), generator=generator) for i in range(40)]
    expected = [logits_of(model, {"input_ids": ids}) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: logits_of(model, {"input_ids": ids}), batches))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


class Reshaping(nn.Module):
    """Rows are put together between the two layers, so that they can't be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first_linear, self.second_linear = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second_linear(self.first_linear(x).relu().flatten(0, 1)).view_as(x)


class Reading(Reshaping):
    """The first layer's weight is read without calling the layer, as fused kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second_linear(F.linear(x, self.first_linear.weight).relu())


class Twice(Reshaping):
    """The last layer is called a second time, without the first."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first_linear(x).relu()
        return self.second_linear(h) + self.second_linear(2 * h)


@pytest.mark.parametrize(("network", "said"), [
    (Reshaping, r"first linear layer \(that got \(2, 3, 4\)\) and the last one \(that got \(6, 6\)\)"),
    (Reading, r"first linear layer \(it was not called\).*exclude_modules.*mode='sequential'"),
    (Twice, r"first linear layer \(it was not called\)"),
])  # fmt: skip
def test_network_does_more_refused(network, said):
    """Networks that do more than apply their layers are refused."""
    model = get_peft_model(network(), BottleneckConfig(mode="parallel"))
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=said):
        model(x)
    with model.disable_adapter():
        assert model(x).shape == x.shape
    sequential = get_peft_model(network(), BottleneckConfig(target_modules=["second_linear"]))
    assert sequential(x).shape == x.shape


def test_unload_hooks():
    """Unloading leaves no hook."""

    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model = adapted("bert")
    twin = copy.deepcopy(model)
    assert hooks(model) == hooks(twin) == 2 * 2  # on the first layer and on the block, of two blocks
    assert hooks(twin.unload()) == 0 and hooks(model) == 4
    inputs = zoo.inputs_of("bert", model)
    assert torch.equal(logits_of(model, inputs), logits_of(copy.deepcopy(model), inputs))
    assert hooks(model.unload()) == 0


class Named(nn.Module):
    """Its two layers lie in a container, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
        self.fails = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.parts["up"](x).relu()
        if self.fails:
            raise Boom
        return self.parts["down"](h)


def test_layers_in_container():
    """Layers in a container leave nothing behind."""
    model = get_peft_model(Named(), BottleneckConfig(mode="parallel", bottleneck_dim=3))
    x = torch.randn(2, 4)
    ref = weakref.ref(x)
    with pytest.raises(Boom):
        model(x)
    del x
    gc.collect()
    assert ref() is None
    model.base_model.model.fails = False
    assert model(torch.randn(2, 4)).shape == (2, 4)


def test_mixed_batch():
    """A mixed batch has parallel adapters beside an active sequential one."""
    model = adapted("llama", "sequential")
    model.add_adapter("beside", BottleneckConfig(mode="parallel", bottleneck_dim=3, task_type="CAUSAL_LM"))
    mlp = model.double().base_model.model.model.layers[0].mlp
    torch.nn.init.normal_(mlp.down_proj.bottleneck_up["beside"].weight)
    taken = []
    mlp.register_forward_hook(lambda _, args, out: taken.append((args[0], out)))
    inputs = zoo.inputs_of("llama", model)
    rows = ["default", "beside", "__base__"]
    assert len(inputs["input_ids"]) == 3 and model.active_adapters == ["default"]
    with torch.no_grad():
        model(**inputs, adapter_names=rows)
    ((x, out),) = taken
    y, layer = llama_network(mlp, x), mlp.down_proj
    expected = y.clone()
    expected[0] += adapter(layer, y[0], torch.relu)
    expected[1] += 4 * adapter(layer, x[1], torch.relu, "beside")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


class Moving(Reshaping):
    """The last layer is another device's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second_linear(self.first_linear(x).relu().to("meta"))


def test_last_layer_device():
    """The last layer may be on another device."""
    base = Moving()
    base.second_linear.to("meta")
    out = get_peft_model(base, BottleneckConfig(mode="parallel", bottleneck_dim=3))(torch.randn(2, 3, 4))
    assert out.is_meta and out.shape == (2, 3, 4)


# -- a first layer that is trained whole ------------------------------------------------------------------------------

WHOLE = {
    "distilbert": ("lin1", lambda model: model.distilbert.transformer.layer, lambda block: block.ffn.lin2),
    "bert": ("intermediate", lambda model: model.bert.encoder.layer, lambda block: block.output.dense),
    "llama": ("gate_proj", lambda model: model.model.layers, lambda block: block.mlp.down_proj),
}


@pytest.mark.parametrize("arch", list(WHOLE))
def test_first_layer_saved_whole(arch):
    """A first layer that is trained whole hands on its input. Its copy alone is changed, so that adapters must do what
    they do with the changed layer in its place."""
    ending, blocks, last = WHOLE[arch]
    model = adapted(arch, modules_to_save=[ending])
    twin = adapted(arch)
    twin.load_state_dict(model.state_dict(), strict=False)
    inputs = zoo.inputs_of(arch, model)
    assert torch.equal(logits_of(model, inputs), logits_of(twin, inputs))
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if name.endswith(f".{ending}"):
                for key, value in module.modules_to_save["default"].named_parameters():
                    value.mul_(1.5)
                    twin.base_model.model.get_parameter(f"{name}.{key}").mul_(1.5)
    logits = logits_of(model, inputs)
    assert torch.equal(logits, logits_of(twin, inputs))
    copied = copy.deepcopy(model)
    model.unload()
    assert torch.equal(logits_of(copied, inputs), logits)
    ours = [last(block) for block in blocks(copied.base_model.model)]
    gc.collect()
    hooks = [h for m in copied.modules() for h in m._forward_pre_hooks.values()]
    receivers = {id(h.__self__._receiver) for h in hooks if hasattr(h, "__self__")}
    assert receivers == {id(layer) for layer in ours}


def test_split_batch_refused():
    """A mixed batch that is split before the network is refused."""
    model = adapted("llama", modules_to_save=["gate_proj"])
    fields = {"bottleneck_dim": 3, "task_type": "CAUSAL_LM", "modules_to_save": ["gate_proj"]}
    model.add_adapter("two", BottleneckConfig(mode="parallel", **fields))
    model.double()
    inputs = zoo.inputs_of("llama", model)
    with torch.no_grad():
        alone = logits_of(model, inputs)
        assert torch.equal(model(**inputs, adapter_names=["default"] * 3).logits, alone)
        with pytest.raises(NotImplementedError, match=r"got [12] of 3 at once.*modules_to_save.*one call per adapter"):
            model(**inputs, adapter_names=["default", "default", "two"])
