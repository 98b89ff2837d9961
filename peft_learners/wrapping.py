"""What a model must be to be wrapped, and what an earlier wrapping has left in it."""

from __future__ import annotations

import warnings

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .layers.base import DeltaLayer
from .phases.driver import PhaseDriver


def original_model(model: nn.Module, config: str) -> nn.Module:
    """The model to put an adapter on: the one that was given, or, where that is an earlier call's `PeftModel` with
    adapters of this package, the model in it.

    Args:
        config: name of the config's class, for the message.

    Raises:
        ValueError: the model is compiled, so that its modules have other names.
    """
    if "_orig_mod" in model._modules:
        raise ValueError(
            f"The model is compiled (a {type(model).__name__}, as torch.compile returns it), and an adapter replaces "
            "modules of the original one. Adapt that first, then compile what comes out: "
            f"torch.compile(get_peft_model(model, {config}(...))), with the model as it was before torch.compile "
            "(model._orig_mod)."
        )
    base = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    inner = getattr(base, "model", None)
    return inner if isinstance(inner, nn.Module) and hasattr(type(base), "update_and_allocate") else model


def take_out(model: nn.Module, adapter: str) -> None:
    """Take an adapter out that an earlier wrapping of the model has left in it: then a new one of that name begins as
    on a model that was never wrapped. Layers and heads without any other adapter give way to the original modules.

    Raises:
        ValueError: another kind of tuner holds it, or it is merged into the weights. The model is as it was.
    """
    held = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in module._all_available_adapter_names()
    ]
    for name, layer in held:
        if not isinstance(layer, DeltaLayer):
            raise ValueError(
                f"The model still holds the adapter {adapter!r} of an earlier call: {name} is a "
                f"{type(layer).__name__} of {type(layer).__module__.rpartition('.')[0]}, which would go on acting "
                "below the new adapter. "
                "Take it out first (`base = model.unload()`, with the model that get_peft_model had returned), or "
                "load the base model anew."
            )
        if adapter in layer.merged_adapters:
            raise ValueError(
                f"The model still holds the adapter {adapter!r} of an earlier call, merged into its weights. Take it "
                "out first, with the model that get_peft_model had returned: `base = model.unload()` gives the base "
                "model back, `base = model.merge_and_unload()` keeps what the adapter has learned."
            )
    if not held:
        return
    PhaseDriver.forget(model, adapter)
    for name, module in reversed(list(model.named_modules())):  # what lies inside another one first
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            if len(module._adapters) > 1:
                module.delete_adapter(adapter, [])
            else:
                _put(model, name, module.original_module)
        elif isinstance(module, DeltaLayer) and module.has_adapter(adapter):
            if len(module._all_available_adapter_names()) > 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # which of the others is active then: injection sets it
                    module.delete_adapter(adapter)
            else:
                module.let_go()
                _put(model, name, module.base_layer)


def put_back_empty(model: nn.Module) -> None:
    """Undo the wrapping of modules without values. PEFT saves whole what ends like a name, for a head called `out`
    every dropout, and mixed batches can't go through what it wraps but linear layers and the like."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and not module.original_module.state_dict():
            _put(model, name, module.original_module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
