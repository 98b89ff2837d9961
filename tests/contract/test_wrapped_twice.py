"""One base model wrapped again without `unload()`: a cell that is run a second time, folds in a loop."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from zoo import logits_of

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.layers.base import tuner_layers

CONFIGS = {
    "learner": lambda **given: LearnerConfig(r=4, priming_steps=3, **given),
    "far": lambda **given: FARConfig(priming_steps=3, retention_ratio=0.25, **given),
    "nas": lambda **given: NASLoRAConfig(r=4, search_steps=4, parameter_budget=0.4, **given),
    "bottleneck": lambda **given: BottleneckConfig(bottleneck_dim=8, mode="parallel", **given),
}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")


def wrap(base: nn.Module, config) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(base, config)


def train(model: PeftModel, steps: int = 6) -> list[float]:
    """Losses of a training that goes through all phases, with the state that it leaves behind."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(steps, steps, optimizer=optimizer)
    inputs, losses = zoo.inputs_of("bert", model), []
    model.train()
    for step in range(1, steps + 1):
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    return losses


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_as_the_first_time(name):
    """The second wrapping begins afresh and goes through all phases: losses and values are the first one's bits."""
    base = zoo.build("bert")
    first = wrap(base, CONFIGS[name](task_type="SEQ_CLS"))
    losses, state = train(first), {key: value.clone() for key, value in first.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "You are trying to modify|Already found a `peft_config`|.*(deprecated|primes dense)"
        )
        second = wrap(base, CONFIGS[name](task_type="SEQ_CLS"))
        assert train(second) == losses
    assert len(set(losses)) == len(losses)
    assert same(second.state_dict(), state)
    assert same(second.unload().state_dict(), zoo.build("bert").state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_model_wrapped(name):
    """A `PeftModel` of this package that is wrapped again, as a cell does that names its result as its input."""
    model = wrap(zoo.build("bert"), CONFIGS[name](task_type="SEQ_CLS"))
    losses, names = train(model), list(model.state_dict())
    model = wrap(model, CONFIGS[name](task_type="SEQ_CLS"))
    assert train(model) == losses
    assert list(model.state_dict()) == names


def test_same_config_object():
    """The user's own config object may be given again: it is what the user had made it."""
    base, config = zoo.build("bert"), CONFIGS["nas"](task_type="SEQ_CLS")
    losses = train(wrap(base, config))
    assert config.architecture is not None
    model = wrap(base, config)
    assert config.architecture is None and config.completed_phases == []
    assert train(model) == losses


@pytest.mark.parametrize("name", CONFIGS)
def test_other_tuner_before(name):
    """Another method's adapter of that name is gone, wherever it was."""
    for other in CONFIGS:
        base = zoo.build("bert")
        train(wrap(base, CONFIGS[other](task_type="SEQ_CLS", modules_to_save=["pooler"])))
        again = wrap(base, CONFIGS[name](task_type="SEQ_CLS"))
        fresh = wrap(zoo.build("bert"), CONFIGS[name](task_type="SEQ_CLS"))
        assert same(again.state_dict(), fresh.state_dict())
        trained = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (again, fresh)]
        assert trained[0] == trained[1]
        assert train(again) == train(fresh)
        hooks = [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in b.modules()) for b in (again, fresh)]
        assert hooks[0] == hooks[1]


def test_fewer_layers():
    """Layers that the second adapter leaves out are the original ones again."""
    base = zoo.build("bert")
    train(wrap(base, LearnerConfig(r=4, priming_steps=3, task_type="SEQ_CLS")))
    fewer = {"target_modules": ["query"], "train_norms": False}
    model = wrap(base, LearnerConfig(r=2, priming_epochs=0, **fewer, task_type="SEQ_CLS"))
    assert sum(1 for _ in tuner_layers(model)) == 2
    with model.disable_adapter():
        original = logits_of(zoo.build("bert"), zoo.inputs_of("bert", model))
        assert torch.equal(logits_of(model, zoo.inputs_of("bert", model)), original)


def test_other_adapters_stay():
    """Adapters of other names are kept, and their phases."""
    base = zoo.build("bert")
    model = wrap(base, CONFIGS["learner"](task_type="SEQ_CLS"))
    model.add_adapter("second", CONFIGS["learner"](task_type="SEQ_CLS"))
    model.set_adapter("second")
    train(model)
    logits = logits_of(model, zoo.inputs_of("bert", model))
    again = wrap(base, CONFIGS["learner"](task_type="SEQ_CLS"))
    assert again.active_adapters == ["default"]
    train(again)
    again.set_adapter("second")
    assert torch.equal(logits_of(again, zoo.inputs_of("bert", model)), logits)
    assert again.peft_config["second"].completed_phases == ["priming"]


@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_over(name, tmp_path):
    """An adapter from a file takes the place of the one that the base model was wrapped with."""
    base = zoo.build("bert")
    model = wrap(base, CONFIGS[name](task_type="SEQ_CLS"))
    train(model)
    logits = logits_of(model, zoo.inputs_of("bert", model))
    model.save_pretrained(tmp_path)
    train(wrap(base, CONFIGS[name](task_type="SEQ_CLS")), steps=7)
    back = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits_of(back, zoo.inputs_of("bert", model)), logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_lora_before(name):
    """A stock LoRA of that name is refused, since it would go on acting; nothing changes."""
    base = zoo.build("bert")
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(base, lora)
    state, logits = copy.deepcopy(model.state_dict()), logits_of(model, zoo.inputs_of("bert", model))
    with pytest.raises(ValueError, match=r"still holds the adapter 'default'.* peft\.tuners\.lora.*model\.unload\(\)"):
        get_peft_model(base, CONFIGS[name](task_type="SEQ_CLS"))
    assert same(model.state_dict(), state) and model.peft_config == {"default": lora}
    assert torch.equal(logits_of(model, zoo.inputs_of("bert", model)), logits)
    fresh = wrap(zoo.build("bert"), CONFIGS[name](task_type="SEQ_CLS"))
    assert same(wrap(model.unload(), CONFIGS[name](task_type="SEQ_CLS")).state_dict(), fresh.state_dict())


def test_merged_before():
    """A merged adapter is refused: the sentence names what keeps it and what drops it."""
    base = zoo.build("bert")
    model = get_peft_model(base, LearnerConfig(r=2, init_weights=False, task_type="SEQ_CLS"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into its weights.*model\.unload\(\).*model\.merge_and_unload\(\)"):
        get_peft_model(base, CONFIGS["learner"](task_type="SEQ_CLS"))
