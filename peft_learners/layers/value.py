"""One tensor of an adapter, in a module of its own: `<path>.<part>.<adapter>.weight`, as LoRA's are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..phases.optimizer import resize
from ..phases.shards import is_in_deepspeed, is_sharded, whole


class Value(nn.Module):
    """A tensor that is a parameter while it trains, and a persistent buffer while it only contributes.

    Called, it gives the tensor. A checkpoint of what requires a gradient, and whatever filters parameters by flag or
    name, thus keeps all that the adapter computes with.

    Args:
        value: the tensor, of any shape.
        name: what it is called in a state dict, "weight" or "bias".
    """

    def __init__(self, value: Tensor, name: str = "weight") -> None:
        super().__init__()
        self.name = name
        #: Of the whole tensor. ZeRO-3 shows none, and fetches a parameter that is only looked at.
        self.shape = value.shape
        #: Whether nothing is left of it. An optimizer that is yet to load its state may need the parameter.
        self.is_empty = False
        #: The parameter of a frozen value: optimizers hold it, and it trains again if the value does.
        self.__dict__["_resting"] = None
        #: Whether it is frozen as a parameter, under FSDP, which shards parameters alone.
        self._is_held = False
        #: What a checkpoint has for a parameter of DeepSpeed's, which puts another value there afterwards.
        self.__dict__["_loaded"] = None
        self.register_parameter(name, nn.Parameter(value))

    def forward(self) -> Tensor:
        value = getattr(self, self.name)
        # FSDP2 makes a module of its own a subclass, FSDP1 marks all. It frees what such a module has as it returns.
        alone = type(self) is not Value or self.__dict__.get("_is_fsdp_managed_module", False)
        return value.clone() if alone else value

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("name") == "bias":  # PEFT's policy for FSDP asks for a weight
            return self.tensor
        return super().__getattr__(name)

    @property
    def tensor(self) -> Tensor:
        """What a call gives, for who does not compute with it: an engine may fetch the value for a call."""
        return getattr(self, self.name)

    @property
    def is_frozen(self) -> bool:
        """Whether the value contributes without training."""
        return self._is_held or self.name in self._buffers

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, at rest while the value is frozen."""
        resting = self.__dict__["_resting"]
        return resting if self.name in self._buffers else getattr(self, self.name)

    def freeze(self) -> None:
        """Make it a buffer, or, in shards, a parameter that does not train; the gradient is freed."""
        if self.is_frozen:
            return
        parameter = getattr(self, self.name)
        parameter.requires_grad_(False)
        parameter.grad = None
        if is_sharded(parameter):
            self._is_held = True
            return
        value, loaded = parameter.detach(), self.__dict__["_loaded"]
        if is_in_deepspeed(parameter):  # it goes on moving what it holds: what contributes is a copy
            value = whole(parameter).clone() if loaded is None else loaded.to(parameter.device, parameter.dtype)
            parameter = None
        delattr(self, self.name)
        self.register_buffer(self.name, value)
        self.__dict__["_resting"] = parameter

    def unfreeze(self) -> None:
        """Make it a parameter again, the same one if there was one; its flag is left to the caller."""
        self._is_held = False
        if not self.is_frozen:
            return
        value, parameter = getattr(self, self.name), self.__dict__["_resting"]
        delattr(self, self.name)
        if parameter is None or parameter.is_meta != value.is_meta:  # of a copied model, or one that was loaded late
            parameter = nn.Parameter(value, requires_grad=False)
        elif parameter.data_ptr() != value.data_ptr() or parameter.shape != value.shape:
            resize(parameter, value)
        self.__dict__["_resting"] = None
        self.register_parameter(self.name, parameter)

    def forget_loaded(self) -> None:
        """A training has begun: what a checkpoint had is where it belongs."""
        self.__dict__["_loaded"] = None

    def hold(self) -> None:
        """Make a frozen value a parameter that does not train, so that FSDP shards it."""
        if self.name in self._buffers:
            value = getattr(self, self.name)
            delattr(self, self.name)
            self.register_parameter(self.name, nn.Parameter(value, requires_grad=False))
            self.__dict__["_resting"], self._is_held = None, True

    def requires_grad_(self, requires_grad: bool = True) -> Value:
        """As in torch, but that what is frozen stays so, whatever PEFT switches."""
        super().requires_grad_(requires_grad and not self.is_frozen)
        return self

    def set(
        self,
        value: Tensor,
        optimizer: Optimizer | None = None,
        carry: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Give it a tensor of another shape, on the device and in the type that it has; see `phases.optimizer.resize`.

        Args:
            optimizer, carry: as for `resize`.
        """
        now = getattr(self, self.name)
        value = value.detach().to(now.device, now.dtype)
        if self.is_frozen:
            setattr(self, self.name, value)
        else:
            resize(now, value, optimizer, carry)
        self.is_empty, self.shape = False, value.shape

    def clear(self, optimizer: Optimizer | None = None) -> None:
        """Leave nothing of it but an empty parameter, without state in the optimizer."""
        self.unfreeze()
        now = getattr(self, self.name)
        resize(now, now.detach().new_empty(0), optimizer)
        self.is_empty, self.shape = True, torch.Size([0])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + self.name)
        if given is not None and self.name in self._parameters and is_in_deepspeed(self.parameter):
            self.__dict__["_loaded"] = given
            if given.shape != self.parameter.shape:  # ZeRO-3 has parts of it in files of its own
                return
        if not self.is_empty or given is not None:  # of an empty one nothing was saved
            super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resting": None, "_loaded": None}  # no optimizer of this model holds a copy's

    def extra_repr(self) -> str:
        kind = "buffer" if self.is_frozen else "parameter"
        return f"{self.name}: {kind} {tuple(self.shape)}"
