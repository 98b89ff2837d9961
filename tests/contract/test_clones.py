"""What tools do with an adapter: clone it by names, keep what requires a gradient, keep the whole state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trained import logits_of
from transformers import set_seed
from tuners import TUNERS

CASES = {
    "lora": lambda **settings: LoraConfig(
        target_modules=r".*(q_lin|v_lin|q_proj|v_proj)", init_lora_weights=False, **settings
    )
}
CASES |= {name: tuner.config for name, tuner in TUNERS.items()}


def loop(model: nn.Module, inputs: dict[str, Any], steps: int, of: int = 6) -> None:
    """Some of six steps, two to an epoch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if hasattr(model.base_model, "set_schedule"):
        model.base_model.set_schedule(of, 2, optimizer=optimizer)
    model.train()
    for step in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step + 1)


def made(tuner: str, arch: str = "llama", steps: int = 6) -> tuple[nn.Module, dict[str, Any]]:
    base = zoo.build(arch)
    set_seed(1)
    model = get_peft_model(base, CASES[tuner](task_type=zoo.ZOO[arch].task_type))
    inputs = zoo.inputs_of(arch, base)
    loop(model, inputs, steps)
    return model, inputs


def clone(model: nn.Module, config: Any) -> None:
    """As TRL's DPOTrainer and its relatives make a reference of a trained adapter."""
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@pytest.mark.parametrize("how", ["own config", "copied config"])
@pytest.mark.parametrize("steps", [0, 1, 6], ids=["fresh", "first phase", "last phase"])
@pytest.mark.parametrize("tuner", CASES)
def test_clone(tuner, steps, how):
    """An adapter cloned under a new name by its named parameters gives the same outputs, in every phase."""
    model, inputs = made(tuner, steps=steps)
    expected = logits_of(model, inputs)
    config = model.peft_config["default"]
    clone(model, copy.deepcopy(config) if how == "copied config" else config)
    assert torch.equal(logits_of(model, inputs), expected)
    own, theirs = (
        {v.data_ptr() for n, v in model.state_dict().items() if f".{name}" in n} for name in ("default", "ref")
    )
    assert own and len(own) == len(theirs) and not own & theirs
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("tuner", CASES)
def test_clone_of_loaded(tuner, tmp_path: Path):
    """The same of an adapter that was loaded."""
    model, inputs = made(tuner)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("llama"), tmp_path, is_trainable=True)
    clone(again, again.peft_config["default"])
    again.set_adapter("ref")
    assert torch.equal(logits_of(again, inputs), expected)
    again.delete_adapter("default")
    assert torch.equal(logits_of(again, inputs), expected)


@pytest.mark.parametrize("tuner", CASES)
def test_names(tuner):
    """Parameters are called `<path>.<part>.<adapter>.weight` or `.bias`, and nothing empty is in a state dict."""
    model, _ = made(tuner, "distilbert")
    prefix = TUNERS[tuner].prefix if tuner in TUNERS else "lora_"
    names = [name.split(".") for name, _ in model.named_parameters() if f".{prefix}" in name]
    assert names and all(name[-2] == "default" and name[-1] in ("weight", "bias") for name in names)
    assert all(name[-3].startswith(prefix) for name in names)
    assert all(value.numel() for value in model.state_dict().values())


@pytest.mark.parametrize("steps", [1, 6], ids=["first phase", "last phase"])
@pytest.mark.parametrize("tuner", CASES)
def test_trained_alone(tuner, steps):
    """A checkpoint of what requires a gradient, loaded over a fresh adapter of that config, gives the same outputs,
    or an error, never something else."""
    model, inputs = made(tuner, "distilbert", steps)
    expected = logits_of(model, inputs)
    off = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value.clone() for name, value in model.state_dict().items() if name not in off}
    fresh, _ = made(tuner, "distilbert", 0)
    if (tuner.startswith(("far", "nas")) or tuner == "learner-fold") and steps == 6:  # of another form by then
        before = logits_of(fresh, inputs)
        with pytest.raises(ValueError, match="saved in another phase"):
            fresh.load_state_dict(state, strict=False)
        assert torch.equal(logits_of(fresh, inputs), before)
    else:
        fresh.load_state_dict(state, strict=False)
        assert torch.equal(logits_of(fresh, inputs), expected)


