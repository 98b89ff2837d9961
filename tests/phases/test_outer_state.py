"""Tools that keep a state of their own about parameters: in optimizer groups, as copies, as whole checkpoints; and
runs that stop at a boundary, for those that can't bear one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training import Rows, adapter_values, arguments, far, learner, nas, trainer
from transformers.trainer_utils import get_last_checkpoint

from peft_learners import PhaseCallback

MAKE: dict[str, Any] = {
    "learner": lambda: learner(dropout=0.1, priming_steps=3),
    "fold": lambda: learner(dropout=0.1, priming_steps=3, after_priming="fold"),
    "far": lambda: far(dropout=0.1, priming_epochs=None, priming_steps=3),
    "nas": lambda: nas(dropout=0.1, search_steps=3),
    "nas-rounds": lambda: nas(dropout=0.1, search_steps=2, rounds=2, granularity="structured"),
}


def batch(step: int) -> dict[str, torch.Tensor]:
    rows = Rows(seed=step)
    return torch.utils.data.default_collate([rows[i] for i in range(8)])


def reloaded(folder: Path) -> PeftModel:
    base = zoo.build("distilbert")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, first: int = 0) -> list[Any]:
    """The batches of some steps, of which `first` is counted as a run's first."""
    starts = []
    model.train()
    for step in steps:
        torch.manual_seed(step)  # dropout
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        starts += model.base_model.update_and_allocate(step + 1 - first)
    return starts


@pytest.mark.parametrize("tuner", MAKE)
def test_stop_at_boundary(tuner, tmp_path: Path):
    """The same program, run until it says that it is done, ends with the bits of a run that went through: it stops at
    each boundary, saved, and goes on from there."""

    def program(out: Path, stop: bool) -> Any:
        last = get_last_checkpoint(str(out)) if out.exists() else None
        run = trainer(MAKE[tuner](), arguments(out), callbacks=[PhaseCallback(stop_at_boundary=stop)])
        run.train(resume_from_checkpoint=last)
        return run

    whole = program(tmp_path / "whole", False)
    first_steps = sorted(whole.model.peft_config["default"].phase_first_steps.values())
    stops = [program(tmp_path / "parts", True) for _ in first_steps]
    assert [run.state.global_step for run in stops] == [*first_steps[1:], 6]
    expected, ours = adapter_values(whole.model), adapter_values(stops[-1].model)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], v) for name, v in expected.items())


@pytest.mark.parametrize("tuner", ["fold", "far", "nas"])
def test_stopped_loop(tuner, tmp_path: Path):
    """A loop may end at a boundary: what it saved trains on in the next phase, as an ordinary adapter, with an
    optimizer of its own. NAS-LoRA's boundary begins anew, so that the result is the single run's."""
    model = MAKE[tuner]()
    optimizer = adamw(model)
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    loop(model, optimizer, range(2))
    assert loop(model, optimizer, range(2, 3))
    model.save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    assert all(value.numel() for value in again.state_dict().values())
    for parameter in again.parameters():
        assert parameter.requires_grad or parameter.grad is None
    shapes = {name: p.shape for name, p in again.named_parameters()}
    own = adamw(again)
    again.base_model.set_schedule(3, 2, optimizer=own)
    assert not loop(again, own, range(3, 6), first=3)
    assert {name: p.shape for name, p in again.named_parameters()} == shapes
    loop(model, optimizer, range(3, 6))
    if tuner == "nas":
        expected = adapter_values(model)
        assert all(torch.equal(value, expected[name]) for name, value in adapter_values(again).items())


def test_stop_with_best_refused(tmp_path: Path):
    """A run can't end at a boundary and with an earlier adapter."""
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    run = trainer(learner(), arguments(tmp_path, **settings), callbacks=[PhaseCallback(stop_at_boundary=True)])
    with pytest.raises(ValueError, match="stop_at_boundary=True.*load_best_model_at_end=True"):
        run.train()


