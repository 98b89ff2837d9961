"""`add_weighted_adapter`: a sum of updates as one adapter, where it is one of the same kind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from tuners import TUNERS
from zoo import causal_lm, logits_of

from peft_learners import LearnerConfig, NASLoRAConfig

WEIGHTS = (0.7, -0.4)


def learner_of(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"priming_epochs": 0, "init_weights": False, "task_type": "CAUSAL_LM", **settings})


def nas_of(**settings: Any) -> NASLoRAConfig:
    return NASLoRAConfig(
        **{"granularity": "structured", "init_weights": False, "task_type": "CAUSAL_LM", "init_seed": 1, **settings}
    )


PAIRS = {
    "learners": (learner_of(r=4), learner_of(r=3, scaling=2.0, target_modules=["q_proj", "o_proj"])),
    "primed and unprimed": (
        learner_of(r=4, priming_epochs=1, priming_lr_scale=0.5, completed_phases=["priming"]),
        learner_of(r=2, train_norms=False),
    ),
    "structured": (nas_of(r=4), nas_of(r=2, init_seed=2, target_modules=["q_proj", "o_proj"])),
    "biases and ranks": (nas_of(r=0), nas_of(r=2, train_biases=False)),
}


def sum_by_hand(base: torch.nn.Module, model: PeftModel) -> dict[str, torch.Tensor]:
    """`W + sum_i w_i (W_i - W)` in float64, with W_i from merging each adapter by itself."""
    total = {name: value.double().clone() for name, value in base.state_dict().items()}
    for adapter, weight in zip(("one", "two"), WEIGHTS, strict=True):
        alone = copy.deepcopy(model)
        alone.set_adapter(adapter)
        for name, value in alone.merge_and_unload().state_dict().items():
            total[name] += weight * (value.double() - base.state_dict()[name].double())
    return total


@pytest.mark.verb(
    "add_weighted_adapter",
    tuners=["Learner", "NAS-LoRA"],
    limit={"NAS-LoRA": "structured adapters alone: unstructured ones are no such sum"},
)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("pair", list(PAIRS))
def test_cat(pair, arch, tmp_path: Path):
    """`cat` is the exact sum, and survives its file."""
    if arch == "llama" and pair == "biases and ranks":
        arch = "gpt2"  # Llama has no biases
    base = causal_lm(arch)
    first, second = (copy.deepcopy(config) for config in PAIRS[pair])
    if arch == "gpt2" and second.target_modules:
        second.target_modules = {"c_attn"}
    torch.manual_seed(4)
    model = get_peft_model(copy.deepcopy(base), first, "one")
    model.add_adapter("two", second)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    active, flags = model.active_adapter, {n: p.requires_grad for n, p in model.named_parameters()}
    expected = sum_by_hand(base, model)

    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "sum", combination_type="cat")
    assert model.active_adapter == active
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in flags} == flags
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in flags)

    model.set_adapter("sum")
    inputs = zoo.inputs_of("llama", base)
    logits = logits_of(model, inputs)
    merged = copy.deepcopy(model).merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    assert torch.equal(logits_of(again, inputs), logits)
    assert again.peft_config["default"].phases_complete


@pytest.mark.parametrize("pair", ["learners", "structured"])
def test_svd(pair):
    """`svd` is the nearest sum of its rank."""
    base = causal_lm("llama")
    torch.manual_seed(4)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(PAIRS[pair][0]), "one")
    model.add_adapter("two", copy.deepcopy(PAIRS[pair][1]))
    expected = sum_by_hand(base, model)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "sum", svd_rank=3)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "wide")
    for adapter, rank in (("sum", 3), ("wide", 4)):
        model.set_adapter(adapter)
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        name = "model.layers.0.self_attn.q_proj.weight"
        delta = expected[name] - base.state_dict()[name].double()
        found = merged[name].double() - base.state_dict()[name].double()
        values = torch.linalg.svdvals(delta)
        assert int((torch.linalg.svdvals(found) > 1e-5).sum()) == rank
        assert float((found - delta).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-3)


@pytest.mark.verb(
    "add_weighted_adapter",
    tuners=["FAR"],
    no="refused: use the adapters together, or export each to LoRA and combine there",
)
def test_sum_refused():
    """Sums that are no adapter of the kind are refused, with a way out."""
    base = causal_lm("gpt2")
    for tuner in ("far", "nas-unstructured"):
        config = TUNERS[tuner].config
        model = get_peft_model(copy.deepcopy(base), config(task_type="CAUSAL_LM"), "one")
        model.add_adapter("two", config(task_type="CAUSAL_LM"))
        with pytest.raises(NotImplementedError, match=r"set_adapter\(\[\.\.\.\]\) adds them up.*peft_learners.export"):
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
        assert list(model.peft_config) == ["one", "two"]


def test_several_heads_refused():
    """A head that several adapters have is refused, as in PEFT."""
    model = get_peft_model(zoo.build("bert"), learner_of(task_type="SEQ_CLS"), "one")
    model.add_adapter("two", learner_of(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="the same module with modules_to_save, but classifier"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")


def test_one_head():
    """One adapter with a head is scaled, and keeps its head."""
    base = zoo.build("bert")
    model = get_peft_model(copy.deepcopy(base), learner_of(r=4, task_type="SEQ_CLS"), "one")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["one"].weight.mul_(3)
    model.add_weighted_adapter(["one"], [0.5], "scaled")
    merged = {}
    for adapter in ("one", "scaled"):
        model.set_adapter(adapter)
        merged[adapter] = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, value in base.state_dict().items():
        if name.startswith("classifier"):
            assert torch.equal(merged["scaled"][name], merged["one"][name])
        else:
            torch.testing.assert_close(merged["scaled"][name], (value + merged["one"][name]) / 2, rtol=0, atol=1e-6)


def test_svd_rank():
    """`svd_rank` holds where one adapter alone has a layer."""
    model = get_peft_model(causal_lm("llama"), learner_of(r=4, target_modules=["q_proj"], train_norms=False), "one")
    model.add_adapter("two", learner_of(r=4, target_modules=["o_proj"], train_norms=False))
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "sum", "svd", 2)
    attention = model.base_model.model.model.layers[0].self_attn
    assert len(attention.q_proj.learner_P1["sum"].weight) == len(attention.o_proj.learner_P1["sum"].weight) == 2


def test_missing_parts():
    """Parts that one adapter lacks add nothing. The bias of c_attn belongs to the first, c_fc to the second, which has
    no biases."""
    model = get_peft_model(causal_lm("gpt2"), learner_of(r=2, target_modules=["c_attn"], train_norms=False), "one")
    model.add_adapter("two", learner_of(r=2, target_modules=["c_fc"], train_biases=False, train_norms=False))
    inputs = zoo.inputs_of("llama", model)
    model.base_model.set_adapter(["one", "two"])
    both = logits_of(model, inputs)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits_of(model, inputs), both, rtol=1e-5, atol=1e-5)


def test_sum_named_as_module():
    """A sum that is called as a module freezes nothing else."""
    model = get_peft_model(causal_lm("llama"), learner_of(), "one")
    model.add_adapter("two", learner_of())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "layers", "cat")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


class Collisions(torch.nn.Module):
    """Modules whose whole names are the ends of others'."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.x, self.y = torch.nn.Linear(6, 6), torch.nn.Module(), torch.nn.Module()
        for part in (self.x, self.y):
            part.lin0, part.lin1 = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin0(x)
        for part in (self.x, self.y):
            x = part.lin1(part.lin0(x).tanh())
        return x


