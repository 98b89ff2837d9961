"""What a training hands over: the optimizer, whose state follows a boundary and whose steps are watched; DDP."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import bottleneck, far, learner, nas, sgd

from peft_learners import NASLoRAConfig, PhaseDriver, ScheduleError
from peft_learners.nas_lora import NASLoRAModel


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    model(**zoo.inputs_of("distilbert", model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def scores(model: nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if hasattr(module, "nas_lora_scores")]
    return [score for layer in layers for score in layer.nas_lora_scores.get("default", {}).values()]


# -- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [far, nas])
def test_a_missing_optimizer_is_named(make):
    asks = r"'default' .*hand it over, model\.base_model\.set_schedule\(\.\.\., optimizer=optimizer\)\."
    with pytest.raises(ScheduleError, match=asks):
        make().base_model.set_schedule(total_steps=6, steps_per_epoch=2)
    steps = {"priming_epochs": None, "priming_steps": 2} if make is far else {"search_steps": 2}
    with pytest.raises(ScheduleError, match=asks):
        make(**steps).base_model.update_and_allocate(0)


@pytest.mark.parametrize("make", [far, nas])
def test_optimizer_not_needed(make):
    """No optimizer is needed behind the last boundary."""
    model = make()
    optimizer = sgd(model)
    model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer)
    for number in range(1, 4):
        step(model, optimizer)
        model.base_model.update_and_allocate(number)
    assert model.peft_config["default"].phases_complete
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2)
    assert start.phase in ("reconfigured", "retraining")


def test_learner_without_optimizer():
    """A Learner without an optimizer keeps its frozen state."""
    model = learner()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.base_model.set_schedule(6, 2)
    for number in (1, 2):
        step(model, optimizer)
        model.base_model.update_and_allocate(number)
    frozen = {p for p in optimizer.state if not p.requires_grad}
    assert len(frozen) == 8 and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("make", [far, nas, learner])
def test_wrong_optimizer(make):
    """An optimizer of other parameters is told."""
    model = make()
    wrong = torch.optim.SGD([p for p in model.parameters() if not p.requires_grad], lr=1e-2)
    short = torch.optim.SGD([p for p in model.parameters() if p.requires_grad][1:], lr=1e-2)
    for optimizer, words in ((wrong, "holds 0 of the"), (short, r"holds (\d+) of the (?!\1)\d+ parameters")):
        if make is learner:
            with pytest.warns(UserWarning, match=words):
                model.base_model.set_schedule(6, 2, optimizer=optimizer)
        else:
            with pytest.raises(ScheduleError, match=words):
                model.base_model.set_schedule(6, 2, optimizer=optimizer)


@pytest.mark.parametrize("make", [far, nas, learner, bottleneck])
def test_right_optimizer(make):
    """The right optimizer and one without a boundary ahead are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = make()
        model.base_model.set_schedule(6, 2, optimizer=sgd(model))
        alone = learner(priming_epochs=0)
        alone.base_model.set_schedule(6, 2, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2))


# -- its steps --------------------------------------------------------------------------------------------------------


