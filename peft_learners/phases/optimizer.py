"""The optimizer's side of phases: parameters that change their shape, and what is called before its steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .shards import local


class Observer:
    """Called with the optimizer right before each of its steps."""

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        raise NotImplementedError

    def collect(self) -> None:
        """Bring together what the processes of an engine have seen. To be called by all of them, before a save."""


def _with_inner(optimizer: object) -> Iterator[object]:
    """An optimizer, the one that it holds, if it is a wrapper, and so on."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def raw_optimizer(optimizer: object) -> torch.optim.Optimizer | None:
    """The torch optimizer behind accelerate's wrapper, which is an Optimizer that holds another one."""
    *_, innermost = [None, *_with_inner(optimizer)]
    return innermost if isinstance(innermost, torch.optim.Optimizer) else None


def is_deepspeeds(optimizer: object) -> bool:
    """Whether DeepSpeed makes the steps: an optimizer of its own, or accelerate's wrapper for its engine."""
    return any("deepspeed" in type(one).__module__.split(".") for one in _with_inner(optimizer))


def is_offloaded(optimizer: object) -> bool:
    """Whether DeepSpeed makes the steps elsewhere than where the model is."""
    flags = ("cpu_offload", "offload_optimizer")
    return any(getattr(one, flag, False) for one in _with_inner(optimizer) for flag in flags)


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int | None:
    """Bytes that an optimizer holds beside the parameters, on this process; None without one."""
    if optimizer is None:
        return None
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = (local(value) for value in values if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in tensors)


def resize(
    parameter: nn.Parameter,
    value: torch.Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    carry: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Give a parameter values of another shape, and the optimizer what of its state belongs to those.

    The parameter stays the same object, because optimizers, clipping and users' own lists hold on to it.

    Args:
        value: the new values.
        optimizer: may hold state for the parameter.
        carry: takes the part of a state (a tensor of the old shape) that belongs to the new values; None: the
            optimizer starts afresh.
    """
    before = parameter.shape
    parameter.grad = None
    # The node that accumulates the gradient remembers the old shape, and lives on with any graph that is still
    # around (a loss, DDP's reducer). A change of type makes torch forget it (no float64: MPS has none).
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = value
    state = optimizer.state.pop(parameter, None) if optimizer is not None else None
    carried = _carried(state, before, carry) if state and carry is not None else None
    if optimizer is not None and carried is not None:
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


#: What schedulers and users set in a group, and no optimizer by itself.
_SET_FROM_OUTSIDE = {"params", "lr", "initial_lr", "weight_decay", "betas", "momentum", "eps"}


class GroupState:
    """What optimizers keep in their groups (steps, estimates of the rate: Prodigy, schedule-free ones), as a training
    finds it.

    Args:
        optimizer: at the start of a training.
        resumed: whether it has made steps already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, resumed: bool) -> None:
        self._resumed = resumed
        self._first = [
            {key: copy.deepcopy(value) for key, value in group.items() if key not in _SET_FROM_OUTSIDE}
            for group in optimizer.param_groups
        ]

    def reset(self, optimizer: torch.optim.Optimizer) -> None:
        """Let groups forget what the optimizer has written into them, as a new one would have them. Switches stay."""
        state: dict[Any, Any] = optimizer.state
        for entry in [entry for entry in state if not isinstance(entry, torch.Tensor)]:
            del state[entry]
        for group, first in zip(optimizer.param_groups, self._first, strict=False):
            for key in [key for key in group if key not in _SET_FROM_OUTSIDE and not isinstance(group[key], bool)]:
                default = optimizer.defaults.get(key)
                if key in first and _same(group[key], first[key]) and not (self._resumed and default is not None):
                    continue
                if key in optimizer.defaults:
                    group[key] = copy.deepcopy(default)
                elif key in first and not self._resumed:
                    group[key] = copy.deepcopy(first[key])
                else:
                    del group[key]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def before_each_step(optimizer: torch.optim.Optimizer, observer: Observer) -> RemovableHandle:
    """Call an observer right before each step of an optimizer, until the handle that is returned removes it.

    It sees gradients as the optimizer does: reduced over ranks, unscaled, clipped, and not at all where a step is
    skipped. The optimizer does not keep the observer alive, and forgets it with its last holder.
    """
    held = weakref.ref(observer)

    def hook(stepping: torch.optim.Optimizer, *_: object) -> None:
        called = held()
        if called is not None:
            called(stepping)

    handle = optimizer.register_step_pre_hook(hook)
    weakref.finalize(observer, handle.remove)
    return handle
