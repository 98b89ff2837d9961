"""Initial values that any process can rebuild at any time from a seed and a name, so that nothing has to be stored."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def initial_normal(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """Normal values of mean 0, float32 on the CPU, that depend on the arguments alone.

    Args:
        std: standard deviation.
        seed: the adapter's seed.
        name: of the module and its part, e.g. "encoder.layer.0.query/U".
    """
    return torch.randn(shape, generator=generator_of(seed, name)) * std


def shuffled(value: Tensor, seed: int, name: str) -> Tensor:
    """The entries of `value` in an order that depends on `seed` and `name` alone: for independent and identically
    distributed entries as good as another draw of them."""
    order = torch.randperm(value.numel(), generator=generator_of(seed, name)).to(value.device)
    return value.flatten()[order].view_as(value)