def test_hook_on_one_optimizer(monkeypatch):
    """Only the optimizer that was handed over is watched and only in the search."""
    observers = []  # held, so that they do not go by themselves
    made = NASLoRAModel.observer
    monkeypatch.setattr(NASLoRAModel, "observer", lambda *args: observers.append(made(*args)) or observers[-1])
    model, stranger = nas(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    optimizer = sgd(model)
    model.base_model.set_schedule(total_steps=4, optimizer=optimizer)
    assert hooks(optimizer) == 1 and hooks(stranger) == 0 and not torch_optimizer._global_optimizer_pre_hooks
    for number in (1, 2):
        step(model, optimizer)
        model.base_model.update_and_allocate(number)
    assert hooks(optimizer) == 0 and len(observers) == 2
    model.base_model.restart_phases()
    model.base_model.set_schedule(total_steps=4, optimizer=optimizer)
    assert hooks(optimizer) == 1
    model.base_model.finish_phases()
    assert hooks(optimizer) == 0


def test_second_start():
    """A second start leaves no hook on the first optimizer."""
    model = nas()
    first, second = sgd(model), sgd(model)
    model.base_model.set_schedule(total_steps=4, optimizer=first)
    model.base_model.set_schedule(total_steps=4, optimizer=second)
    assert (hooks(first), hooks(second)) == (0, 1)
    step(model, first)
    assert scores(model) == []
    step(model, second)
    assert scores(model)
    model.add_adapter("other", NASLoRAConfig(r=2))
    model.set_adapter("other")
    third = sgd(model)
    model.base_model.set_schedule(total_steps=4, optimizer=third)
    assert (hooks(second), hooks(third)) == (0, 1)


def test_optimizer_copy():
    """An optimizer keeps no model alive and is copied without what watches it."""
    model = nas()
    optimizer = sgd(model)
    model.base_model.set_schedule(total_steps=4, optimizer=optimizer)
    step(model, optimizer)
    before = [score.clone() for score in scores(model)]
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert hooks(twin) == 0
        twin.step()
    assert all(torch.equal(score, old) for score, old in zip(scores(model), before, strict=True))
    gone = weakref.ref(model.base_model.model), weakref.ref(PhaseDriver.of(model))
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and hooks(optimizer) == 0
    optimizer.step()


def test_optimizer_released():
    """A model keeps no optimizer alive."""
    model = far()
    optimizer = sgd(model)
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", [far, nas])
def test_restart_optimizer_state(make):
    """Also after the end: a second training may go on with it, as the same Trainer's does."""
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.base_model.set_schedule(6, 2, optimizer=optimizer)
        for number in range(1, 7):
            step(model, optimizer)
            model.base_model.update_and_allocate(number)
        assert model.peft_config["default"].phases_complete
        model.base_model.finish_phases()
        model.base_model.restart_phases()
        state = {p: values["exp_avg"].shape for p, values in optimizer.state.items()}
        assert state and all(p.shape == shape for p, shape in state.items())


# -- the wrapper ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_processes() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [learner, far])
def test_wrapper_refused(two_processes, make):
    """A missing or foreign wrapper is named."""
    model, other = make(), nn.Linear(2, 2)
    schedule = {"total_steps": 6, "steps_per_epoch": 2, "optimizer": sgd(model)}
    for wrong in (None, other):
        with pytest.raises(ScheduleError, match=r"2 processes .*set_schedule\(\.\.\., wrapper=model\)"):
            model.base_model.set_schedule(**schedule, wrapper=wrong)
    model.base_model.set_schedule(**schedule, wrapper=model)  # as under FSDP, which is no module around it


@pytest.mark.parametrize("around", [lambda ddp: ddp, torch.compile, nn.Sequential], ids=["ddp", "compiled", "inside"])
def test_ddp_found(two_processes, around):
    """DDP is rebuilt wherever it is in what was handed over."""
    model = learner()
    ddp = DistributedDataParallel(model)
    model.base_model.set_schedule(6, 2, optimizer=sgd(model), wrapper=around(ddp))
    reducers = [ddp.reducer]
    model.base_model.update_and_allocate(1)
    assert ddp.reducer is reducers[0]
    model.base_model.update_and_allocate(2)
    assert ddp.reducer is not reducers[0]


def test_wrapper_released(two_processes):
    """A training that has finished lets the wrapper go."""
    model = learner()
    ddp = DistributedDataParallel(model)
    model.base_model.set_schedule(6, 2, optimizer=sgd(model), wrapper=ddp)
    model.base_model.finish_phases()
    gone = weakref.ref(ddp)
    del ddp
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", [far, nas])
def test_optimizer_made_twice(make):
    """A loop that steps with another optimizer than it handed over is told at the boundary, with the argument."""
    model = make()
    model.base_model.set_schedule(total_steps=4, steps_per_epoch=2, optimizer=sgd(model))
    other = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    told = pytest.raises(ScheduleError) if make is nas else pytest.warns(UserWarning)
    with told as found:
        for k in range(1, 4):
            step(model, other)
            model.base_model.update_and_allocate(k)
    messages = [str(found.value)] if make is nas else [str(warning.message) for warning in found]
    assert any("has made no step" in m and "set_schedule(..., optimizer=optimizer)" in m for m in messages)


@pytest.mark.parametrize(
    ("kind", "rate", "fields", "told"),
    [
        (
            torch.optim.AdamW,
            1e-3,
            {"priming_lr_scale": 1.0},
            "at a learning rate of 0.001: 0.001 times priming_lr_scale=1.*scale=0.1",
        ),
        (
            torch.optim.AdamW,
            3e-3,
            {"priming_lr_scale": 0.5},
            "of 0.0015: 0.003 times .*=0.5.*scale=0.03",
        ),
        (torch.optim.AdamW, 3e-3, {}, None),
        (torch.optim.AdamW, 1e-2, {"priming_steps": 0}, None),
        (torch.optim.SGD, 1e-2, {"priming_lr_scale": 1.0}, None),
    ],
)
def test_high_dense_rate_told(kind, rate, fields, told):
    """A rate that dense weights don't learn at is told before the first step, in a warm-up too."""
    model = learner(**{"priming_steps": 2, **fields})
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.base_model.set_schedule(total_steps=4, optimizer=optimizer)
    texts = [str(each.message) for each in found if "dense weights" in str(each.message)]
    assert len(texts) == bool(told) and all(re.search(told, text) for text in texts)
