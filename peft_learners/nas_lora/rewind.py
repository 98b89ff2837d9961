"""Going back to the beginning: initial values that any process can rebuild, and those of the head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


def rewind_saved_modules(
    root: nn.Module,
    adapter: str,
    fresh: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    fresh_names: Collection[str] = (),
) -> None:
    """Give an adapter's copies of whole modules (the head) the values back that they began with.

    Args:
        fresh: makes, of a parameter's name and its first values, other ones to begin with.
        fresh_names: names of the modules for which it is used.
    """
    for name, module in root.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter not in module.modules_to_save:
            continue
        first = module.original_module.state_dict()
        if fresh is not None and name in fresh_names:
            first = {k: fresh(f"{name}.{k}", v) if v.is_floating_point() else v for k, v in first.items()}
        with torch.no_grad():
            for key, value in module.modules_to_save[adapter].state_dict().items():
                value.copy_(first[key])


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def shuffled(value: Tensor, seed: int, name: str) -> Tensor:
    """The entries of `value` in an order that depends on `seed` and `name` alone: for independent and identically
    distributed entries as good as another draw of them."""
    order = torch.randperm(value.numel(), generator=generator_of(seed, name)).to(value.device)
    return value.flatten()[order].view_as(value)
