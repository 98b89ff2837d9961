"""Each tuner trained through all its phases, on models of the zoo."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
import zoo
from peft import PeftModel, get_peft_model
from tuners import TUNERS
from zoo import logits_of

STEPS_PER_EPOCH, EPOCHS = 3, 2


@dataclasses.dataclass
class Trained:
    tuner: str
    arch: str
    base: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    model: PeftModel
    base_logits: torch.Tensor
    fresh_logits: torch.Tensor
    logits: torch.Tensor
    phases: list[str]
    without_gradient: list[str]
    frozen_moved: list[str]
    state_matches: bool


def train(tuner: str, arch: str) -> Trained:
    base = zoo.build(arch)
    inputs = zoo.inputs_of(arch, base)
    base_logits = logits_of(base, inputs)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, TUNERS[tuner].config(task_type=zoo.ZOO[arch].task_type))
    fresh_logits = logits_of(model, inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    starts = model.base_model.set_schedule(
        total_steps=EPOCHS * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, optimizer=optimizer
    )
    phases, without, moved = [s.phase for s in starts], [], []
    model.train()
    for step in range(1, EPOCHS * STEPS_PER_EPOCH + 1):
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        before = {n: value.clone() for n, value in model.state_dict().items() if n not in trains}
        model(**inputs).loss.backward()
        without += [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        moved += [n for n, v in model.state_dict().items() if n in before and not torch.equal(v, before[n])]
        phases += [s.phase for s in model.base_model.update_and_allocate(step)]
    trained = {p for p in model.parameters() if p.requires_grad}
    return Trained(
        tuner, arch, untouched, inputs, model, base_logits, fresh_logits, logits_of(model, inputs), phases, without,
        moved, set(optimizer.state) == trained,
    )  # fmt: skip


@functools.cache
def trained_once(tuner: str, arch: str) -> Trained:
    """The same for all tests of a process, which may only look at it."""
    return train(tuner, arch)


def trained(tuner: str, arch: str) -> Trained:
    """With a copy of the model that went through all phases; base and inputs are those of all tests."""
    shared = trained_once(tuner, arch)
    return dataclasses.replace(shared, model=copy.deepcopy(shared.model))