class Estimating(torch.optim.SGD):
    """Keeps an estimate in its groups, as Prodigy does, a count that it makes by itself, and a state of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in [self.defaults, *self.param_groups]:
            group["d"] = 1e-3
            group["train_mode"] = True

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["d"] *= 2
            group["count"] = group.get("count", 0) + 1
        self.state["all"] = {"steps": self.param_groups[0]["count"]}
        super().step(closure)


@pytest.mark.parametrize("resumed", [False, True])
def test_fresh_groups(resumed, tmp_path: Path):
    """Where a training begins anew the optimizer is fresh in all that it keeps; what a user set in a group stays."""
    model = nas(search_steps=3)

    def make(own: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in own.parameters() if p.requires_grad]
        return Estimating([{"params": trained[:5], "weight_decay": 0.3}, {"params": trained[5:]}], lr=1e-2)

    optimizer = make(model)
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    loop(model, optimizer, range(2))
    if resumed:
        model.save_pretrained(tmp_path)
        model = reloaded(tmp_path)
        state, optimizer = optimizer.state_dict(), make(model)
        state["state"].pop("all")
        optimizer.load_state_dict(state)
        model.base_model.set_schedule(6, 2, optimizer=optimizer, global_step=2)
    loop(model, optimizer, range(2, 3))
    assert "all" not in optimizer.state and not optimizer.state
    for group, decay in zip(optimizer.param_groups, (0.3, 0), strict=True):
        assert group["d"] == 1e-3 and "count" not in group
        assert group["weight_decay"] == decay and group["lr"] == 1e-2 and group["train_mode"] is True


@pytest.mark.parametrize("tuner", MAKE)
def test_average_told(tuner):
    """An average of weights that was copied before a boundary is told there, once; one made after it averages."""
    model = MAKE[tuner]()
    optimizer = adamw(model)
    average = AveragedModel(model)
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    boundary = sorted(model.peft_config["default"].phase_first_steps.values())[1]
    loop(model, optimizer, range(boundary - 1))
    average.update_parameters(model)
    with pytest.warns(UserWarning, match=r"copy of the model is alive.*make it anew.*stop_at_boundary=True"):
        loop(model, optimizer, range(boundary - 1, boundary))
    del average
    average = AveragedModel(model)
    average.update_parameters(model)
    for one, other in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_copy_no_warning():
    """A copy that is gone is not told of."""
    model = learner()
    copy.deepcopy(model)
    optimizer = adamw(model)
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*copy of the model.*")
        loop(model, optimizer, range(3))


@pytest.mark.parametrize("tuner", MAKE)
def test_accelerate_state(tuner, tmp_path: Path):
    """accelerate's whole state of a step after the boundary goes on bit for bit in the adapter that was saved beside
    it; a fresh adapter is refused with the call that is right."""

    def prepared(model: nn.Module) -> tuple[Accelerator, nn.Module, Any]:
        accelerator = Accelerator(cpu=True)
        model.base_model.prepare_optimizer()
        return accelerator, *accelerator.prepare(model, adamw(model))

    accelerator, model, optimizer = prepared(MAKE[tuner]())
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    loop(model, optimizer, range(5))
    model.save_pretrained(tmp_path / "adapter")
    accelerator.save_state(str(tmp_path / "state"))
    loop(model, optimizer, range(5, 6))

    accelerator, again, optimizer = prepared(reloaded(tmp_path / "adapter"))
    accelerator.load_state(str(tmp_path / "state"))
    again.base_model.set_schedule(6, 2, optimizer=optimizer, global_step=5)
    loop(again, optimizer, range(5, 6))
    expected = adapter_values(model)
    assert all(torch.equal(value, expected[name]) for name, value in adapter_values(again).items())

    if tuner != "learner":
        accelerator, *_ = prepared(MAKE[tuner]())
        with pytest.raises(ValueError, match="saved in another phase.*from_pretrained"):
            accelerator.load_state(str(tmp_path / "state"))
