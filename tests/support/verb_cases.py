"""Models for the tests of PEFT's verbs: each tuner in its first phase and in its last one, on models of the zoo."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from peft import PeftConfig, PeftModel, get_peft_model
from trained import trained
from tuners import TUNERS
from zoo import logits_of

PHASES = ("first", "last")


def config_of(tuner: str, arch: str, **settings: Any) -> PeftConfig:
    """A config whose fresh adapter changes the function."""
    return TUNERS[tuner].config(**{"task_type": zoo.ZOO[arch].task_type, "init_weights": False, **settings})


def many(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Nine rows of seven tokens, with which linear layers take their paths for many rows."""
    return {name: torch.cat([value, value.flip(0), value]) for name, value in inputs.items()}


def in_phase(tuner: str, arch: str, phase: str) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model whose adapter changes the function, with many rows: in its first phase, or in its last."""
    if phase == "last":
        run = trained(tuner, arch)
        return run.model, many(run.inputs)
    torch.manual_seed(11)
    base = zoo.build(arch)
    return get_peft_model(base, config_of(tuner, arch)), many(zoo.inputs_of(arch, base))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of what trains and has one, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def switched(model: PeftModel, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits with one adapter switched on."""
    model.set_adapter(name)
    return logits_of(model, inputs)
