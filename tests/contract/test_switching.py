"""Five adapters of different configs and phases on one base, switched at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import PeftConfig, PeftModel, get_peft_model
from zoo import logits_of

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig

STEPS = 200
#: By tuner: five configs, and whether the adapter is taken through all of its phases.
ADAPTERS: dict[str, dict[str, tuple[PeftConfig, bool]]] = {
    "learner": {
        "in_priming": (LearnerConfig(r=4, priming_epochs=1, priming_lr_scale=0.5), False),
        "primed": (LearnerConfig(r=3, priming_epochs=1, priming_modules=["query", "value"]), True),
        "unprimed": (LearnerConfig(r=2, priming_epochs=0, scaling=2.0, learner_dropout=0.1), True),
        "attention": (LearnerConfig(r=4, priming_epochs=0, target_modules=["query", "key"], train_biases=False), True),
        "last_block": (LearnerConfig(r=4, priming_epochs=1, layers_to_transform=[1], rank_pattern={"key": 1}), True),
    },
    "far": {
        "in_priming": (FARConfig(priming_epochs=1, retention_ratio=0.25), False),
        "hidden_unit": (FARConfig(priming_epochs=1, retention_ratio=0.25), True),
        "output_node": (FARConfig(priming_epochs=1, retention_ratio=0.5, granularity="output_node"), True),
        "discarded": (FARConfig(priming_epochs=1, retention_ratio=0.1, discard_unkept=True), True),
        "small": (FARConfig(priming_epochs=1, train_embeddings=False, train_norms=False, selection="random"), True),
    },
    "nas": {
        "in_search": (NASLoRAConfig(r=4), False),
        "structured": (NASLoRAConfig(r=4, granularity="structured", parameter_budget=0.5), True),
        "unstructured": (NASLoRAConfig(r=3, parameter_budget=0.3, init="lora"), True),
        "biases": (NASLoRAConfig(r=0, parameter_budget=0.5), True),
        "last_block": (NASLoRAConfig(r=2, target_modules=["query", "dense"], layers_to_transform=[1]), True),
    },
    "bottleneck": {
        "sequential": (BottleneckConfig(bottleneck_dim=8, scaling=3.0), True),
        "parallel": (BottleneckConfig(mode="parallel", bottleneck_dim=8, dropout=0.1), True),
        "last_block": (BottleneckConfig(mode="parallel", bottleneck_dim=6, layers_to_transform=[1]), True),
        "attention": (BottleneckConfig(scaling=3.0, target_modules=["attention.output.dense"]), True),
        "no_norms": (BottleneckConfig(bottleneck_dim=4, scaling=3.0, non_linearity="tanh", train_norms=False), True),
    },
}
PAIRS = {
    "learner": [("primed", "attention"), ("last_block", "in_priming")],
    "far": [("hidden_unit", "output_node"), ("small", "in_priming")],
    "nas": [("structured", "unstructured"), ("biases", "in_search")],
    "bottleneck": [("sequential", "parallel"), ("parallel", "last_block")],
}


def masked_lm() -> torch.nn.Module:
    """With tied embeddings, and no new head: PEFT lets several adapters be active where none has a head."""
    torch.manual_seed(0)
    config = tf.BertConfig(**zoo.SMALL, max_position_embeddings=32)
    return tf.BertForMaskedLM(config).eval()


def move(model: torch.nn.Module) -> None:
    """As a longer training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def add_all(tuner: str, base: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> PeftModel:
    """A model with the five adapters; those that are to go through their phases are trained for two steps."""
    model: Any = None
    for seed, (name, (config, through)) in enumerate(ADAPTERS[tuner].items()):
        torch.manual_seed(seed)
        if model is None:
            model = get_peft_model(base, copy.deepcopy(config), adapter_name=name)
        else:
            model.add_adapter(name, copy.deepcopy(config))
        model.set_adapter(name)
        move(model)
        if through:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            model.base_model.set_schedule(total_steps=2, steps_per_epoch=1, optimizer=optimizer)
            model.train()
            for step in (1, 2):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                model.base_model.update_and_allocate(step)
            move(model)
    return model.eval()


def own_logits(
    model: PeftModel,
    base: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    out: Path,
    together: Sequence[tuple[str, ...]] = (),
) -> dict[tuple[str, ...], torch.Tensor]:
    """Of each adapter (and each of the pairs), loaded from its file into a model that holds nothing else."""
    model.save_pretrained(out)
    found = {(): logits_of(base, inputs)}
    for names in [*((name,) for name in model.peft_config), *together]:
        alone = PeftModel.from_pretrained(copy.deepcopy(base), out / names[0], adapter_name=names[0])
        for name in names[1:]:
            alone.load_adapter(out / name, name)
        alone.base_model.set_adapter(list(names))
        found[names] = logits_of(alone, inputs)
    return found


@pytest.fixture
def masked() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    base = masked_lm()
    inputs = zoo.inputs_of("bert", base)
    return base, {**inputs, "labels": inputs["input_ids"].clone()}


def all_differ(own: dict[tuple[str, ...], torch.Tensor]) -> bool:
    values = list(own.values())
    return not any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.verb("set_adapter")
@pytest.mark.verb("disable_adapter")
@pytest.mark.verb("unload")
@pytest.mark.parametrize("tuner", list(ADAPTERS))
def test_five_adapters(tuner, tmp_path: Path):
    """Five adapters switch without a trace. They are never merged: every output is each adapter's own to the bit, and
    the base comes back to the bit."""
    base = zoo.build("bert")
    inputs = zoo.inputs_of("bert", base)
    original = copy.deepcopy(base)
    model = add_all(tuner, base, inputs)
    own = own_logits(model, original, inputs, tmp_path)
    assert all_differ(own)
    generator = random.Random(5)
    for _ in range(STEPS):
        name = generator.choice(list(ADAPTERS[tuner]))
        model.set_adapter(name)
        if generator.random() < 0.2:
            with model.disable_adapter():
                assert torch.equal(logits_of(model, inputs), own[()])
        assert torch.equal(logits_of(model, inputs), own[name,]), name
    back = model.unload().state_dict()
    expected = original.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())