@pytest.mark.parametrize("kind", [learner_of, nas_of])
@pytest.mark.parametrize("targets", [{"exclude_modules": ["x.lin0", "y.lin0"]}, {"target_modules": "lin0"}])
def test_similar_module_names(kind, targets, tmp_path: Path):
    """Modules whose names end alike aren't mixed up."""
    torch.manual_seed(0)
    base, x = Collisions(), torch.randn(3, 6)
    model = get_peft_model(copy.deepcopy(base), kind(r=2, task_type=None, **targets), "one").eval()
    model.add_weighted_adapter(["one"], [1.0], "same", "cat")
    model.save_pretrained(tmp_path)
    for adapter in ("one", "same"):
        model.set_adapter(adapter)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / adapter).eval()
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    model.set_adapter("one")
    expected = model(x)
    model.set_adapter("same")
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "linear"}, r"one of \('cat', 'svd'\), got 'linear'"),
        ({"combination_type": "ties", "svd_rank": 2}, "got 'ties'"),
        ({"svd_rank": 0}, "svd_rank must be"),
        ({"adapters": ["one", "nobody"]}, "names of adapters of the model"),
        ({"weights": [1.0]}, "one finite number for each of 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "one finite number for each of 2 adapters"),
        ({"adapters": ["one", "one"]}, "different names"),
        ({"svd_rank": 2.0}, "svd_rank must be"),
        ({"adapter_name": "keys"}, "Take another: 'keys_1'"),
        ({"adapter_name": "two"}, "must be a new name"),
    ],
)
def test_wrong_arguments(arguments, message):
    """Wrong arguments are named."""
    model = get_peft_model(causal_lm("gpt2"), learner_of(), "one")
    model.add_adapter("two", learner_of())
    call = {"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**call)
    assert list(model.peft_config) == ["one", "two"]
