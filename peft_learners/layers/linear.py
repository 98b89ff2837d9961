"""What the linear layers of all tuners share: sizes, layout, and what an adapter adds to weight and bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import Dense, LowRank, Pair, autocasts, dense_factor, effective_weight, linear_with_updates, sum_of
from ..structure.weights import float_weight, is_computed, readable_weight, sizes
from .base import DeltaLayer, cannot_merge_into


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


def _dense_pair(pair: Pair) -> LowRank:
    a, b, factor = pair
    return dense_factor(a), dense_factor(b), factor


class LowRankLinear(DeltaLinear):
    """`y = x (W + s B A + c D)^T + b + db`, summed over the active adapters; any of the terms may be missing.

    Shapes: `x: (..., in_features)`, `A: (r, in_features)`, `B: (out_features, r)`, `D: (out_features, in_features)`,
    `db: (out_features,)`. A subclass says where they come from.
    """

    # -- for the subclass -------------------------------------------------------------------------------------------

    def low_rank(self, adapter: str) -> LowRank | None:
        """`(A, B, s)`, differentiable."""
        raise NotImplementedError

    def factors(self, adapter: str) -> Pair | None:
        """The same for the forward pass, where factors of which little is left may be given by their entries."""
        return self.low_rank(adapter)

    def bias_with(self, bias: Tensor | None, adapter: str) -> Tensor | None:
        """A bias (or None) with db added."""
        delta = self.bias_delta(adapter)
        return bias if delta is None else sum_of(bias, [delta])

    def dense(self, adapter: str) -> Dense | None:
        """`(D, c)`, differentiable."""
        return None

    def dropout(self, adapter: str) -> float:
        """Probability with which entries of the low-rank terms' input are dropped now."""
        return 0.0

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        pairs, dense = self._updates(adapters)
        weight = readable_weight(self.base_layer)
        if weight is None or args or kwargs or x.is_nested or not self._may_mix(x, weight, pairs, dense):
            return self._forward_plain(x, adapters, pairs, dense, *args, **kwargs)
        own = getattr(self.get_base_layer(), "bias", None)
        total = own
        for name in adapters:
            total = self.bias_with(total, name)
        if not (pairs or dense) and total is own:
            return self.base_layer(x, *args, **kwargs)
        dropped = [name for name in pairs if self.dropout(name)]
        if len(dropped) == 1 == len(pairs):
            return linear_with_updates(
                x, weight, total, [*pairs.values()], [*dense.values()], self.dropout(dropped[0])
            )
        kept = [pair for name, pair in pairs.items() if name not in dropped]
        if kept or dense or (total is not None and total.dtype != weight.dtype):
            out = linear_with_updates(x, weight, total, kept, [*dense.values()])
        else:
            out = F.linear(x, weight, total)
        for name in dropped:
            a, b, factor = _dense_pair(pairs[name])
            cast = F.dropout(self._cast_input_dtype(x, a.dtype), self.dropout(name))
            out = (out + F.linear(F.linear(cast, a), b) * factor).to(out.dtype)
        return out

    def _may_mix(self, x: Tensor, weight: Tensor, pairs: dict[str, Pair], dense: dict[str, Dense]) -> bool:
        """Whether the updates are of the weight's type, or x may be cast to theirs."""
        if self.cast_input_dtype_enabled or autocasts(x):
            return True
        parts = [part for a, b, _ in pairs.values() for part in (a, b)] + [delta for delta, _ in dense.values()]
        return all(part.dtype == weight.dtype for part in parts)

    def _updates(self, adapters: list[str]) -> tuple[dict[str, Pair], dict[str, Dense]]:
        pairs: dict[str, Pair] = {}
        dense: dict[str, Dense] = {}
        for name in adapters:
            pair, delta = self.factors(name), self.dense(name)
            if pair is not None:
                pairs[name] = pair
            if delta is not None:
                dense[name] = delta
        return pairs, dense

    def _forward_plain(
        self,
        x: Tensor,
        adapters: list[str],
        pairs: dict[str, Pair],
        dense: dict[str, Dense],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The same sum through `base_layer(x)`: for weights that are quantised, hooked or wrapped."""
        out = call_base(self, x, *args, **kwargs)
        dtype = out.dtype
        for name, pair in pairs.items():
            a, b, factor = _dense_pair(pair)
            cast = F.dropout(self._cast_input_dtype(x, a.dtype), self.dropout(name))
            out = out + F.linear(F.linear(cast, a), b) * factor
        for delta, factor in dense.values():
            out = out + F.linear(self._cast_input_dtype(x, delta.dtype), delta) * factor
        for name in adapters:
            bias = self.bias_delta(name)
            out = out if bias is None else out + bias
        return out.to(dtype)

    # -- deltas and merging -----------------------------------------------------------------------------------------

    def matrices(self, adapter: str) -> tuple[list[LowRank], list[Dense]]:
        low_rank, dense = self.low_rank(adapter), self.dense(adapter)
        return (
            [(low_rank[0].detach(), low_rank[1].detach(), low_rank[2])] if low_rank is not None else [],
            [(dense[0].detach(), dense[1])] if dense is not None else [],
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`s B A + c D`, in the layout of the layer's weight; zeros where the adapter has neither."""
        low_rank, dense = self.matrices(adapter)
        if not (low_rank or dense):
            weight, bias = float_weight(self.base_layer), self.bias_delta(adapter)
            if weight is not None:
                return torch.zeros_like(weight)
            return torch.zeros(self.out_features, self.in_features, device=bias.device if bias is not None else None)
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

    def merged_values(self, adapter: str) -> dict[str, Tensor]:
        base: Any = self.get_base_layer()
        low_rank, dense = self.matrices(adapter)
        if any(m.dtype != base.weight.dtype for m in [a for a, _, _ in low_rank] + [delta for delta, _ in dense]):
            return super().merged_values(adapter)
        values: dict[str, Tensor] = {}
        if low_rank or dense:
            # Summed in the order of the forward pass, so that the merged layer rounds as the unmerged one does.
            weight = base.weight.detach().t() if self.fan_in_fan_out else base.weight.detach()
            full = effective_weight(weight, low_rank, dense)
            values["weight"] = full.t().contiguous() if self.fan_in_fan_out else full
        bias = self.bias_delta(adapter)
        if bias is not None:
            values["bias"] = self.sum_with(base, "bias", bias.detach(), 1)
        return values

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        low_rank, dense = self.matrices(adapter)
        deltas = {"weight": self.get_delta_weight(adapter)} if low_rank or dense else {}
        bias = self.bias_delta(adapter)
        return deltas if bias is None else {**deltas, "bias": bias.detach()}
