"""A module of any kind but linear with deltas on its parameters: norms, convolutions, biases, composites."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops.norm import call_with, norm_with
from ..structure.modules import is_norm
from ..structure.weights import base_of, shape_of
from .base import TransparentLayer, parameter_at

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DeltaModule(TransparentLayer):
    """A module at its parameters plus their deltas, summed over the active adapters.

    Shapes: `x` and what comes out are the module's own, and a delta has the shape of its parameter. A subclass gives
    the deltas.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        first = next(base_of(base_layer).parameters())
        self.out_features, *others = map(int, shape_of(first))
        self.in_features = math.prod(others) if others else self.out_features

    def parameter_deltas(self, adapter: str) -> dict[str, Tensor]:
        """`{(dotted) name of the module's parameter: its delta}`, differentiable."""
        raise NotImplementedError

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        return {name: delta.detach() for name, delta in self.parameter_deltas(adapter).items()}

    def values_with(self, adapters: list[str]) -> dict[str, Tensor]:
        """`{name of the module's parameter: its value plus the adapters' deltas}`, of those that have any."""
        base = self.get_base_layer()
        values: dict[str, Tensor] = {}
        for adapter in adapters:
            for name, delta in self.parameter_deltas(adapter).items():
                values[name] = (values[name] if name in values else parameter_at(base, name)) + delta
        return values

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        values = self.values_with(adapters)
        if not values:
            return self.base_layer(x, *args, **kwargs)
        if is_norm(base):
            bias = values.get("bias", getattr(base, "bias", None))
            return norm_with(base, x, values.get("weight", base.weight), bias, *args, **kwargs)
        cast = {name: value.to(parameter_at(base, name).dtype) for name, value in values.items()}
        if type(base) in _CONVOLUTIONS:  # as under FSDP functional_call reads the original parameters
            return base._conv_forward(x, cast.get("weight", base.weight), cast.get("bias", base.bias))
        if not all(isinstance(parameter_at(base, name), nn.Parameter) for name in cast):
            raise NotImplementedError(
                f"FSDP hides the parameters of a {type(base).__name__} from the call that adds deltas to them. Leave "
                "it out: exclude_modules, with the module's name."
            )
        return call_with(self.base_layer, cast, x, *args, **kwargs)


class DeltaNorm(DeltaModule):
    """A norm with `weight + dw` and `bias + db`; `dw, db: (features,)`, `x: (..., features)`."""

    #: Containers of the deltas, by the norm's parameter. The name of a container has "norm" or "bias" in it, by which
    #: Trainer exempts what it holds from weight decay.
    containers: ClassVar[dict[str, str]]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ModuleDict())

    def update_layer(self, adapter: str, config: Any) -> None:
        """Create the parameters of a new adapter."""
        for name in ("weight", "bias"):
            if getattr(self.get_base_layer(), name, None) is not None:
                self.add_parameter(self.containers[name], adapter, config, self.out_features)

    def parameter_deltas(self, adapter: str) -> dict[str, Tensor]:
        parts = [(name, self.containers[name]) for name in ("weight", "bias")]
        return {name: self.value(part, adapter) for name, part in parts if adapter in getattr(self, part)}
