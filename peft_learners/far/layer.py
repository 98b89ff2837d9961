"""FAR layers: a linear layer, an embedding or another module, plus per-adapter deltas on its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..allocation import kept_count
from ..boundary import Resized, resize
from ..discovery import base_of, float_weight, is_norm
from ..feed_forward import sizes
from ..functional import effective_linear, norm_with, separate_linear, sum_of
from ..layer import DeltaLayer, parameter_at
from ..sparse import cut_linear, others_of, uncut, wants_summed_weight
from .config import PARTS, FARConfig
from .plan import Home, Nodes

#: Standard deviation of every delta under `init_weights=False`.
TEST_STD = 0.05
_BATCHLESS = (
    "A mixed batch can't give each row its own {}: the model computes them once for the whole batch. Call the model "
    "once per adapter, or leave them out when training (T5: FARConfig(exclude_modules=['relative_attention_bias']))."
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FARLayer(DeltaLayer):
    """Common to FAR layers: creation of parameters, and deltas that several layers share.

    Where base modules share a parameter, the first of their layers holds its delta, and the others refer to it.
    """

    adapter_layer_names = PARTS
    other_param_names = ("far_kept", "far_rest", "far_bias_rest", "far_nodes", "far_source", "far_names")

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

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.far_names

    def update_layer(self, adapter: str, config: FARConfig, home: Home, owners: dict[int, FARLayer]) -> None:
        """Create the parameters of a new adapter.

        Args:
            home: what of the module is trained.
            owners: layers that hold the delta of a base parameter, by the parameter's id; completed here.
        """
        base = base_of(self)
        self.far_names[adapter], self.far_source[adapter] = dict(home.parameters), {}
        if home.nodes is not None and "far_delta" in home.parameters:
            self.far_nodes[adapter] = home.nodes
        for part, names in home.parameters.items():
            holders = [owners.setdefault(id(parameter_at(base, name)), self) for name in names]
            if all(holder is self for holder in holders):
                self._create(part, adapter, config)
            elif len(names) == 1 == len(holders[0].far_names[adapter].get(part, ())):
                self.far_source[adapter][part] = holders[0]
            else:
                raise ValueError(
                    f"A {type(base).__name__} shares some of its parameters ({', '.join(names)}) with another module. "
                    "FAR can't give it deltas: leave it out with exclude_modules."
                )
        if config.reconfigured and adapter in self.far_nodes and "far_delta" not in self.far_source[adapter]:
            kept = torch.arange(self.kept_rows(adapter, config))
            if not config.init_weights:
                count, total = len(kept), self._length(adapter)
                kept = torch.randperm(total)[:count].sort().values
            resize(self.cut(adapter, kept, config.discard_unkept))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create(self, part: str, adapter: str, config: FARConfig) -> None:
        value = torch.zeros(self._shape(part, adapter))
        if not config.init_weights:
            nn.init.normal_(value, std=TEST_STD)
        getattr(self, part)[adapter] = nn.Parameter(value)

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
        nodes = self.far_nodes.get(adapter)
        if adapter not in self.far_kept or nodes is None or (part != "far_delta" and nodes.axis == 1):
            return value
        rests = self.far_rest if part == "far_delta" else self.far_bias_rest
        rest = rests[adapter] if adapter in rests else None
        axis = nodes.axis if part == "far_delta" else 0
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
        base: Any = self.get_base_layer()
        value = getattr(base, name)
        if value is None or self.disable_adapters or self.merged:
            return value
        for adapter in self.active_adapters:
            for part, names in self.far_names.get(adapter, {}).items():
                if name in names:
                    delta = self.full_delta(part, adapter)
                    assert delta is not None
                    value = value + self._by_parameter(part, adapter, delta)[name]
        return value.to(getattr(base, name).dtype)

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        deltas: dict[str, Tensor] = {}
        for part in self.far_names[adapter]:
            if part not in self.far_source[adapter]:  # merged where it is held
                value = self.full_delta(part, adapter)
                assert value is not None
                deltas.update(self._by_parameter(part, adapter, value.detach()))
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

    def is_cut(self, adapter: str) -> bool:
        return adapter in self.far_kept

    def movement(self, adapter: str, power: int) -> Tensor:
        """`sum |D|^power` over each node's weights: (width,), summed in float64."""
        nodes = self.far_nodes[adapter]
        delta = self.far_delta[adapter].detach()
        score = delta.abs().pow(power).sum(1 - nodes.axis, dtype=torch.float64)
        return score.view(nodes.copies, nodes.width).sum(0)

    def cut(self, adapter: str, kept: Tensor, discard: bool) -> list[Resized]:
        """Keep `kept` of the rows or columns as trained values, and freeze or drop the others.

        Args:
            kept: ascending indices, (k,) int64.
            discard: whether the others' deltas are dropped.

        Returns:
            The parameters that are to be resized (by `boundary.resize`), with their new values.
        """
        nodes, resized = self.far_nodes[adapter], []
        delta = self.far_delta[adapter]
        other = others_of(kept.cpu(), self._length(adapter)).to(delta.device)
        kept = kept.to(delta.device)
        parts = [("far_delta", self.far_rest, nodes.axis)]
        if nodes.axis == 0 and adapter in self.far_bias_delta:
            parts.append(("far_bias_delta", self.far_bias_rest, 0))
        for part, rests, axis in parts:
            parameter = getattr(self, part)[adapter]
            value = parameter.detach()
            if not discard:
                rests[adapter] = value.index_select(axis, other)
            resized.append(Resized(parameter, value.index_select(axis, kept), _selector(axis, kept)))
        self.far_kept[adapter] = kept
        return resized

    def undo_cut(self, adapter: str) -> list[Resized]:
        """The opposite of `cut`: all rows and columns train again, from where they are. Returns what `cut` does."""
        resized = []
        for part in ("far_delta", "far_bias_delta"):
            if adapter in getattr(self, part):
                parameter, full = getattr(self, part)[adapter], self._own_full_delta(part, adapter).detach()
                if full.shape != parameter.shape:
                    resized.append(Resized(parameter, full, None))
        for buffers in (self.far_kept, self.far_rest, self.far_bias_rest):
            if adapter in buffers:
                del buffers[adapter]
        return resized

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # Under low_cpu_mem_usage the buffers have no data yet, which PEFT expects of parameters only.
        buffers = [b for b in (self.far_kept, self.far_rest, self.far_bias_rest) if adapter_name in b]
        without_data = [(b, b.pop(adapter_name)) for b in buffers if b[adapter_name].is_meta]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for buffer, value in without_data:
            buffer[adapter_name] = value

    def form(self, adapter: str) -> Callable[[], list[Resized]]:
        """A way back to the form (cut or not) and the values that the adapter has now. Copies nothing."""
        parameters = [(p, p.data) for p in (c[adapter] for c in (self.far_delta, self.far_bias_delta) if adapter in c)]
        all_buffers = (self.far_kept, self.far_rest, self.far_bias_rest)
        buffers = [(b, b[adapter] if adapter in b else None) for b in all_buffers]

        def restore() -> list[Resized]:
            for buffer, value in buffers:
                if value is not None:
                    buffer[adapter] = value
                elif adapter in buffer:
                    del buffer[adapter]
            return [Resized(parameter, value, None) for parameter, value in parameters]

        return restore

    def __repr__(self) -> str:
        return "far." + super().__repr__()


