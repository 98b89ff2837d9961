"""What the linear layers of all tuners share: sizes, layout, and what an adapter adds to weight and bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .feed_forward import sizes
from .functional import Dense, LowRank
from .layer import DeltaLayer


class DeltaLinear(DeltaLayer):
    """A linear layer plus the deltas of its adapters: `y = x (W + sum_k s_k B_k A_k + sum_j c_j D_j)^T + b + db`.

    Shapes: `x: (..., in_features)`, `A: (r, in_features)`, `B: (out_features, r)`, `D: (out_features, in_features)`,
    `db: (out_features,)`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features: Any
        self.out_features: Any
        self.in_features, self.out_features = sizes(base_layer)
        # transformers' Conv1D stores its weight as (in_features, out_features)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def matrices(self, adapter: str) -> tuple[list[LowRank], list[Dense]]:
        """What an adapter adds to the weight, as `(A, B, s)` and `(D, c)`, without gradients."""
        raise NotImplementedError

    def bias_delta(self, adapter: str) -> Tensor | None:
        """db, differentiable; None if the adapter has none here."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion keeps weight updates alone."""
        if self.has_adapter(adapter_name) and self.bias_delta(adapter_name) is None:
            return True
        return super().supports_lora_conversion(adapter_name)
