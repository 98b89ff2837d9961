"""What a boundary says of layers that had no gradient: what is known, and nothing of those that someone froze."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from torch import nn

from peft_learners import FARConfig, LearnerConfig, NASLoRAConfig

CONFIGS = {
    "learner": lambda: LearnerConfig(r=2, priming_steps=2, task_type="SEQ_CLS"),
    "far": lambda: FARConfig(priming_steps=2, retention_ratio=0.5, task_type="SEQ_CLS"),
    "nas": lambda: NASLoRAConfig(r=2, search_steps=2, parameter_budget=0.4, task_type="SEQ_CLS"),
}


def skipping(model: nn.Module) -> nn.Module:
    """The second block is skipped, as layer-drop does it."""

    def skip(block: nn.Module, args: Any, out: Any) -> Any:
        return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

    model.bert.encoder.layer[1].register_forward_hook(skip)
    return model


def warned(model: PeftModel) -> list[str]:
    """Warnings about layers in a training through the boundary."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(4, 4, optimizer=optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 5):
            model(**zoo.inputs_of("bert", model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.base_model.update_and_allocate(step)
    return [str(w.message) for w in caught if "peft_learners" in w.filename]


def freeze(model: PeftModel, block: int) -> list[str]:
    names = []
    for name, parameter in model.named_parameters():
        if f".layer.{block}." in name and parameter.requires_grad:
            parameter.requires_grad_(False)
            names.append(name)
    return names


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_by_hand(name):
    """What someone froze is not named, nor trained."""
    model = get_peft_model(zoo.build("bert"), CONFIGS[name]())
    frozen = freeze(model, 0)
    assert frozen
    assert warned(model) == []
    parameters = dict(model.named_parameters())
    assert not any(parameters[name].requires_grad for name in frozen if name in parameters)


@pytest.mark.parametrize("name", CONFIGS)
def test_skipped(name):
    """Skipped layers are named as without a gradient, with layer-drop among what may be the case."""
    (text,) = warned(get_peft_model(skipping(zoo.build("bert")), CONFIGS[name]()))
    assert "layer.1." in text and "had" in text and "gradient" in text and "layer-drop" in text
    assert "layer.0." not in text


@pytest.mark.parametrize("name", CONFIGS)
def test_skipped_and_frozen(name):
    """The two are told apart."""
    model = get_peft_model(skipping(zoo.build("bert")), CONFIGS[name]())
    freeze(model, 1)
    assert warned(model) == []