def _selector(axis: int, kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value.index_select(axis, kept.to(value.device))


class FARLinear(FARLayer):
    """`y = x (W + D)^T + b + db`; `x: (..., in_features)`, `D: (out_features, in_features)`, `db: (out_features,)`.

    Once nodes are selected, a layer of an FFN trains `D[kept]` and `db[kept]` (axis 0) or `D[:, kept]` and all of db
    (axis 1); the rest of D and db is frozen, or gone. See `peft_learners.sparse` for the arithmetic.

    Source: arXiv 2205.01541.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features: Any
        self.out_features: Any
        self.in_features, self.out_features = sizes(base_layer)
        # transformers' Conv1D stores its weight as (in_features, out_features)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def _shape(self, part: str, adapter: str) -> tuple[int, ...]:
        return (self.out_features, self.in_features) if part == "far_delta" else (self.out_features,)

    def _by_parameter(self, part: str, adapter: str, value: Tensor) -> dict[str, Tensor]:
        if part == "far_delta" and self.fan_in_fan_out:
            value = value.t()
        return super()._by_parameter(part, adapter, value)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """D in the layout of the base layer's weight, without gradients."""
        delta = self.full_delta("far_delta", adapter)
        if delta is None:
            delta = torch.zeros(
                self.out_features, self.in_features, dtype=self.weight.dtype, device=self.weight.device
            )
        return delta.detach().t() if self.fan_in_fan_out else delta.detach()

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        weight = self._readable_weight()
        if weight is None or args or kwargs:
            return self._forward_plain(x, adapters, *args, **kwargs)
        summed = wants_summed_weight(x.numel() // max(1, self.in_features))
        if summed and not weight.requires_grad and self._takes_cut(adapters):
            return self._forward_cut(x, weight, base.bias, adapters[0])
        dense, biases = self._full_deltas("far_delta", adapters), self._full_deltas("far_bias_delta", adapters)
        if not summed and any(delta.dtype != weight.dtype for delta in dense):
            return self._forward_plain(x, adapters)
        path = effective_linear if summed else separate_linear
        return path(x, weight, sum_of(base.bias, biases), (), [(delta, 1.0) for delta in dense])

    def _full_deltas(self, part: str, adapters: list[str]) -> list[Tensor]:
        found = (self.full_delta(part, name) for name in adapters)
        return [delta for delta in found if delta is not None]

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

    def _readable_weight(self) -> Tensor | None:
        """The weight as (out_features, in_features) if it can be added to; None sends the call down the plain path."""
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None
        if hasattr(base, "_hf_hook") or base._forward_hooks or base._forward_pre_hooks or float_weight(base) is None:
            return None
        weight: Any = base.weight
        return weight.t() if self.fan_in_fan_out else weight

    def _forward_plain(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The same sum through `base_layer(x)`: for weights that are hooked, wrapped, or of another type."""
        out = self.base_layer(x, *args, **kwargs)
        dtype = out.dtype
        for name in adapters:
            delta, bias = self.full_delta("far_delta", name), self.full_delta("far_bias_delta", name)
            if delta is not None:
                out = out + F.linear(self._cast_input_dtype(x, delta.dtype), delta)
            if bias is not None:
                out = out + bias
        return out.to(dtype)


class _Transparent(FARLayer):
    """A layer whose base's public attributes can be read through it (`padding_idx`, ViT's patch embeddings)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)


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
            raise ValueError(_BATCHLESS.format("relative positions"))
        if not (x.dim() > 1 and len(x) == 1):
            super()._check_mixed(x, adapter_names)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() > 1 and len(x) == 1:  # positions, the same for all rows
            x = x.expand(len(adapter_names), *x.shape[1:])
        return super()._forward_mixed(x, adapter_names, *args, **kwargs)


class FARModule(_Transparent):
    """Any module at its parameters plus their deltas: norms, convolutions, embeddings of other kinds, composites.

    A container holds one delta for all parameters of its kind: in the shape of the one, or flat for several,
    (sum of their sizes,).
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        first = next(p for p in base_of(base_layer).parameters())
        self.in_features, self.out_features = int(first[0].numel()), int(first.shape[0])
        self.is_norm = is_norm(base_layer)

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
            raise ValueError(_BATCHLESS.format(type(self.get_base_layer()).__name__))
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        values = self._values_with([name for name in active if self.has_adapter(name)])
        return torch.func.functional_call(self.base_layer, values, ())

    def _values_with(self, adapters: list[str]) -> dict[str, Tensor]:
        """Values of the base module's trained parameters with these adapters added."""
        base = self.get_base_layer()
        values: dict[str, Tensor] = {}
        for adapter in adapters:
            for part in self.far_names[adapter]:
                delta = self.full_delta(part, adapter)
                assert delta is not None
                for name, piece in self._by_parameter(part, adapter, delta).items():
                    values[name] = (values[name] if name in values else parameter_at(base, name)) + piece
        return values

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        values = self._values_with(adapters)
        if self.is_norm:
            bias = values.get("bias", getattr(base, "bias", None))
            return norm_with(base, x, values.get("weight", base.weight), bias, *args, **kwargs)
        cast = {name: value.to(parameter_at(base, name).dtype) for name, value in values.items()}
        if type(base) in _CONVOLUTIONS:  # as under FSDP functional_call reads the original parameters
            return base._conv_forward(x, cast.get("weight", base.weight), cast.get("bias", base.bias))
        return torch.func.functional_call(self.base_layer, cast, (x, *args), kwargs)
