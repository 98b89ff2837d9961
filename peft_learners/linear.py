"""What the linear layers of all tuners share: sizes, layout, and what an adapter adds to weight and bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .discovery import float_weight, is_computed
from .feed_forward import sizes
from .functional import Dense, LowRank
from .layer import DeltaLayer, cannot_merge_into


def _leads_back(out: Tensor, x: Tensor) -> bool:
    """Whether gradients of a layer's output reach its input.

    An operator without a backward leaves a node of this name, which only warns, and only once, as it drops them.
    """
    if not out.requires_grad or torch.compiler.is_compiling():
        return out.requires_grad
    node: Any = out.grad_fn
    for _ in range(3):  # the operator itself, behind a cast or a view
        if node is None or node is x.grad_fn:
            break
        if node.name().endswith("WarnNotImplemented"):
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return True


def call_base(layer: DeltaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base_layer(x)`, for weights of any kind; `x: (..., in_features)`.

    Raises:
        RuntimeError: gradients are wanted, and the base layer passes none on.
    """
    out = layer.base_layer(x, *args, **kwargs)
    if x.requires_grad and torch.is_grad_enabled() and not _leads_back(out, x):
        raise RuntimeError(
            f"The {type(layer.get_base_layer()).__name__} passes no gradient on to its input, so that adapters in "
            "front of it would not train. (On a CPU, bitsandbytes' 4-bit layers are like that once they were "
            "called in eval mode: load the base model again and train before you evaluate.)"
        )
    return out


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

    def check_mergeable(self, adapter: str) -> None:
        if not any(self.matrices(adapter)):
            return
        base = self.get_base_layer()
        if float_weight(self.base_layer) is None:
            raise ValueError(cannot_merge_into(base))
        if is_computed(base, "weight"):
            raise ValueError(
                f"The weight of a {type(base).__name__} is computed from other parameters (weight norm, a "
                "parametrization), so that nothing can be merged into it. Remove that from the base model before you "
                "adapt it, or keep the adapter unmerged."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's conversion keeps weight updates alone."""
        if self.has_adapter(adapter_name) and self.bias_delta(adapter_name) is None:
            return True
        return super().supports_lora_conversion(adapter_name)
