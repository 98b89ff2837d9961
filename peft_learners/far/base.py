"""What all FAR layers share: creation of parameters, deltas that several layers share, cutting and its undoing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.base import DeltaLayer, parameter_at
from ..ops.cut import others_of, uncut
from ..phases.optimizer import resize
from ..structure.weights import base_of, for_float64
from .config import PARTS, FARConfig
from .plan import Nodes, Target
from .selection import kept_count

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
        self.far_delta = nn.ParameterDict({})
        self.far_layernorm_delta = nn.ParameterDict({})
        self.far_bias_delta = nn.ParameterDict({})
        self.far_kept = BufferDict(persistent=True)
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
            length = self._length(adapter)
            rows = torch.arange(length) if config.init_weights else torch.randperm(length)
            self.cut(adapter, rows[: self.kept_rows(adapter, config)].sort().values, config.discard_unkept)

    def _shape(self, part: str, adapter: str) -> tuple[int, ...]:
        """Shape of the delta in a container."""
        return tuple(parameter_at(base_of(self), self.far_names[adapter][part][0]).shape)

    def holder(self, part: str, adapter: str) -> FARLayer:
        """The layer that holds the delta: this one, or the one it shares the parameter with."""
        return self.far_source[adapter].get(part, self)

    def full_delta(self, part: str, adapter: str) -> Tensor | None:
        """The delta in a container in full, differentiable; None if this parameter is not trained."""
        if part not in self.far_names[adapter]:
            return None
        return self.holder(part, adapter)._own_full_delta(part, adapter)

    def _own_full_delta(self, part: str, adapter: str) -> Tensor:
        value: Tensor = getattr(self, part)[adapter]
        parts = self._node_parts(adapter) if self.is_cut(adapter) else {}
        if part not in parts:
            return value
        rests, axis = getattr(self, parts[part][0]), parts[part][1]
        rest = rests[adapter] if adapter in rests else None
        return uncut(value, rest, self.far_kept[adapter], self._length(adapter), axis)

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

    def _length(self, adapter: str) -> int:
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

    def movement(self, adapter: str, power: int) -> Tensor:
        """`sum |D|^power` over each node's weights: (width,), summed in float64."""
        nodes = self.far_nodes[adapter]
        delta = for_float64(self.far_delta[adapter].detach())
        score = delta.abs().pow(power).sum(1 - nodes.axis, dtype=torch.float64)
        return score.view(nodes.copies, nodes.width).sum(0)

    def cut(self, adapter: str, kept: Tensor, discard: bool, optimizer: Optimizer | None = None) -> None:
        """Keep `kept` of the rows or columns as trained values, and freeze or drop the others.

        The parameters shrink in place.

        Args:
            kept: ascending indices, (k,) int64.
            discard: whether the others' deltas are dropped.
            optimizer: whose state for the parameters shrinks with them.
        """
        device = self.far_delta[adapter].device
        other = others_of(kept.cpu(), self._length(adapter)).to(device)
        kept = kept.to(device)
        for part, (rest, axis) in self._node_parts(adapter).items():
            parameter = getattr(self, part)[adapter]
            value = parameter.detach()
            if not discard:
                getattr(self, rest)[adapter] = value.index_select(axis, other)
            resize(parameter, value.index_select(axis, kept), optimizer, _selector(axis, kept))
        self.far_kept[adapter] = kept

    def undo_cut(self, adapter: str, optimizer: Optimizer | None = None) -> None:
        """The opposite of `cut`: all rows and columns train again, from where they are."""
        for part in self._node_parts(adapter):
            parameter, full = getattr(self, part)[adapter], self._own_full_delta(part, adapter).detach()
            if full.shape != parameter.shape:
                resize(parameter, full, optimizer)
        for buffers in (self.far_kept, self.far_rest, self.far_bias_rest):
            if adapter in buffers:
                del buffers[adapter]

    def shapes(self, adapter: str, config: FARConfig, cut: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the values of this layer that the cut concerns, before it or after it."""
        kept, length = self.kept_rows(adapter, config), self._length(adapter)
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
