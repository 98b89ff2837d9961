"""What a phase boundary does outside the model: optimizer state and the exchange of gradients between processes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

T = TypeVar("T")
Observer = Callable[[torch.optim.Optimizer], None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind `DistributedDataParallel` and `torch.compile`."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


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


def _living(kind: type[T]) -> list[T]:
    """All objects of a class in this process."""
    # type() rather than isinstance(): it runs no code of foreign objects.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


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


def ddp_wrappers(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """All DDP wrappers in this process that hold `model`, itself or somewhere inside.

    Trainer gives callbacks the bare model and keeps the wrapper in a local variable; the garbage collector knows it.
    A Trainer that has finished may still be alive with a wrapper of its own.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    target, wrappers = unwrapped(model), _living(nn.parallel.DistributedDataParallel)
    return [wrapper for wrapper in wrappers if any(module is target for module in wrapper.modules())]


def agreed(model: nn.Module, choices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The choices of the first rank, on all ranks that train `model` in DDP; the same choices where there is no DDP.

    Args:
        choices: index tensors by name, of the same names and sizes on all ranks. To be called by all ranks.
    """
    wrappers = ddp_wrappers(model)
    if not wrappers or not choices:
        return choices
    group = wrappers[-1].process_group
    device = next(model.parameters()).device
    flat = torch.cat(list(choices.values())).to(device)
    torch.distributed.broadcast(flat, src=torch.distributed.get_global_rank(group, 0), group=group)
    pieces = flat.split([len(choice) for choice in choices.values()])
    return {name: piece.to(choice.device) for (name, choice), piece in zip(choices.items(), pieces, strict=True)}


def rebuild_reducer(ddp: nn.parallel.DistributedDataParallel, constant: Iterable[torch.Tensor] = ()) -> None:
    """Let DDP reduce exactly the gradients that are trained now. To be called by all ranks between two steps.

    Nothing is sent: a wrapper that is no longer used may be rebuilt on one rank and not on another.

    Args:
        constant: buffers that are the same on all ranks and change at boundaries only. DDP, which sends every buffer
            from the first rank before each forward, leaves them out from now on.

    DDP registers its hooks once, at construction; parameters that freeze later would leave it waiting for their
    gradients, and parameters that begin to train later would silently stay unsynchronised. This is DDP's own
    way of rebuilding itself after unpickling (`__setstate__`), on the same object, because Trainer holds on to it.
    """
    ddp._remove_autograd_hooks()
    hooks = list(ddp._comm_hooks)
    ours = {id(buffer) for buffer in constant}
    ddp.parameters_to_ignore |= {
        name for name, buffer in ddp.module.named_buffers(remove_duplicate=False) if id(buffer) in ours
    }
    static_graph, ddp.static_graph = ddp.static_graph, False
    parameters, sparse = ddp._build_params_for_reducer()
    if not parameters:
        raise RuntimeError("No parameter of the model trains in this phase: there is nothing left for DDP to reduce.")
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, static_graph)
    ddp._has_rebuilt_buckets = False
    if static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp._set_static_graph()
    ddp._comm_hooks = []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
