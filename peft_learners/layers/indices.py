"""Buffers that hold indices: of nodes that FAR keeps, of units that NAS-LoRA keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor


def fault_of(indices: Tensor, count: int) -> str:
    """A sentence's end about indices that are not ascending whole numbers from 0 to below `count`; "" if they are."""
    values = indices.flatten().to("cpu", torch.int64)
    outside = values[(values < 0) | (values >= count)]
    falls = (values[1:] <= values[:-1]).nonzero()
    if not len(outside) and not len(falls):
        return ""
    got = outside[0] if len(outside) else values[int(falls[0]) : int(falls[0]) + 2]
    return f"must be ascending whole numbers from 0 to {count - 1}, got {got.tolist()}"


class IndexBuffers(BufferDict):
    """Indices by adapter. Those that a loader puts in place of others are checked: transformers' own asks nobody.

    Args:
        count: gives, for an adapter, the number that its indices must lie below.
    """

    def __init__(self, count: Callable[[str], int]) -> None:
        super().__init__(persistent=True)
        self._count = count

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_meta and name in self._buffers:
            fault = fault_of(value, self._count(name))
            if fault:
                raise ValueError(f"The checkpoint does not fit the adapter {name!r}: indices {fault}.")
        super().__setattr__(name, value)
