"""Bottleneck layers: a linear layer with small networks behind it or beside it, and a norm with deltas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..layers.base import DeltaLayer, draw_first
from ..layers.linear import call_base
from ..layers.module import DeltaNorm
from ..structure.weights import sizes
from .config import BottleneckConfig
from .passing import FeedForwardInput


class BottleneckLayer(DeltaLayer):
    """Common to the layers of bottleneck adapters."""

    def check_mergeable(self, adapter: str) -> None:
        """Refuse to merge.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(BottleneckConfig.unmergeable)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No; a warning says why."""
        warnings.warn(BottleneckConfig.unmergeable, stacklevel=2)
        return False

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class BottleneckLinear(BottleneckLayer):
    """A linear layer and its adapters, with `A(z) = W_up f(W_down z + b_down) + b_up`.

    Sequential: `y + scaling * A(y)`, where `y: (..., out_features)` is the layer's output. Parallel: `y + scaling *
    A(x)`, where `x: (..., features)` is what the feed-forward network got that this layer leads out of. Several active
    adapters add up; each sequential one gets y as the base layer gives it.

    Shapes: `W_down: (bottleneck_dim, features)`, `b_down: (bottleneck_dim,)`, `W_up: (out_features, bottleneck_dim)`,
    `b_up: (out_features,)`.

    Source: arXiv 1902.00751, section 2.1; arXiv 2110.04366, section 3.3.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation", "bottleneck_dropouts", "bottleneck_mode", "bottleneck_scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = sizes(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        # No modules: they would be found by the endings of their names, as modules_to_save are.
        self.bottleneck_activation: dict[str, Callable[[Tensor], Tensor]] = {}
        self.bottleneck_dropouts = nn.ModuleDict()  # which tools switch off
        self.bottleneck_mode: dict[str, str] = {}
        self.bottleneck_scaling: dict[str, float] = {}
        #: Of the feed-forward network, for parallel adapters.
        self.bottleneck_input: FeedForwardInput | None = None

    def update_layer(self, adapter: str, config: BottleneckConfig, features: int) -> None:
        """Create the parameters of a new adapter.

        Args:
            features: size of what the adapter gets.
        """
        width = config.bottleneck_dim
        assert width is not None and config.scaling is not None
        self.bottleneck_mode[adapter] = config.mode
        self.bottleneck_scaling[adapter] = float(config.scaling)
        self.bottleneck_activation[adapter] = ACT2FN[config.non_linearity]
        self.bottleneck_dropouts[adapter] = nn.Dropout(config.dropout)
        made: dict[str, Any] = {"dtype": torch.float32, "device": self.drawing_device(adapter)}
        down = self.bottleneck_down[adapter] = nn.Linear(features, width, **made)
        up = self.bottleneck_up[adapter] = nn.Linear(width, self.out_features, **made)
        for parameter in (*down.parameters(), *up.parameters()):
            draw_first(parameter, config, kaiming=parameter is down.weight)

    def let_go(self) -> None:
        if self.bottleneck_input is not None:
            self.bottleneck_input.disconnect()

    def is_parallel(self, adapter: str) -> bool:
        """Whether the adapter is here, and gets the feed-forward network's input."""
        return self.bottleneck_mode.get(adapter) == "parallel"

    def wants_input(self) -> bool:
        """Whether a parallel adapter may act in the forward pass that is going on."""
        names = self.bottleneck_mode if self.in_mixed_batch else self.active_adapters
        return not self.disable_adapters and any(self.is_parallel(name) for name in names)

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        given = self._input_of_network(x, adapters)
        y = call_base(self, x, *args, **kwargs)
        out = y
        for name in adapters:
            out = self._plus(out, name, given if self.is_parallel(name) else y)
        return out.to(y.dtype)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if self.has_adapter(name):
                rows.setdefault(name, []).append(row)
        given = self._input_of_network(x, list(rows))
        y = call_base(self, x, *args, **kwargs)
        out = y.clone()
        for name, indices in rows.items():
            source = given if given is not None and self.is_parallel(name) else y
            out[indices] = self._plus(y[indices], name, source[indices]).to(y.dtype)
        return out

    def _input_of_network(self, x: Tensor, adapters: list[str]) -> Tensor | None:
        """What parallel adapters get: (..., features); None if there are none among these."""
        if not any(self.is_parallel(name) for name in adapters):
            return None
        given = self.bottleneck_input.take() if self.bottleneck_input is not None else None
        if given is None or given.shape[:-1] != x.shape[:-1]:
            got = "it was not called" if given is None else f"that got {tuple(given.shape)}"
            alike = given is not None and given.shape[1:-1] == x.shape[1:-1]
            if self.in_mixed_batch and given is not None and alike and len(given) < len(x):
                raise NotImplementedError(
                    "A parallel adapter needs all rows of a mixed batch, but the first linear layer of its "
                    f"feed-forward network got {len(given)} of {len(x)} at once. An adapter trains that layer whole "
                    "(modules_to_save), so PEFT splits the batch before it. Make one call per adapter."
                )
            raise RuntimeError(
                "A parallel adapter needs the input and the output of a feed-forward network row by row. This model "
                f"reshapes or selects rows between the first linear layer ({got}) and the last one (that got "
                f"{tuple(x.shape)}). Leave such networks out with exclude_modules, or take "
                "BottleneckConfig(mode='sequential')."
            )
        return given.to(x.device)  # the first layer may be another device's

    def _plus(self, out: Tensor, adapter: str, z: Tensor | None) -> Tensor:
        """`out + scaling * A(z)`; in the wider of both types."""
        assert z is not None
        down: Any = self.bottleneck_down[adapter]
        hidden = self.bottleneck_activation[adapter](down(self._cast_input_dtype(z, down.weight.dtype)))
        update = self.bottleneck_up[adapter](self.bottleneck_dropouts[adapter](hidden))
        return torch.add(out, update, alpha=self.bottleneck_scaling[adapter])


class BottleneckNorm(BottleneckLayer, DeltaNorm):
    """A norm with deltas on its weight and bias."""

    containers: ClassVar = {"weight": "bottleneck_layernorm_delta", "bias": "bottleneck_bias_delta"}
    adapter_layer_names = tuple(containers.values())