@pytest.mark.verb(
    "base_model.set_adapter([...])", limit="not where the adapters have heads of their own, as with LoRA"
)
@pytest.mark.verb("merge_adapter, unmerge_adapter")
@pytest.mark.parametrize("tuner", list(ADAPTERS))
def test_five_adapters_merged(tuner, masked, tmp_path: Path):
    """Five adapters switch with merges between."""
    base, inputs = masked
    original = copy.deepcopy(base)
    model = add_all(tuner, base, inputs)
    own = own_logits(model, original, inputs, tmp_path, PAIRS[tuner])
    assert all_differ(own)
    generator = random.Random(6)
    active: tuple[str, ...] = ()
    merged, seen = False, dict.fromkeys(("set", "pair", "disable", "merge", "unmerge"), 0)
    for _ in range(STEPS):
        step = generator.choice(["set", "set", "pair", "disable", "merge", "unmerge"])
        if step in ("set", "pair") and not merged:
            active = generator.choice([(name,) for name in ADAPTERS[tuner]] if step == "set" else PAIRS[tuner])
            model.base_model.set_adapter(list(active))
        elif step == "disable":
            with model.disable_adapter():
                torch.testing.assert_close(logits_of(model, inputs), own[()], rtol=0, atol=1e-5)
            merged = False  # a disabled forward pass unmerges, as LoRA's does
        elif step == "merge" and not merged and active and tuner == "bottleneck":
            with pytest.raises(NotImplementedError, match="not linear"):
                model.merge_adapter()
        elif step == "merge" and not merged and active:
            model.merge_adapter(safe_merge=generator.random() < 0.5)
            merged = True
        elif step == "unmerge" and merged:
            model.unmerge_adapter()
            merged = False
        else:
            continue
        seen[step] += 1
        expected = own[active] if active else logits_of(model, inputs)
        error = (logits_of(model, inputs) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (step, active, merged)
    assert min(count for step, count in seen.items() if step != "unmerge" or tuner != "bottleneck") > 10
    back, values = model.unload(), original.state_dict()
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-5)
