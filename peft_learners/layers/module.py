"""What the norms of tuners share that put deltas on a norm's weight and bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops import norm_with, sum_of
from ..structure.weights import base_of
from .base import TransparentLayer


class DeltaNorm(TransparentLayer):
    """A norm with `weight + dw` and `bias + db`; `dw, db: (features,)`, `x: (..., features)`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        weight: Any = base_of(base_layer).weight
        self.in_features = self.out_features = int(weight.shape[0])

    def weight_delta(self, adapter: str) -> Tensor:
        """dw, differentiable."""
        raise NotImplementedError

    def bias_delta(self, adapter: str) -> Tensor | None:
        """db, differentiable; None if the norm has no bias."""
        raise NotImplementedError

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        weight = sum_of(base.weight, [self.weight_delta(name) for name in adapters])
        assert weight is not None
        biases = [self.bias_delta(name) for name in adapters]
        bias = sum_of(getattr(base, "bias", None), [delta for delta in biases if delta is not None])
        return norm_with(base, x, weight, bias, *args, **kwargs)

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        deltas = {"weight": self.weight_delta(adapter).detach()}
        bias = self.bias_delta(adapter)
        if bias is not None:
            deltas["bias"] = bias.detach()
        return deltas
