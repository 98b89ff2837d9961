"""FAR: which nodes are kept, and that training them is training a part of the dense model, step for step."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import zoo
from peft import get_peft_model
from torch import nn
from training import sgd

from peft_learners import FARConfig, ScheduleError

LR = 1e-2
ARCHS = ["distilbert", "bert", "albert", "mobilebert", "gpt2", "llama", "t5", "vit"]


def far(base: nn.Module, **settings: Any) -> nn.Module:
    return get_peft_model(base, FARConfig(**{"retention_ratio": 0.25, "priming_steps": 2, **settings}))


def merged_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Values of the whole model with the adapter merged, under the base model's names."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


def steps(model: nn.Module, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, number: int) -> list:
    losses = []
    for _ in range(number):
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("granularity", ["hidden_unit", "output_node"])
@pytest.mark.parametrize("arch", ARCHS)
def test_full_retention(arch, granularity):
    """With a retention of 1, FAR is full fine-tuning step for step."""
    base = zoo.build(arch).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in zoo.inputs_of(arch, base).items()}
    full = copy.deepcopy(base)
    model = far(base, retention_ratio=1.0, granularity=granularity, task_type=zoo.ZOO[arch].task_type)
    # At the usual eps Adam blows up the rounding of gradients that vanish (ViT's keys) to steps of their own.
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=LR, eps=1e-4, weight_decay=0.0)
                  for m in (full, model)]  # fmt: skip
    model.base_model.set_schedule(total_steps=6, optimizer=optimizers[1])
    for step in range(1, 7):
        expected = steps(full, inputs, optimizers[0], 1)
        assert steps(model, inputs, optimizers[1], 1) == pytest.approx(expected, rel=1e-9), step
        model.base_model.update_and_allocate(step)
    assert model.peft_config["default"].reconfigured
    values = merged_values(model)
    for name, value in full.state_dict().items():
        torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def moved_by_hand(granularity: str) -> nn.Module:
    """DistilBERT (32 hidden units, 16 wide, 2 layers) whose FFN deltas are set by hand; a quarter of nodes is kept."""
    model = far(zoo.build("distilbert"), granularity=granularity, retention_ratio=0.125)
    for module in model.modules():
        for container in ("far_delta", "far_bias_delta"):
            if hasattr(module, container) and "default" in getattr(module, container):
                module.value(container, "default").data.zero_()
    return model


def ffn(model: nn.Module, layer: int) -> tuple[Any, Any]:
    block = model.base_model.model.distilbert.transformer.layer[layer].ffn
    return block.lin1, block.lin2


def reconfigure(model: nn.Module) -> None:
    model.base_model.set_schedule(total_steps=10, optimizer=sgd(model))
    model.base_model.update_and_allocate(2)


def test_most_moved_kept():
    """Exactly the hidden units that moved most are kept."""
    model = moved_by_hand("hidden_unit")
    lin1, lin2 = ffn(model, 0)
    # Sums of absolute changes per unit: row of lin1 plus column of lin2. 0.125 * 32 = 4 are kept.
    lin1.far_delta["default"].weight.data[3, :] = -1.0  # 16 * 1 = 16
    lin2.far_delta["default"].weight.data[:, 9] = 2.0  # 16 * 2 = 32
    lin1.far_delta["default"].weight.data[20, 0] = 5.0  # 5 + 16 * 0.75 = 17
    lin2.far_delta["default"].weight.data[:, 20] = 0.75
    lin2.far_delta["default"].weight.data[0, 31] = -15.0  # 15
    lin1.far_delta["default"].weight.data[7, 5] = 14.0  # 14: the fifth
    lin1.far_bias_delta["default"].bias.data[11] = 100.0  # a bias does not count
    reconfigure(model)
    for layer in (lin1, lin2):
        assert layer.far_kept["default"].tolist() == [3, 9, 20, 31]
    assert lin1.far_delta["default"].weight.shape == (4, 16) and lin2.far_delta["default"].weight.shape == (16, 4)
    assert lin1.far_delta["default"].weight[2, 0] == 5.75 - 0.75 and lin2.far_delta["default"].weight[0, 2] == 0.75
    # What is not kept keeps what it learned: unit 7 is the row 7 - 1 (3 is kept below it) of the rest.
    assert lin1.far_rest["default"][6, 5] == 14.0 and lin1.far_bias_rest["default"][11 - 2] == 100.0


def test_l2():
    """L2 ranks by squares."""
    model = moved_by_hand("hidden_unit")
    lin1, lin2 = ffn(model, 0)
    model.peft_config["default"].selection = "l2"
    lin1.far_delta["default"].weight.data[3, :] = 1.0  # l1 16, l2 4
    for unit in (1, 2, 5, 30):
        lin1.far_delta["default"].weight.data[unit, 0] = 6.0  # l1 6, l2 6
    reconfigure(model)
    assert lin2.far_kept["default"].tolist() == [1, 2, 5, 30]


def test_output_nodes():
    """Output nodes are ranked in each linear layer by itself."""
    model = moved_by_hand("output_node")
    lin1, lin2 = ffn(model, 1)
    lin1.far_delta["default"].weight.data[[4, 8, 15, 16], 0] = 1.0
    lin2.far_delta["default"].weight.data[[3, 12], 0] = 1.0  # 0.125 * 16 = 2
    reconfigure(model)
    assert lin1.far_kept["default"].tolist() == [4, 8, 15, 16]
    assert lin2.far_kept["default"].tolist() == [3, 12]
    assert lin2.far_delta["default"].weight.shape == (2, 32) and lin2.far_bias_delta["default"].bias.shape == (2,)


def test_ties():
    """Of nodes that moved equally far, the lower index is kept."""
    model = moved_by_hand("hidden_unit")
    lin1, _ = ffn(model, 0)
    lin1.far_delta["default"].weight.data[[2, 31], 0] = 1.0  # two moved, the other two places are a tie at 0
    reconfigure(model)
    assert lin1.far_kept["default"].tolist() == [0, 1, 2, 31]


def test_gated_units():
    """Gated units have a row in gate and up, and a column in down."""
    model = far(zoo.build("llama"), retention_ratio=1 / 32)
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.gate_proj.far_delta["default"].weight.data[5, 0] = 1.0
    mlp.up_proj.far_delta["default"].weight.data[5, 0] = 1.0
    mlp.down_proj.far_delta["default"].weight.data[0, 6] = 1.5
    reconfigure(model)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert getattr(mlp, name).far_kept["default"].tolist() == [5], name


def test_random_selection():
    """Random nodes follow the seed alone."""
    kept = {}
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        model = far(zoo.build("distilbert"), selection="random", seed=seed, priming_steps=0)
        torch.manual_seed(hash(name) % 1000)
        model.base_model.set_schedule(total_steps=10)
        kept[name] = [ffn(model, layer)[0].far_kept["default"].tolist() for layer in (0, 1)]
    assert kept["a"] == kept["again"] != kept["b"]
    assert kept["a"][0] != kept["a"][1]
    assert all(len(k) == 8 == len(set(k)) and k == sorted(k) for k in kept["a"])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("granularity", ["hidden_unit", "output_node"])
@pytest.mark.parametrize("arch", ["distilbert", "gpt2", "llama"])
def test_frozen_entries(arch, granularity, discard, ratio):
    """Kept entries train as the dense model does, and frozen ones not by a bit."""
    model = far(
        zoo.build(arch).double(), retention_ratio=ratio, granularity=granularity, discard_unkept=discard,
        task_type=zoo.ZOO[arch].task_type,
    )  # fmt: skip
    inputs = zoo.inputs_of(arch, model)
    inputs = {k: torch.cat([v] * 3) for k, v in inputs.items()}  # 63 rows: the path that forms W + D
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.base_model.set_schedule(total_steps=10, optimizer=optimizer)
    primed = merged_values(model)
    for step in (1, 2):
        steps(model, inputs, optimizer, 1)
        if step == 2:
            primed = merged_values(model)
        model.base_model.update_and_allocate(step)
    before = merged_values(model)
    if not discard:
        assert all(torch.equal(before[n], v) for n, v in primed.items())  # the cut itself changes nothing
    dense = zoo.build(arch).double()
    dense.load_state_dict(before)
    dense(**inputs).loss.backward()
    model(**inputs).loss.backward()
    base = dict(zoo.build(arch).double().named_parameters())
    compared = 0
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "far_kept") or "default" not in layer.far_kept:
            continue
        kept, nodes = layer.far_kept["default"], layer.far_nodes["default"]
        gradient = dense.get_parameter(f"{name}.weight").grad
        gradient = gradient.t() if arch == "gpt2" else gradient
        expected = gradient.index_select(nodes.axis, kept)
        torch.testing.assert_close(layer.far_delta["default"].weight.grad, expected, rtol=1e-9, atol=1e-12)
        if "default" in layer.far_bias_delta:
            expected = dense.get_parameter(f"{name}.bias").grad
            expected = expected[kept] if nodes.axis == 0 else expected
            torch.testing.assert_close(layer.far_bias_delta["default"].bias.grad, expected, rtol=1e-9, atol=1e-12)
        compared += 1
    assert compared == {"distilbert": 4, "gpt2": 4, "llama": 6}[arch]
    optimizer.step()
    optimizer.zero_grad()
    steps(model, inputs, optimizer, 2)
    after = merged_values(model)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "far_kept") and "default" in layer.far_kept:
            axis, kept = layer.far_nodes["default"].axis, layer.far_kept["default"]
            axis = 1 - axis if arch == "gpt2" else axis
            frozen = [i for i in range(before[f"{name}.weight"].shape[axis]) if i not in kept.tolist()]
            ours, theirs = (v[f"{name}.weight"].index_select(axis, torch.tensor(frozen, dtype=torch.long))
                            for v in (before, after))  # fmt: skip
            assert torch.equal(ours, theirs)
            if discard:
                pretrained = base[f"{name}.weight"].index_select(axis, torch.tensor(frozen, dtype=torch.long))
                assert torch.equal(theirs, pretrained)
            if len(kept):
                ours, theirs = (v[f"{name}.weight"].index_select(axis, kept) for v in (before, after))
                assert (ours != theirs).all(dim=1 - axis).any()


def test_loss_still_around():
    """A loss that is still around doesn't hinder the boundary."""
    model = far(zoo.build("distilbert"))
    inputs = zoo.inputs_of("distilbert", model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    kept_alive = []
    for step in range(1, 6):
        loss = model(**inputs).loss
        kept_alive.append(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    lin1, lin2 = ffn(model, 0)
    values = [lin1.far_delta["default"], lin2.far_delta["default"], lin1.far_bias_delta["default"]]
    for parameter in (value.parameter for value in values):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert parameter in {p for group in optimizer.param_groups for p in group["params"]}


def test_optimizer_state_kept():
    """The optimizer's state of kept entries is carried over."""
    model = far(zoo.build("distilbert"))
    inputs = zoo.inputs_of("distilbert", model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    model.base_model.update_and_allocate(0)
    steps(model, inputs, optimizer, 2)
    lin1, lin2 = ffn(model, 0)
    before = [optimizer.state[layer.far_delta["default"].weight]["exp_avg_sq"].clone() for layer in (lin1, lin2)]
    model.base_model.update_and_allocate(2)
    kept = lin1.far_kept["default"]
    after = [optimizer.state[layer.far_delta["default"].weight]["exp_avg_sq"] for layer in (lin1, lin2)]
    assert torch.equal(after[0], before[0][kept]) and torch.equal(after[1], before[1][:, kept])
    assert optimizer.state[lin1.far_delta["default"].weight]["step"] == 2


def test_factored_optimizer():
    """A factored optimizer starts afresh on the cut weights."""
    from transformers import Adafactor

    model = far(zoo.build("distilbert"))
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad])
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    inputs = zoo.inputs_of("distilbert", model)
    for step in range(1, 5):
        steps(model, inputs, optimizer, 1)
        model.base_model.update_and_allocate(step)
    delta = ffn(model, 0)[0].far_delta["default"].weight
    assert delta.shape == (8, 16) and optimizer.state[delta]["exp_avg_sq_row"].shape == (8,)
    assert optimizer.state[delta]["step"] == 2  # steps 3 and 4


def test_shared_weights(monkeypatch):
    """Weights that modules share have one delta."""
    monkeypatch.delitem(sys.modules, "trl", raising=False)  # where it is imported, the LM head is warned of
    config = zoo.tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0)
    base = zoo.tf.GPT2LMHeadModel(config)
    total = sum(p.numel() for p in base.parameters())
    assert base.lm_head.weight is base.transformer.wte.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = far(base, task_type="CAUSAL_LM")
    assert model.get_nb_trainable_parameters()[0] == total
    inputs = zoo.inputs_of("llama", model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    steps(model, inputs, optimizer, 2)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.transformer.wte.weight
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_small_variant():
    """Small variant trains no embeddings."""
    base = zoo.build("distilbert")
    total = sum(p.numel() for p in base.parameters())
    embeddings = sum(p.numel() for p in base.distilbert.embeddings.parameters())
    model = far(base, train_embeddings=False)
    assert model.get_nb_trainable_parameters()[0] == total - embeddings


@pytest.mark.parametrize(
    "flag,endings",
    [
        ("train_attention", ("q_lin.weight", "k_lin.weight", "v_lin.weight", "out_lin.weight",
                             "q_lin.bias", "k_lin.bias", "v_lin.bias", "out_lin.bias")),
        ("train_norms", ("norm.weight", "norm.bias")),
        ("train_biases", ("lin.bias", "lin1.bias", "lin2.bias")),
    ],
)  # fmt: skip
def test_flags(flag, endings):
    """The flags leave parts out."""
    base = zoo.build("distilbert")
    left_out = sum(
        p.numel()
        for n, p in base.named_parameters()
        if n.lower().endswith(endings) and not n.startswith(("pre_classifier", "classifier"))
    )
    total = sum(p.numel() for p in base.parameters())
    model = far(base, **{flag: False})
    assert model.get_nb_trainable_parameters()[0] == total - left_out and left_out > 0


def test_no_pairs_refused():
    """A model without feed-forward pairs is refused."""
    config = zoo.tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(ValueError, match="found no feed-forward pair in the MambaModel.*ffn_modules="):
        far(zoo.tf.MambaModel(config))
    model = far(zoo.build("distilbert"), target_modules=["q_lin"])
    with pytest.raises(ScheduleError, match=r"none of the 2 feed-forward pairs of the DistilBert.*'target_modules'"):
        model.base_model.set_schedule(total_steps=10)


def test_named_pairs():
    """Pairs can be named."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc_in, self.fc_out = nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc_out(self.fc_in(x).relu())

    with pytest.raises(ValueError, match="found no feed-forward pair in the Net"):
        far(Net())
    model = far(Net(), ffn_modules=[["fc_in", "fc_out"]], retention_ratio=0.5)
    model.base_model.model.fc_in.far_delta["default"].weight.data[0, 0] = 1.0
    reconfigure(model)
    assert model.base_model.model.fc_out.far_delta["default"].weight.shape == (4, 6)
    with pytest.raises(ValueError, match=r"got \['fc_in', 'fc_up'\], which matches nothing.*fc_in, fc_out"):
        far(Net(), ffn_modules=[["fc_in", "fc_up"]])


def test_restart_phases():
    """Restarted phases go on from where the adapter is."""
    model = far(zoo.build("distilbert"))
    inputs = zoo.inputs_of("distilbert", model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    for step in range(1, 5):
        steps(model, inputs, optimizer, 1)
        model.base_model.update_and_allocate(step)
    before, trained = merged_values(model), model.get_nb_trainable_parameters()[0]
    model.base_model.restart_phases()
    assert all(torch.equal(v, before[n]) for n, v in merged_values(model).items())
    assert model.get_nb_trainable_parameters()[0] > trained
    assert not model.peft_config["default"].reconfigured
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    for step in range(1, 5):
        steps(model, inputs, optimizer, 1)
        model.base_model.update_and_allocate(step)
    assert model.get_nb_trainable_parameters()[0] == trained
