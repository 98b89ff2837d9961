"""NAS-LoRA's search in a loop by hand, recorded."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import Tensor, nn
from training import nas

PART = {"nas_lora_U": "U", "nas_lora_V": "V", "nas_lora_bias_delta": "bias"}


def searched(model: nn.Module) -> dict[tuple[str, str], nn.Parameter]:
    """`{(module, part): parameter}` of a NAS-LoRA adapter, by names alone."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, container = name.removeprefix("base_model.model.").partition(".default.")[0].rpartition(".")
        if container in PART:
            found[module, PART[container]] = parameter
    return found


Record = dict[tuple[str, str], list[tuple[Tensor, Tensor]]]


def train(
    model: nn.Module, inputs: dict[str, Tensor], steps: int, optimizer: torch.optim.Optimizer, first: int = 0
) -> Record:
    """Train, and record each parameter and its gradient right before each step."""
    model.train()
    record: Record = {}
    for step in range(first, first + steps):
        model(**inputs).loss.backward()
        for key, parameter in searched(model).items():
            if parameter.grad is not None:
                record.setdefault(key, []).append((parameter.detach().clone(), parameter.grad.clone()))
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step + 1)
    return record


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def search(arch: str = "bert", steps: int = 3, **config: Any) -> tuple[nn.Module, Record, torch.optim.Optimizer]:
    """A model that has just been pruned."""
    model = nas(arch, **config)
    optimizer = adam(model)
    model.base_model.set_schedule(total_steps=2 * steps, optimizer=optimizer)
    record = train(model, zoo.inputs_of(arch, model), steps, optimizer)
    return model, record, optimizer
