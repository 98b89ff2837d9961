"""FAR layers: a linear layer, an embedding or another module, plus per-adapter deltas on its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.base import DeltaLayer, TransparentLayer, parameter_at
from ..layers.indices import IndexBuffers
from ..layers.linear import DeltaLinear
from ..layers.module import DeltaModule
from ..ops.cut import cut_linear, others_of, uncut
from ..ops.norm import call_with
from ..ops.terms import Dense
from ..structure.weights import base_of, readable_weight, shape_of
from .config import PARTS, FARConfig
from .plan import Nodes, Target
from .selection import drawn, kept_count

BATCHLESS = (
    "A mixed batch can't give each row its own {}: the model computes them once for the whole batch. Call the model "
    "once per adapter, or leave them out when training (T5: FARConfig(exclude_modules=['relative_attention_bias']))."
)


class FARLayer(DeltaLayer):
    """Common to FAR layers: creation of parameters, and deltas that several layers share.

    Where base modules share a parameter, the first of their layers holds its delta, and the others refer to it.
    """

    adapter_layer_names = PARTS
    other_param_names = (
        "far_kept",
        "far_rest",
        "far_bias_rest",
        "far_nodes",
        "far_names",
        "far_source",
        "far_sharers",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.far_delta = nn.ModuleDict()
        self.far_layernorm_delta = nn.ModuleDict()
        self.far_bias_delta = nn.ModuleDict()
        self.far_kept = IndexBuffers(self.length)
        self.far_rest = BufferDict(persistent=True)
        self.far_bias_rest = BufferDict(persistent=True)
        self.far_nodes: dict[str, Nodes] = {}
        self.far_names: dict[str, dict[str, tuple[str, ...]]] = {}
        # Kept in a dict, a layer is no submodule of another one.
        self.far_source: dict[str, dict[str, FARLayer]] = {}
        self.far_sharers: dict[str, list[FARLayer]] = {}
        self._is_called = False

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.far_names

    def update_layer(self, adapter: str, config: FARConfig, target: Target, owners: dict[int, FARLayer]) -> None:
        """Create the parameters of a new adapter.

        Args:
            target: what of the module is trained.
            owners: layers that hold the delta of a base parameter, by the parameter's id; completed here.
        """
        base = base_of(self)
        self.far_names[adapter], self.far_source[adapter] = dict(target.parameters), {}
        if target.nodes is not None and "far_delta" in target.parameters:
            self.far_nodes[adapter] = target.nodes
        for part, names in target.parameters.items():
            holders = [owners.setdefault(id(parameter_at(base, name)), self) for name in names]
            if all(holder is self for holder in holders):
                self.add_parameter(part, adapter, config, *self._shape(part, adapter))
            elif len(names) == 1 == len(holders[0].far_names[adapter].get(part, ())):
                self.far_source[adapter][part] = holders[0]
                holders[0].far_sharers.setdefault(adapter, []).append(self)
            else:
                raise ValueError(
                    f"A {type(base).__name__} shares some of its parameters ({', '.join(names)}) with another module. "
                    "FAR can't give it deltas: leave it out with exclude_modules."
                )
        if config.reconfigured and self.holds_nodes(adapter):
            nodes = self.far_nodes[adapter]
            count = kept_count(config.retention_ratio, nodes.width)
            kept = torch.arange(count, device="cpu")
            if not config.init_weights:  # the same in all layers of a pair, as a selection is
                kept = drawn(nodes.width, count, torch.Generator("cpu").manual_seed(config.seed))
            self.cut(adapter, nodes.rows(kept), config.discard_unkept)

    def _shape(self, part: str, adapter: str) -> tuple[int, ...]:
        """Shape of the delta in a container."""
        return tuple(shape_of(parameter_at(base_of(self), self.far_names[adapter][part][0])))

    def holder(self, part: str, adapter: str) -> FARLayer:
        """The layer that holds the delta: this one, or the one it shares the parameter with."""
        return self.far_source[adapter].get(part, self)

    def full_delta(self, part: str, adapter: str) -> Tensor | None:
        """The delta in a container in full, differentiable; None if this parameter is not trained."""
        if part not in self.far_names[adapter]:
            return None
        return self.holder(part, adapter)._own_full_delta(part, adapter)

    def _own_full_delta(self, part: str, adapter: str) -> Tensor:
        value = self.value(part, adapter)
        parts = self._node_parts(adapter) if self.is_cut(adapter) else {}
        if part not in parts:
            return value
        rests, axis = getattr(self, parts[part][0]), parts[part][1]
        rest = rests[adapter] if adapter in rests else None
        return uncut(value, rest, self.far_kept[adapter], self.length(adapter), axis)

    # Some models read a weight without calling the layer (DeBERTa's relative positions, MobileBERT's LM head,
    # WavLM's attention). They get what the layer computes with.

    @property
    def weight(self) -> Tensor:
        """The base layer's weight plus the active deltas."""
        return self._effective("weight")

    @property
    def bias(self) -> Tensor:
        """The base layer's bias plus the active deltas."""
        return self._effective("bias")

    def _effective(self, name: str) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()  # as forward does, which a layer that is only read never sees
        base: Any = self.get_base_layer()
        value = getattr(base, name)
        # The linear layers of an FFN are called; T5 reads their weights for the type alone, many times.
        if value is None or self.disable_adapters or self.merged or self.far_nodes:
            return value
        active = [adapter for adapter in self.active_adapters if adapter in self.far_names]
        parts = [
            (adapter, part) for adapter in active for part, names in self.far_names[adapter].items() if name in names
        ]
        if self.in_mixed_batch and parts:
            if self._is_called:
                return value  # a look at its type
            raise ValueError(BATCHLESS.format(f"{name} of a {type(base).__name__}, which is read and not called"))
        for adapter, part in parts:
            value = value + self.parameter_deltas(adapter, [part])[name]
        return value.to(getattr(base, name).dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._is_called = True  # unconditionally: a compiled graph that had read it first would be recompiled
        return super().forward(*args, **kwargs)

    def unmerge(self) -> None:
        """Subtract the merged deltas again, here and in the layers that share a parameter with this one."""
        sharing = [other for others in self.far_sharers.values() for other in others]
        sharing += [holder for holders in self.far_source.values() for holder in holders.values()]
        if sharing and not self.merged:
            return  # it was unmerged with one of them
        super().unmerge()
        for other in sharing:
            if other.merged:
                other.unmerge()

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        own = [part for part in self.far_names[adapter] if part not in self.far_source[adapter]]
        return {name: delta.detach() for name, delta in self.parameter_deltas(adapter, own).items()}

    def effective_deltas(self, adapter: str) -> dict[str, Tensor]:
        return {name: delta.detach() for name, delta in self.parameter_deltas(adapter).items()}

    def parameter_deltas(self, adapter: str, parts: Iterable[str] | None = None) -> dict[str, Tensor]:
        """`{name of the module's parameter: its delta}`, differentiable.

        Args:
            parts: containers; None: all, those that lie in layers that share a parameter with this one too.
        """
        deltas: dict[str, Tensor] = {}
        for part in self.far_names[adapter] if parts is None else parts:
            value = self.holder(part, adapter)._own_full_delta(part, adapter)
            deltas.update(self._by_parameter(part, adapter, value))
        return deltas

    def _by_parameter(self, part: str, adapter: str, value: Tensor) -> dict[str, Tensor]:
        """A container's delta as `{name of the module's parameter: its delta}`."""
        return {self.far_names[adapter][part][0]: value}

    # -- nodes ------------------------------------------------------------------------------------------------------

    def length(self, adapter: str) -> int:
        """Number of rows (or columns) that nodes have here."""
        nodes = self.far_nodes[adapter]
        return nodes.width * nodes.copies

    def kept_rows(self, adapter: str, config: FARConfig) -> int:
        """Rows (or columns) that stay trained once nodes are selected."""
        nodes = self.far_nodes[adapter]
        return kept_count(config.retention_ratio, nodes.width) * nodes.copies

    def holds_nodes(self, adapter: str) -> bool:
        """Whether the deltas of FFN nodes lie here (and not in a layer that shares its weight with this one)."""
        return adapter in self.far_nodes and adapter in self.far_delta

    def _node_parts(self, adapter: str) -> dict[str, tuple[str, int]]:
        """`{container that is cut with the nodes: (container of the rest, axis of the nodes)}`."""
        axis = self.far_nodes[adapter].axis
        parts = {"far_delta": ("far_rest", axis)}
        if axis == 0 and adapter in self.far_bias_delta:
            parts["far_bias_delta"] = ("far_bias_rest", 0)
        return parts

    def is_cut(self, adapter: str) -> bool:
        return adapter in self.far_kept

    def cut(self, adapter: str, kept: Tensor, discard: bool, optimizer: Optimizer | None = None) -> None:
        """Keep `kept` of the rows or columns as trained values, and freeze or drop the others.

        The parameters shrink in place.

        Args:
            kept: ascending indices, (k,) int64.
            discard: whether the others' deltas are dropped.
            optimizer: whose state for the parameters shrinks with them.
        """
        device = self.value("far_delta", adapter).device
        other = others_of(kept.cpu(), self.length(adapter)).to(device)
        kept = kept.to(device)
        for part, (rest, axis) in self._node_parts(adapter).items():
            value = self.value(part, adapter).detach()
            if not discard:
                getattr(self, rest)[adapter] = value.index_select(axis, other)
            self.leaf(part, adapter).set(value.index_select(axis, kept), optimizer, _selector(axis, kept))
        self.far_kept[adapter] = kept

    def undo_cut(self, adapter: str, optimizer: Optimizer | None = None) -> None:
        """The opposite of `cut`: all rows and columns train again, from where they are."""
        for part in self._node_parts(adapter):
            full = self._own_full_delta(part, adapter).detach()
            if full.shape != self.value(part, adapter).shape:
                self.leaf(part, adapter).set(full, optimizer)
        for buffers in (self.far_kept, self.far_rest, self.far_bias_rest):
            if adapter in buffers:
                del buffers[adapter]

    def shapes(self, adapter: str, config: FARConfig, cut: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the values of this layer that the cut concerns, before it or after it."""
        kept, length = self.kept_rows(adapter, config), self.length(adapter)
        shapes: dict[str, tuple[int, ...]] = {"far_kept": (kept,)} if cut else {}
        for part, (rest, axis) in self._node_parts(adapter).items():
            full = self._shape(part, adapter)
            shapes[part] = (*full[:axis], kept, *full[axis + 1 :]) if cut else full
            if cut and not config.discard_unkept:
                shapes[rest] = (*full[:axis], length - kept, *full[axis + 1 :])
        return shapes

    def __repr__(self) -> str:
        return "far." + super().__repr__()


def _selector(axis: int, kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value.index_select(axis, kept.to(value.device))


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
        bias_values = self.value("far_bias_delta", adapter) if adapter in self.far_bias_delta else None
        bias_rest = self.far_bias_rest[adapter] if adapter in self.far_bias_rest else None
        values, kept = holder.value("far_delta", adapter), holder.far_kept[adapter]
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
        return (sum(shape_of(parameter_at(base, name)).numel() for name in names),)

    def _by_parameter(self, part: str, adapter: str, value: Tensor) -> dict[str, Tensor]:
        base, names = base_of(self), self.far_names[adapter][part]
        if len(names) == 1:
            return super()._by_parameter(part, adapter, value)
        shapes = [shape_of(parameter_at(base, name)) for name in names]
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