@pytest.mark.parametrize("how", ["fresh", "trained config", "saved config"])
@pytest.mark.parametrize("steps", [1, 3, 6], ids=["first phase", "at the boundary", "last phase"])
@pytest.mark.parametrize("tuner", CASES)
def test_parameters_alone(tuner, steps, how, tmp_path: Path):
    """The same of the parameters that require a gradient, without any buffer."""
    model, inputs = made(tuner, "distilbert", steps)
    expected = logits_of(model, inputs)
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    fresh, _ = made(tuner, "distilbert", 0)
    if how != "fresh":
        config = copy.deepcopy(model.peft_config["default"])
        if how == "saved config":
            config.save_pretrained(str(tmp_path))
            config = type(config).from_pretrained(str(tmp_path))
            config.inference_mode = False
        set_seed(1)
        fresh = get_peft_model(zoo.build("distilbert"), config)
    try:
        fresh.load_state_dict(state, strict=False)
        found = logits_of(fresh, inputs)
    except ValueError as error:
        assert "The state does not fit the adapter 'default'" in str(error) or "are in the adapter's file" in str(
            error
        )
        assert tuner not in ("lora", "learner-unprimed") and not tuner.startswith("bottleneck") and steps > 1
    else:
        assert torch.equal(found, expected)
    model.load_state_dict(state, strict=False)  # it has the rest
    assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("tuner", CASES)
def test_shards_of_state(tuner, tmp_path: Path):
    """A whole state may be loaded in pieces, in any order, and with empty tensors for what an engine has elsewhere."""
    model, inputs = made(tuner, "distilbert")
    expected, state = logits_of(model, inputs), model.state_dict()
    model.save_pretrained(tmp_path)
    for first in ("layer.0.", "layer.1."):
        again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
        for kept in (True, False):
            again.load_state_dict({k: v for k, v in state.items() if (first in k) is kept}, strict=False)
        assert torch.equal(logits_of(again, inputs), expected)
    trained = {name for name, _ in model.named_parameters()}
    elsewhere = {name: value.new_empty(0) if name in trained else value for name, value in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):  # torch's own word, no engine's
        again.load_state_dict(elsewhere, strict=False)


def test_refused_file_leaves_no_mark(tmp_path: Path):
    """A state of the trained parameters alone is refused right after a file that was refused."""
    model, _ = made("learner", "distilbert")
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    other = get_peft_model(zoo.with_labels("distilbert", num_labels=3), CASES["learner"](task_type="SEQ_CLS"))
    other.save_pretrained(tmp_path)
    fresh, _ = made("learner", "distilbert", 0)
    with pytest.raises(ValueError, match="num_labels=3"):
        fresh.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="saved in another phase"):
        fresh.load_state_dict(state, strict=False)


@pytest.mark.parametrize("tuner", CASES)
def test_whole_state(tuner, tmp_path: Path):
    """A whole model's state goes into the adapter that was loaded from the same step, and into no other in silence."""
    model, inputs = made(tuner, "distilbert")
    expected, state = logits_of(model, inputs), model.state_dict()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
    loop(again, inputs, 1)
    again.load_state_dict(state)
    assert torch.equal(logits_of(again, inputs), expected)
    fresh, _ = made(tuner, "distilbert", 0)
    if tuner in ("lora", "learner", "learner-unprimed") or tuner.startswith("bottleneck"):
        fresh.load_state_dict(state)
        assert torch.equal(logits_of(fresh, inputs), expected)
    else:
        with pytest.raises(ValueError, match="saved in another phase.*from_pretrained"):
            fresh.load_state_dict(state)


@pytest.mark.parametrize("changed", [{}, {"save_dtype": "bfloat16"}, {"base_model_name_or_path": "another"}])
@pytest.mark.parametrize("tuner", CASES)
def test_clone_with_head(tuner, changed):
    """The same with a head, which PEFT writes into the config, and of a copied config that says other things beside
    what decides an adapter's form."""
    model, inputs = made(tuner, "distilbert")
    expected = logits_of(model, inputs)
    config = copy.deepcopy(model.peft_config["default"])
    for name, value in changed.items():
        setattr(config, name, value)
    clone(model, config)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("how", ["own config", "copied config"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_clone_of_second(tuner, how):
    """Of two adapters with equal configs, the clone is that of the one whose config it was made with."""
    model, inputs = made(tuner)
    model.add_adapter("b", TUNERS[tuner].config(task_type=zoo.ZOO["llama"].task_type))
    model.set_adapter("b")
    loop(model, {**inputs, "labels": inputs["input_ids"].flip(1)}, 6)
    expected = logits_of(model, inputs)
    config = model.peft_config["b"]
    model.add_adapter("ref", copy.deepcopy(config) if how == "copied config" else config)
    for name, parameter in model.named_parameters():
        if ".b." in name:
            model.get_parameter(name.replace(".b.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("tuner", ["learner", "learner-fold", "far", "nas-structured"])
def test_clone_is_told(tuner):
    """Whoever trains a clone without meaning to is told which phase it is in."""
    model, inputs = made(tuner)
    model.add_adapter("two", model.peft_config["default"])
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="'two' was added with the config of 'default', as a clone.*restart_phases"):
        loop(model, inputs, 1)
