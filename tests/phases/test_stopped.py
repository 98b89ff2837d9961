"""What an engine can't follow across a boundary is refused before the first step, or left to the next training.

Runs under the engines themselves are in test_engines.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftModel
from training import adapted, adapter_values, arguments, bottleneck, far, learner, nas, trainer

from peft_learners import LearnerConfig, PhaseCallback, ScheduleError
from peft_learners.phases.driver import PhaseDriver

MAKE = {
    "fold": partial(learner, priming_steps=3, after_priming="fold"),
    "far": partial(far, priming_epochs=None, priming_steps=3),
    "nas": partial(nas, search_steps=3),
    "nas-structured": partial(nas, search_steps=3, granularity="structured"),
}


class Zero(torch.optim.SGD):
    """Is called as DeepSpeed's own optimizers are."""


Zero.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


class Wrapper:
    """As accelerate's around an optimizer of DeepSpeed's."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


def zero(model: torch.nn.Module, kind: type[torch.optim.SGD] = Zero) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], lr=0.1)


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(zoo.build("distilbert"), folder, is_trainable=True)


def three_steps(
    model: PeftModel, optimizer: torch.optim.Optimizer, arch: str = "distilbert", **settings: bool
) -> None:
    model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer, **settings)
    inputs = zoo.inputs_of(arch, model)
    for step in (1, 2, 3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("wrap", [Wrapper, lambda optimizer: optimizer], ids=["accelerate", "bare"])
def test_refused(name, wrap):
    """An adapter that would change its shapes on the way does not begin."""
    model = MAKE[name]()
    with pytest.raises(ScheduleError, match=r"can't follow in one run.*stop_at_boundary=True.*from_pretrained"):
        model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=wrap(zero(model)))


@pytest.mark.parametrize(
    "make", [bottleneck, partial(learner, priming_epochs=0), learner], ids=["bottleneck", "unprimed", "learner"]
)
def test_begins(make):
    """What keeps its shapes begins."""
    model = make()
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=zero(model))
    assert start.first_step == 0


@pytest.mark.parametrize("name", MAKE)
def test_left_to_next_training(name, tmp_path: Path):
    """A boundary that an engine left behind is crossed by the next training, as if it had been crossed at once."""
    at_once, stopped = MAKE[name](), MAKE[name]()
    three_steps(at_once, zero(at_once, torch.optim.SGD))
    three_steps(stopped, zero(stopped), stop_at_boundary=True)
    config = stopped.peft_config["default"]
    assert config.completed_phases == [] and config.next_phase == config.phase_names[1]
    stopped.save_pretrained(tmp_path)

    model = loaded(tmp_path)
    with pytest.raises(ScheduleError, match=r"stands before its phase.*prepare_optimizer\(\)"):
        model.base_model.set_schedule(total_steps=3, steps_per_epoch=2, optimizer=zero(model))
    model.base_model.prepare_optimizer()
    (start,) = model.base_model.set_schedule(total_steps=3, steps_per_epoch=2, optimizer=zero(model))
    assert start.phase == config.phase_names[1] and model.peft_config["default"].next_phase is None
    ours, theirs = adapter_values(model), adapter_values(at_once)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())

    without = loaded(tmp_path)  # without an engine it is crossed as the training begins
    without.base_model.set_schedule(total_steps=3, steps_per_epoch=2, optimizer=zero(without, torch.optim.SGD))
    ours = adapter_values(without)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_going_on(tmp_path: Path):
    """A loop that goes on past the boundary that it was to end at is stopped."""
    model = MAKE["far"]()
    three_steps(model, zero(model), stop_at_boundary=True)
    with pytest.raises(ScheduleError, match="was to end at step 3.*but step 4 is finished"):
        model.base_model.update_and_allocate(4)


def test_inference(tmp_path: Path):
    """An adapter that stands before a boundary is used as it was saved."""
    model = MAKE["far"]()
    three_steps(model, zero(model), stop_at_boundary=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path)
    ours, theirs = adapter_values(again), adapter_values(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", [*MAKE, "learner"])
def test_behind_the_boundary(name, tmp_path: Path):
    """An adapter that was saved at its last boundary begins, and its phase is the last one."""
    make = MAKE.get(name, partial(learner, priming_steps=3))
    run = trainer(make(), arguments(tmp_path / "run"), callbacks=[PhaseCallback(stop_at_boundary=True)])
    run.train()
    assert run.state.global_step == 3
    run.model.save_pretrained(tmp_path / "saved")
    model = loaded(tmp_path / "saved")
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=zero(model))
    assert start.phase == model.peft_config["default"].phase_names[-1]


def test_offloaded():
    """A search whose gradients DeepSpeed keeps elsewhere does not begin."""
    model = MAKE["nas"]()
    optimizer = zero(model)
    optimizer.cpu_offload = True
    with pytest.raises(ScheduleError, match=r"can't be searched.*offload_optimizer"):
        model.base_model.set_schedule(total_steps=6, optimizer=optimizer, stop_at_boundary=True)


@pytest.mark.parametrize("name", MAKE)
def test_fsdp1(name):
    """What FSDP1 would flatten is refused, in two runs, too."""
    model = MAKE[name]()
    for parameter in model.parameters():
        parameter._fsdp_flattened = True
    with pytest.raises(ScheduleError, match="FSDP1 shows parts of them alone.*fsdp_version: 2"):
        model.base_model.set_schedule(
            total_steps=6, steps_per_epoch=2, optimizer=zero(model, torch.optim.SGD), stop_at_boundary=True
        )


@pytest.mark.parametrize("name", MAKE)
def test_merged(name, tmp_path: Path):
    """While it is merged, an adapter does not cross the boundary that it stands before."""
    stopped = MAKE[name]()
    three_steps(stopped, zero(stopped), stop_at_boundary=True)
    stopped.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    with pytest.raises(ScheduleError, match="is merged"):
        model.base_model.prepare_optimizer()
    with pytest.raises(ScheduleError, match="is merged"):
        model.base_model.set_schedule(total_steps=3, optimizer=zero(model, torch.optim.SGD))
    model.unmerge_adapter()
    assert all(torch.allclose(value, before[key], atol=1e-6) for key, value in model.state_dict().items())


def test_two_adapters(tmp_path: Path):
    """Where one adapter stops, all do that have a boundary there."""
    model = MAKE["fold"]("llama")
    model.add_adapter("keep", LearnerConfig(r=4, priming_steps=3, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "keep"])
    three_steps(model, zero(model), "llama", stop_at_boundary=True)
    assert [config.next_phase for config in model.peft_config.values()] == ["learning", "learning"]
    model.base_model.prepare_optimizer()
    assert [config.completed_phases for config in model.peft_config.values()] == [["priming"], ["priming"]]


@pytest.mark.parametrize("name", ["far", "nas"])
def test_fresh_from_stopped_config(name, tmp_path: Path):
    """A fresh adapter with the config of one that has stopped goes through all phases."""
    stopped = MAKE[name]()
    three_steps(stopped, zero(stopped), stop_at_boundary=True)
    stopped.save_pretrained(tmp_path)
    config = type(stopped.peft_config["default"]).from_pretrained(tmp_path)
    config.inference_mode = False
    assert config.next_phase is not None
    model = adapted(config)
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=zero(model, torch.optim.SGD))
    assert start.phase == model.peft_config["default"].phase_names[0]


def test_scores_without_data(tmp_path: Path):
    """A search's scores survive a load that leaves values without data at first."""
    stopped = MAKE["nas"]()
    three_steps(stopped, zero(stopped), stop_at_boundary=True)
    stopped.save_pretrained(tmp_path)
    models = [
        PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        for low in (False, True)
    ]
    for model in models:
        model.base_model.prepare_optimizer()
    ours, theirs = map(adapter_values, models)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("settings", [{"save_strategy": "best"}, {"load_best_model_at_end": True}], ids=str)
def test_lost_saves(settings, tmp_path: Path):
    """Settings that would leave nothing at the boundary are refused before the first step."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "loss", **settings}
    run = trainer(MAKE["far"](), arguments(tmp_path, **settings), callbacks=[PhaseCallback(stop_at_boundary=True)])
    with pytest.raises(ValueError, match=r"PhaseCallback\(stop_at_boundary=True\)"):
        run.train()
    assert run.state.global_step == 0


def test_ram_efficient(monkeypatch: pytest.MonkeyPatch):
    """accelerate fails on buffers in a state dict if one process alone loads the model: what was cut has such."""
    model = far(priming_epochs=None, priming_steps=3)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # `accelerate launch` does so where nothing is said
    PhaseDriver.of(model).hold_frozen()
    three_steps(model, zero(model, torch.optim.SGD))
    with pytest.raises(ScheduleError, match="fsdp_cpu_ram_efficient_loading=true .*Set it to false"):
        PhaseDriver.of(model).hold_frozen()
