"""Modules that are trained and saved whole with an adapter: a model's head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper, other
from torch import nn


class _Later(dict[str, str]):
    """Names that whoever goes through them does not see yet."""

    def __iter__(self) -> Iterator[str]:
        return iter(())


class ModulesToSaveWrapper(other.ModulesToSaveWrapper):
    """PEFT's wrapper of a module that is trained whole, with another order of loading.

    PEFT gives the values in a file the names that they have in the model, before it asks the tuner; where one is
    missing, that ends as a bare `KeyError`. For adapters in `left_to_tuner` it finds nothing to rename, and the tuner
    does it, once it has looked at all of the file.
    """

    left_to_tuner: set[str]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        names = super().adapter_state_dict_load_map(adapter_name)
        return _Later(names) if adapter_name in self.left_to_tuner else names

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__  # what PEFT and its messages call it

    def delete_adapter(self, adapter_name: str, new_active_adapters: Any) -> None:
        super().delete_adapter(adapter_name, new_active_adapters)
        self.left_to_tuner.discard(adapter_name)


def leave_to_tuner(root: nn.Module, adapter: str) -> None:
    """Let the tuner load what an adapter saves whole."""
    wrappers: list[Any] = [module for module in root.modules() if isinstance(module, other.ModulesToSaveWrapper)]
    for wrapper in wrappers:
        if adapter in wrapper.modules_to_save:
            if not isinstance(wrapper, ModulesToSaveWrapper):  # PEFT has no place for another class than its own
                wrapper.__class__ = ModulesToSaveWrapper
                wrapper.left_to_tuner = set()
            wrapper.left_to_tuner.add(adapter)


def names_in_model(root: nn.Module, adapter: str) -> dict[str, str]:
    """`{name in a file: name in the model}` of the values that an adapter saves whole."""
    return {
        f"{place}.{name}": f"{place}.{full}"
        for place, module in ((n.removeprefix("_fsdp_wrapped_module."), m) for n, m in root.named_modules())
        if isinstance(module, AuxiliaryTrainingWrapper)
        for name, full in module.adapter_state_dict_load_map(adapter).items()
    }
