"""What an adapter adds, in parameters and bytes, phase by phase: counted from its layers, and told before they exist.

Bytes in training are those of an optimizer like AdamW: of each trained parameter the value, the gradient and two
moments, all in the value's type; of what an adapter holds frozen, the value. What autograd stores is not among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import NamedTuple

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .config import PhasedConfig
from .phases.report import in_units
from .structure.modules import original_of, walk
from .structure.targets import is_all_linear
from .structure.weights import base_of, shape_of

#: Value, gradient and AdamW's two moments.
COPIES_IN_TRAINING = 4
#: Bytes of a value of an adapter, as PEFT makes it unless told otherwise (`autocast_adapter_dtype`).
FLOAT32 = 4
#: A default that adds less than this many bytes is never warned of.
NEVER_MUCH = 2e9


class Values(NamedTuple):
    """What an adapter has in its layers in one phase.

    Attributes:
        trained: values that train.
        frozen: values that it holds, but does not train.
        beside: bytes of what else it holds and saves (indices, scores).
        at_most: whether these are bounds, as where a choice is still to come.
    """

    trained: int
    frozen: int = 0
    beside: int = 0
    at_most: bool = False


@dataclass(frozen=True)
class PhaseCost:
    """What an adapter costs in one phase.

    Attributes:
        phase: its name.
        trained: parameters that train, those of modules trained whole (the head) among them.
        in_training: bytes that training holds for the adapter.
        file: bytes of the values in the file that the adapter leaves when training ends in this phase.
        at_most: whether these are bounds, as where a choice is still to come.
    """

    phase: str
    trained: int
    in_training: int
    file: int
    at_most: bool = False

    def __str__(self) -> str:
        bound = "at most " if self.at_most else ""
        return (
            f"trainable params: {bound}{self.trained:,d} || in training: {bound}{in_units(self.in_training)} || "
            f"file: {bound}{in_units(self.file)}"
        )


def phase_costs(
    values: Mapping[str, Values], config: PhasedConfig, saved: Sequence[nn.Module], width: float = FLOAT32
) -> list[PhaseCost]:
    """What an adapter costs in each of its phases.

    Args:
        values: what it has in its layers, by phase.
        saved: modules that it trains whole.
        width: bytes of a value in its layers (the mean, where they differ).
    """
    parameters = [parameter for module in saved for parameter in module.parameters()]
    head, head_bytes = sum(shape_of(p).numel() for p in parameters), sum(map(_bytes_of, parameters))
    dtype = getattr(torch, config.save_dtype) if config.save_dtype is not None else None
    costs = []
    for phase, own in values.items():
        in_training = COPIES_IN_TRAINING * (own.trained * width + head_bytes) + own.frozen * width + own.beside
        file = (
            (own.trained + own.frozen) * (width if dtype is None else dtype.itemsize) + head_bytes + own.beside
        )  # the head keeps its type
        costs.append(PhaseCost(phase, own.trained + head, round(in_training), round(file), own.at_most))
    return costs


def saved_copies(root: nn.Module, adapter: str) -> list[nn.Module]:
    """An adapter's own copies of the modules that it trains whole."""
    wrappers = (m for m in root.modules() if isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save)
    return [wrapper.modules_to_save[adapter] for wrapper in wrappers]


def to_be_saved(model: nn.Module, config: PhasedConfig) -> list[nn.Module]:
    """The modules that an adapter is going to train whole."""
    endings = tuple(config.modules_to_save or ())  # PEFT's rule
    return [original_of(module) for name, module in walk(model) if name.endswith(endings)]


def warn_of_costs(config: PhasedConfig, model: nn.Module, costs: Sequence[PhaseCost]) -> None:
    """One warning if an adapter that is about to be made adds more than there is room for, or more than its user is
    likely to expect: all defaults, more than 2 GB, and more than the base model has.

    Args:
        costs: by phase; of those that are still ahead, that of the phase which costs most is told.
    """
    ahead = list(dropwhile(lambda cost: cost.phase != config.present_phase, costs)) or costs
    most = max(ahead, key=lambda cost: cost.in_training)
    base, free = base_bytes(model), free_bytes(model)
    by_default = not any(_is_narrowed(config, name) for name in config.narrowing)
    over = []
    if by_default and most.in_training > max(base, NEVER_MUCH):
        over.append(f"the base model's own {in_units(base)}")
    if free is not None and most.in_training > free:
        over.append(f"the {in_units(free)} of memory that are free")
    if not over:
        return
    kind = type(config).__name__
    advice = "; ".join(f"{field} ({effect})" for field, effect in config.savings().items())
    warnings.warn(
        f"{kind} adds {in_units(most.in_training)} to training, more than {' and '.join(over)}: "
        f"{most.trained / 1e6:,.0f} M parameters train in the phase {most.phase!r}, each with its gradient and the "
        f"two moments of an optimizer like AdamW (values in float32, PEFT's default), and the file has "
        f"{in_units(max(cost.file for cost in ahead))}. What lowers it: {advice}.",
        stacklevel=2,
    )


def _is_narrowed(config: PhasedConfig, name: str) -> bool:
    """Whether the user has given a field of `narrowing`."""
    given, default = config.given(name), type(config).__dataclass_fields__[name].default
    return given != default and not (name == "target_modules" and is_all_linear(given))


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base model's parameters, adapters and copies of modules apart."""
    return sum(map(_bytes_of, _base_parameters(model)))


def free_bytes(model: nn.Module) -> int | None:
    """Bytes that are free on the devices which the base model lies on; None if that is not known."""
    devices = {p.device for p in _base_parameters(model) if not p.is_meta}
    if not devices or any(device.type not in ("cpu", "cuda") for device in devices):
        return None
    return sum(_free_on(device) for device in devices)


def _free_on(device: torch.device) -> int:
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch has it at hand
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for _, module in walk(model):
        wrapped = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        inner = getattr(module, "original_module", None) if isinstance(module, AuxiliaryTrainingWrapper) else module
        base = base_of(inner if isinstance(inner, nn.Module) else module)
        found.update((id(p), p) for p in base.parameters(recurse=wrapped))
    return list(found.values())


def _bytes_of(parameter: torch.Tensor) -> int:
    return shape_of(parameter).numel() * parameter.element_size()
