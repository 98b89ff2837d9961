"""What a phase boundary does to DistributedDataParallel: the gradients it exchanges, choices that ranks share."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind `DistributedDataParallel` and `torch.compile`."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


def processes() -> int | None:
    """Number of processes that train together; None outside a process group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else None


def is_first_process() -> bool:
    """Whether this process is the one that says what all of them do."""
    return processes() is None or torch.distributed.get_rank() == 0


def holds(wrapper: nn.Module, model: nn.Module) -> bool:
    """Whether `model` is `wrapper` or somewhere inside."""
    return any(module is model for module in wrapper.modules())


def ddp_modules(model: nn.Module, wrappers: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """The DDP modules around `model`, among what forward is called on: such a one itself, or compiled, or inside."""
    modules = {id(module): module for wrapper in wrappers for module in wrapper.modules()}
    return [m for m in modules.values() if isinstance(m, DistributedDataParallel) and holds(m, model)]


def search_ddp_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """All DDP wrappers in this process that hold `model`. For Trainer alone, which leaves no other way.

    It gives callbacks the bare model and keeps the wrapper in a local variable; the garbage collector knows it. A
    Trainer that has finished may still be alive with a wrapper of its own.
    """
    if processes() is None:
        return []
    target = unwrapped(model)
    # type() rather than isinstance(): it runs no code of foreign objects.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return [wrapper for wrapper in found if holds(wrapper, target)]


@dataclass(frozen=True)
class Ranks:
    """Processes that make a choice together.

    Attributes:
        group: torch's.
        device: on which its backend sends.
    """

    group: Any
    device: torch.device


def ranks_of(ddp: Sequence[DistributedDataParallel]) -> Ranks | None:
    """The processes that train in DDP; None where there are none."""
    return Ranks(ddp[-1].process_group, next(ddp[-1].parameters()).device) if ddp else None


def all_ranks() -> Ranks | None:
    """All processes of this one's world; None without one."""
    if processes() in (None, 1):
        return None
    group = torch.distributed.group.WORLD
    is_gloo = "gloo" in torch.distributed.get_backend(group)
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else torch.device("cuda")
    return Ranks(group, torch.device("cpu") if is_gloo or accelerator is None else accelerator)


def broadcast_choice(choices: dict[str, torch.Tensor], ranks: Ranks | None) -> dict[str, torch.Tensor]:
    """The choices of the first rank, on all ranks; the same choices where there are none.

    Args:
        choices: index tensors by name, of the same names and sizes on all ranks. To be called by all ranks.
    """
    if ranks is None or not choices:
        return choices
    group, device = ranks.group, ranks.device
    flat = torch.cat(list(choices.values())).to(device)
    torch.distributed.broadcast(flat, src=torch.distributed.get_global_rank(group, 0), group=group)
    pieces = flat.split([len(choice) for choice in choices.values()])
    return {name: piece.to(choice.device) for (name, choice), piece in zip(choices.items(), pieces, strict=True)}


def rebuild_reducer(ddp: DistributedDataParallel, constant: Iterable[torch.Tensor] = ()) -> None:
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
