"""Going back to the beginning: initial values that any process can rebuild, and those of the head."""

from __future__ import annotations

import hashlib

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..phases.shards import whole
from ..structure.modules import new_head


def rewind_saved_modules(root: nn.Module, adapter: str, seed: int = 0, salt: str = "") -> None:
    """Give an adapter's copies of whole modules (the head) the values back that they began with.

    Args:
        seed, salt: with a salt, a new head begins with other values, which depend on both.
    """
    head = new_head(root) if salt else []
    for name, module in root.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter not in module.modules_to_save:
            continue
        # ZeRO-3 holds parts of a base model that was loaded after TrainingArguments were made.
        first = {key: whole(value) for key, value in module.original_module.state_dict(keep_vars=True).items()}
        if name in head:
            first = {
                key: shuffled(value, seed, f"{name}.{key}{salt}") if value.is_floating_point() else value
                for key, value in first.items()
            }
        with torch.no_grad():
            for key, value in module.modules_to_save[adapter].state_dict().items():
                value.copy_(first[key])


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def shuffled(value: Tensor, seed: int, name: str) -> Tensor:
    """The entries of `value` in an order that depends on `seed` and `name` alone: for independent and identically
    distributed entries as good as another draw of them."""
    order = torch.randperm(value.numel(), generator=generator_of(seed, name), device="cpu").to(value.device)
    return value.flatten()[order].view_as(value)
