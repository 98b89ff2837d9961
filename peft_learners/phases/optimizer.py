"""What a phase boundary does outside the model: optimizer state and the exchange of gradients between processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .ddp import _living

Observer = Callable[[torch.optim.Optimizer], None]


def raw_optimizer(optimizer: object) -> torch.optim.Optimizer | None:
    """The torch optimizer behind accelerate's wrapper."""
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    inner = getattr(optimizer, "optimizer", None)  # AcceleratedOptimizer is an Optimizer that holds another one
    return raw_optimizer(inner) if inner is not None else optimizer


def for_float64(values: torch.Tensor) -> torch.Tensor:
    """The values on a device that has float64: where they are, and from MPS on the CPU."""
    return values.cpu() if values.device.type == "mps" else values


def free_optimizer_state(optimizer: object, parameters: Iterable[nn.Parameter]) -> None:
    """Drop the optimizer's state of parameters that stopped training.

    They stay in their groups, with `grad = None`, which optimizers skip (weight decay too): taking them out would make
    a later resume fail on the size of the groups, and a changed number of groups breaks LambdaLR.
    """
    optimizer = raw_optimizer(optimizer)
    if optimizer is not None:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


@dataclass(frozen=True)
class Resized:
    """A parameter that keeps its identity and gets values of another shape.

    Attributes:
        parameter: the parameter.
        value: its new values.
        carry: takes the part of an optimizer's state (a tensor of the old shape) that belongs to the new values;
            None: the optimizer starts afresh.
    """

    parameter: nn.Parameter
    value: torch.Tensor
    carry: Callable[[torch.Tensor], torch.Tensor] | None


def resize(changes: Iterable[Resized], optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Give parameters their new values, and the optimizers that hold state for them what belongs to those.

    A parameter stays the same object, because optimizers, clipping and users' own lists hold on to it.
    """
    optimizers = list(optimizers)
    for change in changes:
        parameter, before = change.parameter, change.parameter.shape
        parameter.grad = None
        # The node that accumulates the gradient remembers the old shape, and lives on with any graph that is still
        # around (a loss, DDP's reducer). A change of type makes torch forget it (no float64: MPS has none).
        other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
        parameter.data = parameter.data.new_empty(0, dtype=other)
        parameter.data = change.value
        for optimizer in optimizers:
            state = optimizer.state.pop(parameter, None)
            carried = _carried(state, before, change.carry) if state and change.carry is not None else None
            if carried is not None:
                optimizer.state[parameter] = carried


def _carried(
    state: dict[str, Any], shape: torch.Size, carry: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any] | None:
    """The state's part for the new values; None for kinds of state that can't be split (factored, quantised)."""
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == shape and value.is_floating_point():
            carried[key] = carry(value)
        elif isinstance(value, torch.Tensor) and value.numel() > 1:
            return None
        else:
            carried[key] = value
    return carried


def live_optimizers() -> list[torch.optim.Optimizer]:
    """All torch optimizers of this process, so that whoever made one need not hand it over."""
    raw = (raw_optimizer(optimizer) for optimizer in _living(torch.optim.Optimizer))
    return list({id(found): found for found in raw if found is not None and hasattr(found, "state")}.values())


class StepObservers:
    """What is called, by name, with an optimizer right before each of its steps.

    One hook on all optimizers of the process, while there is anything to call: it sees gradients as the optimizer does
    (reduced over ranks, unscaled, clipped, and not at all where a step is skipped), in Trainer and in any loop. It
    does not keep this object alive, and goes with it.
    """

    def __init__(self) -> None:
        self._observers: dict[str, Observer] = {}
        self._hook: Any = None

    def set(self, name: str, observer: Observer | None) -> None:
        """Call this one by that name from now on; None: nothing."""
        self._observers.pop(name, None)
        if observer is not None:
            self._observers[name] = observer
        if self._observers and self._hook is None:
            own = weakref.ref(self)

            def before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
                observers = own()
                for called in list(observers._observers.values()) if observers is not None else ():
                    called(optimizer)

            self._hook = register_optimizer_step_pre_hook(before_step)
            weakref.finalize(self, self._hook.remove)
        elif not self._observers and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def clear(self) -> None:
        """Call nothing any more."""
        for name in list(self._observers):
            self.set(name, None)
