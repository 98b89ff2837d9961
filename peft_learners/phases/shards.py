"""What engines hold of a parameter in each process: all of it, FSDP's shard, or DeepSpeed's part of a flat tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..structure.weights import shape_of


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP holds a part of the parameter in each process."""
    # A DTensor has placements; its module takes long to import.
    return hasattr(parameter, "placements") or hasattr(parameter, "_fsdp_flattened")


def is_in_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed trains a copy of the parameter, in flat tensors of its own."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """The values of a parameter, wherever they lie. To be called by all processes."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    value: Any = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Any) -> Tensor:
    """What this process holds of a tensor that FSDP may have in shards."""
    return value.to_local() if hasattr(value, "to_local") else value


@dataclass(frozen=True)
class Piece:
    """The entries of a parameter that this process updates, as its optimizer is about to; DeepSpeed's are flat."""

    value: Tensor
    gradient: Tensor


def piece_of(parameter: Tensor, optimizer: torch.optim.Optimizer) -> Piece | None:
    """What an optimizer is about to update of a parameter in this process; None if that is nothing in any.

    Args:
        optimizer: torch's own, whose step is about to begin. DeepSpeed makes a step for each of its groups.
    """
    if not is_in_deepspeed(parameter):
        gradient = parameter.grad
        if gradient is None:
            return None
        return Piece(local(parameter.detach()), local(gradient))
    value = _deepspeeds_value(parameter)
    if value is None:
        nothing = torch.empty(0, device=parameter.device)
        return Piece(nothing, nothing)
    for flat in (flat for group in optimizer.param_groups for flat in group["params"]):
        if flat.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and flat.grad is not None:
            start = value.storage_offset() - flat.storage_offset()
            return Piece(value, flat.grad.narrow(0, start, value.numel()))
    return None


def split(parameter: Tensor, values: Tensor) -> Tensor:
    """This process's piece of a tensor that has the parameter's shape."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        placed: Any = parameter
        return distribute_tensor(values, placed.device_mesh, placed.placements, src_data_rank=None).to_local()
    if is_in_deepspeed(parameter):
        start, count = _span(parameter)
        return values.flatten().narrow(0, start, count).clone()
    return values


def compared(parameter: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    """What this process has at hand of a parameter, and the same part of other values. Asks no other process."""
    if hasattr(parameter, "placements"):
        here = parameter.detach().to_local()
        return here, split(parameter, values.to(here))
    if hasattr(parameter, "ds_id"):
        here = parameter.ds_tensor.detach().flatten()[: _span(parameter)[1]]
        return here, split(parameter, values.to(here))
    return parameter.detach(), values.to(parameter)


def assembled(parameter: Tensor, piece: Tensor) -> Tensor:
    """The tensor of the parameter's shape whose pieces the processes have. To be called by all of them."""
    placed: Any = parameter
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import DTensor

        mesh, placements, stride = placed.device_mesh, placed.placements, parameter.stride()
        return DTensor.from_local(piece, mesh, placements, shape=parameter.shape, stride=stride).full_tensor()
    if is_in_deepspeed(parameter):
        start, count = _span(parameter)
        flat = piece.new_zeros(math.prod(shape_of(parameter)))
        flat.narrow(0, start, count).copy_(piece[:count])
        group = placed.ds_process_group if hasattr(parameter, "ds_id") else placed._dp_group
        torch.distributed.all_reduce(flat, group=group)
        return flat.view(shape_of(parameter))
    return piece


def _deepspeeds_value(parameter: Any) -> Tensor | None:
    """The float32 entries that DeepSpeed updates in this process, as a view of its flat tensor."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param

        _, count = _span(parameter)
        return safe_get_local_fp32_param(parameter)[:count] if count else None
    return parameter._hp_mapping.hp_fragment if parameter._hp_mapping is not None else None


def _span(parameter: Any) -> tuple[int, int]:
    """Where this process's entries begin in the flat parameter, and how many there are."""
    if hasattr(parameter, "ds_id"):
        size, total = parameter.partition_numel(), math.prod(shape_of(parameter))
        start = min(size * torch.distributed.get_rank(parameter.ds_process_group), total)
        return start, min(size, total - start)
    if parameter._hp_mapping is None:
        return 0, 0
    address = parameter._hp_mapping.lp_fragment_address
    return address.start, address.numel
