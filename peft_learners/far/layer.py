"""FAR layers: a linear layer, an embedding or another module, plus per-adapter deltas on its parameters."""

from __future__ import annotations

import inspect
from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.base import TransparentLayer, parameter_at
from ..layers.linear import DeltaLinear
from ..layers.module import DeltaModule
from ..ops.cut import cut_linear
from ..ops.norm import call_with
from ..ops.terms import Dense
from ..structure.weights import base_of, readable_weight
from .base import BATCHLESS, FARLayer


class FARLinear(FARLayer, DeltaLinear):
    """`y = x (W + D)^T + b + db`; `x: (..., in_features)`, `D: (out_features, in_features)`, `db: (out_features,)`.

    Once nodes are selected, a layer of an FFN trains `D[kept]` and `db[kept]` (axis 0) or `D[:, kept]` and all of db
    (axis 1); the rest of D and db is frozen, or gone. See `peft_learners.ops.cut` for the arithmetic.

    Source: arXiv 2205.01541.
    """

    def _shape(self, part: str, adapter: str) -> tuple[int, ...]:
        return (self.out_features, self.in_features) if part == "far_delta" else (self.out_features,)

    def _by_parameter(self, part: str, adapter: str, value: Tensor) -> dict[str, Tensor]:
        if part == "far_delta" and self.fan_in_fan_out:
            value = value.t()
        return super()._by_parameter(part, adapter, value)

    def dense(self, adapter: str) -> Dense | None:
        delta = self.full_delta("far_delta", adapter)
        return None if delta is None else (delta, 1.0)

    def bias_delta(self, adapter: str) -> Tensor | None:
        return self.full_delta("far_bias_delta", adapter)

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        weight = readable_weight(self.base_layer)
        if weight is not None and not (args or kwargs or x.is_nested) and self._takes_cut(adapters):
            if not weight.requires_grad and (base.bias is None or not base.bias.requires_grad):
                return self._forward_cut(x, weight, base.bias, adapters[0])
        return super().forward_with(x, adapters, *args, **kwargs)

    def _takes_cut(self, adapters: list[str]) -> bool:
        name = adapters[0]
        return (
            len(adapters) == 1
            and "far_delta" in self.far_names[name]
            and self.holder("far_delta", name).is_cut(name)
            and "far_bias_delta" not in self.far_source[name]
        )

    def _forward_cut(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: str) -> Tensor:
        holder = self.holder("far_delta", adapter)
        axis = holder.far_nodes[adapter].axis
        rest = holder.far_rest[adapter] if adapter in holder.far_rest else None
        bias_values = self.far_bias_delta[adapter] if adapter in self.far_bias_delta else None
        bias_rest = self.far_bias_rest[adapter] if adapter in self.far_bias_rest else None
        values, kept = holder.far_delta[adapter], holder.far_kept[adapter]
        return cut_linear(x, weight, bias, values, rest, bias_values, bias_rest, kept, axis)


class _Transparent(FARLayer, TransparentLayer):
    """A FAR layer that others look into: they see parameters as they are with the deltas."""

    def _read_through(self, name: str) -> Any:
        if name == "_qkv_same_embed_dim" and isinstance(self.get_base_layer(), nn.MultiheadAttention):
            return False  # keeps torch's encoder layer from its fast path, which reads weights without calling
        adapted = self.__dict__.get("far_names", {})  # not there yet while a copy is made
        if not name.startswith("_") and any(name in names for parts in adapted.values() for names in parts.values()):
            return self._effective(name)
        return super()._read_through(name)


class FAREmbedding(_Transparent):
    """`W[x] + D[x]`; `x: (...)` whole numbers, `W, D: (num_embeddings, embedding_dim)`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        base: Any = self.get_base_layer()
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim
        #: Whether the first dimension of x is no batch (relative positions), so that it can't be split.
        self.batchless = False

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        out = self.base_layer(x, *args, **kwargs)
        dtype = out.dtype
        for name in adapters:
            delta = self.full_delta("far_delta", name)
            if delta is not None:
                options = (base.padding_idx, None, 2.0, base.scale_grad_by_freq, base.sparse)
                out = out + F.embedding(x, delta, *options)
        return out.to(dtype)

    def _check_mixed(self, x: Tensor, adapter_names: list[str]) -> None:
        if self.batchless:
            raise ValueError(BATCHLESS.format("relative positions"))
        if not (x.dim() > 1 and len(x) == 1):
            super()._check_mixed(x, adapter_names)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() > 1 and len(x) == 1:  # positions, the same for all rows
            x = x.expand(len(adapter_names), *x.shape[1:])
        return super()._forward_mixed(x, adapter_names, *args, **kwargs)


class FARModule(_Transparent, DeltaModule):
    """Any module at its parameters plus their deltas: norms, convolutions, embeddings of other kinds, composites.

    A container holds one delta for all parameters of its kind: in the shape of the one, or flat for several,
    (sum of their sizes,).
    """

    def _shape(self, part: str, adapter: str) -> tuple[int, ...]:
        base, names = base_of(self), self.far_names[adapter][part]
        if len(names) == 1:
            return super()._shape(part, adapter)
        return (sum(parameter_at(base, name).numel() for name in names),)

    def _by_parameter(self, part: str, adapter: str, value: Tensor) -> dict[str, Tensor]:
        base, names = base_of(self), self.far_names[adapter][part]
        if len(names) == 1:
            return super()._by_parameter(part, adapter, value)
        shapes = [parameter_at(base, name).shape for name in names]
        pieces = value.reshape(-1).split([shape.numel() for shape in shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    def forward(self, *args: Any, adapter_names: Optional[list[str]] = None, **kwargs: Any) -> Any:
        if not args and not kwargs:  # Swin's relative positions
            return self._forward_without_input(adapter_names)
        if not args:  # composites may be called by keywords only
            bound = inspect.signature(self.get_base_layer().forward).bind(**kwargs)
            args, kwargs = bound.args, bound.kwargs
        return super().forward(*args, adapter_names=adapter_names, **kwargs)

    def _forward_without_input(self, adapter_names: Optional[list[str]]) -> Any:
        if adapter_names is not None:
            raise ValueError(BATCHLESS.format(type(self.get_base_layer()).__name__))
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        values = self.values_with([name for name in active if self.has_adapter(name)])
        return call_with(self.base_layer, values)
