"""A linear layer with low-rank and dense updates and a bias delta: forward, merging, deltas.

Learners, FAR and NAS-LoRA share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops.delta_linear import linear_with_updates, wants_summed_weight
from ..ops.terms import Dense, LowRank, Pair, autocasts, dense_factor, effective_weight, sum_of
from ..structure.weights import float_weight, is_computed, readable_weight, sizes
from .base import DeltaLayer, cannot_merge_into


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


class DeltaLinear(DeltaLayer):
    """A linear layer plus updates: `y = x (W + s B A + c D)^T + b + db`, summed over the active adapters.

    Shapes: `x: (..., in_features)`, `A: (r, in_features)`, `B: (out_features, r)`, `D: (out_features, in_features)`,
    `db: (out_features,)`. A subclass gives those of the terms that its method has.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features: Any
        self.out_features: Any
        self.in_features, self.out_features = sizes(base_layer)
        # transformers' Conv1D stores its weight as (in_features, out_features)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    # -- for the subclass -------------------------------------------------------------------------------------------

    def low_rank(self, adapter: str) -> Pair | None:
        """`(A, B, s)`, differentiable; factors of which little is left may be given by their entries."""
        return None

    def dense(self, adapter: str) -> Dense | None:
        """`(D, c)`, differentiable."""
        return None

    def bias_delta(self, adapter: str) -> Tensor | None:
        """db, differentiable."""
        return None

    def dropout(self, adapter: str) -> float:
        """Probability with which entries of the low-rank term's input are dropped now."""
        return 0.0

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        # No walrus in here: torch.compile can't follow one in a comprehension.
        pairs = [(self.low_rank(name), self.dropout(name)) for name in adapters]
        low_rank = [(pair, dropout) for pair, dropout in pairs if pair is not None]
        dense = [update for update in map(self.dense, adapters) if update is not None]
        deltas = [delta for delta in map(self.bias_delta, adapters) if delta is not None]
        weight = readable_weight(self.base_layer)
        if weight is None or args or kwargs or x.is_nested or not self._may_mix(x, weight, low_rank, dense):
            return self._forward_plain(x, low_rank, dense, deltas, *args, **kwargs)
        if not (low_rank or dense or deltas):
            return self.base_layer(x, *args, **kwargs)
        bias = sum_of(getattr(self.get_base_layer(), "bias", None), deltas)
        if len(low_rank) == 1:
            pair, dropout = low_rank[0]
            return linear_with_updates(x, weight, bias, [pair], dense, dropout)
        kept = [pair for pair, dropout in low_rank if not dropout]
        if kept or dense or (bias is not None and bias.dtype != weight.dtype):
            out = linear_with_updates(x, weight, bias, kept, dense)
        else:
            out = F.linear(x, weight, bias)
        for pair, dropout in low_rank:
            if dropout:
                out = (out + self._term(x, pair, dropout)).to(out.dtype)
        return out

    def _may_mix(self, x: Tensor, weight: Tensor, low_rank: list[tuple[Pair, float]], dense: list[Dense]) -> bool:
        """Whether the updates are of the weight's type, or x may be cast to theirs."""
        parts = [part for (a, b, _), _ in low_rank for part in (a, b)] + [delta for delta, _ in dense]
        if all(part.dtype == weight.dtype for part in parts):
            return True
        if not low_rank and not wants_summed_weight(x.numel() // max(1, self.in_features)):
            return False  # W + D is not formed: the base layer's own product is as good, and rounds as it does
        return self.cast_input_dtype_enabled or autocasts(x)

    def _term(self, x: Tensor, pair: Pair, dropout: float) -> Tensor:
        """`s (x A^T) B^T`, with dropout on x."""
        a, b, factor = pair
        a, b = dense_factor(a), dense_factor(b)
        return F.linear(F.linear(F.dropout(self._cast_input_dtype(x, a.dtype), dropout), a), b) * factor

    def _forward_plain(
        self,
        x: Tensor,
        low_rank: list[tuple[Pair, float]],
        dense: list[Dense],
        biases: list[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The same sum through `base_layer(x)`: for weights that are quantised, hooked or wrapped."""
        out = call_base(self, x, *args, **kwargs)
        dtype = out.dtype
        for pair, dropout in low_rank:
            out = out + self._term(x, pair, dropout)
        for delta, factor in dense:
            out = out + F.linear(self._cast_input_dtype(x, delta.dtype), delta) * factor
        for bias in biases:
            out = out + bias
        return out.to(dtype)

    # -- deltas and merging -----------------------------------------------------------------------------------------

    def matrices(self, adapter: str) -> tuple[list[LowRank], list[Dense]]:
        """What an adapter adds to the weight, as `(A, B, s)` and `(D, c)`, without gradients."""
        low_rank = [pair for pair in [self.low_rank(adapter)] if pair is not None]
        dense = [update for update in [self.dense(adapter)] if update is not None]
        pairs = [(dense_factor(a).detach(), dense_factor(b).detach(), factor) for a, b, factor in low_rank]
        return pairs, [(delta.detach(), factor) for delta, factor in dense]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`s B A + c D`, in the layout of the layer's weight; zeros where the adapter has neither."""
        low_rank, dense = self.matrices(adapter)
        if not (low_rank or dense):
            weight, bias = float_weight(self.base_layer), self.bias_delta(adapter)
            if weight is not None:
                return torch.zeros_like(weight)
            device = (
                bias.device if bias is not None else self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
            )
            return torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=device)
        dtype, delta = (low_rank[0][0] if low_rank else dense[0][0]).dtype, None
        for a, b, factor in low_rank:
            # On a CPU, half-precision matrix products are slow or missing.
            wide = a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16)
            delta = (b.float() @ a.float() if wide else b @ a) * factor
        for matrix, factor in dense:
            delta = matrix * factor if delta is None else torch.add(delta, matrix, alpha=factor)
        assert delta is not None
        delta = delta.to(dtype)
        return delta.t() if self.fan_in_fan_out else delta

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        low_rank, dense = self.matrices(adapter)
        deltas = {"weight": self.get_delta_weight(adapter)} if low_rank or dense else {}
        bias = self.bias_delta(adapter)
        return deltas if bias is None else {**deltas, "bias": bias.detach()}

    def merged_values(self, adapter: str) -> dict[str, Tensor]:
        base: Any = self.get_base_layer()
        low_rank, dense = self.matrices(adapter)
        matrices = [a for a, _, _ in low_rank] + [delta for delta, _ in dense]
        if not low_rank or any(matrix.dtype != base.weight.dtype for matrix in matrices):
            return super().merged_values(adapter)
        # Summed in the order of the forward pass, so that the merged layer rounds as the unmerged one does.
        weight = base.weight.detach().t() if self.fan_in_fan_out else base.weight.detach()
        full = effective_weight(weight, low_rank, dense)
        values = {"weight": full.t().contiguous() if self.fan_in_fan_out else full}
        bias = self.bias_delta(adapter)
        if bias is not None:
            values["bias"] = self.sum_with(base, "bias", bias.detach(), 1)
        return values

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
