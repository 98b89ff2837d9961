"""NAS-LoRA layers: a linear layer, or another module with a bias, plus per-adapter updates that can be pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.base import TEST_STD, DeltaLayer
from ..layers.indices import IndexBuffers
from ..layers.linear import DeltaLinear
from ..layers.module import DeltaModule
from ..ops.terms import Entries, Factor, Pair
from ..structure.weights import for_float64
from .config import CONTAINERS, NASLoRAConfig
from .rewind import generator_of

#: Position of what a file has yet to tell.
UNKNOWN = -1


@dataclass(frozen=True)
class Space:
    """The search space of one adapter in one layer.

    Attributes:
        shapes: of its parts in full: "U" (out_features, r), "V" (in_features, r), "bias" (out_features,).
        zeros: parts that begin at zero; the others begin at normal values of standard deviation 1/sqrt(features).
        structured: whether columns of U and V and whole biases are pruned, or single entries.
        seed, name: what the initial values depend on.
    """

    shapes: dict[str, tuple[int, ...]]
    zeros: tuple[str, ...]
    structured: bool
    seed: int
    name: str

    def size(self, part: str) -> int:
        return math.prod(self.shapes[part])

    def index_of(self, part: str) -> str:
        """The part whose positions are those of this one, too: the columns of V go with those of U."""
        return "U" if self.structured and part == "V" else part

    def indexed(self) -> list[str]:
        """Parts that have units and positions of their own."""
        return [part for part in self.shapes if self.index_of(part) == part]

    def whole(self, part: str) -> int:
        """Number of units of a part in full."""
        if not self.structured:
            return self.size(part)
        return 1 if part == "bias" else self.shapes[part][1]

    def cost(self, part: str) -> int:
        """Parameters of one unit of a part."""
        if not self.structured:
            return 1
        return self.size(part) if part == "bias" else self.shapes["U"][0] + self.shapes["V"][0]

    def shape(self, part: str, units: int) -> tuple[int, ...]:
        """Shape of a part's values when `units` of its units are kept."""
        if not self.structured:
            return (units,)
        return (self.size(part) * units,) if part == "bias" else (self.shapes[part][0], units)

    def initial(self, part: str, salt: str = "") -> Tensor:
        """The initial values of a part in full: zero or normal, float32, on the CPU."""
        if part in self.zeros:
            return torch.zeros(self.shapes[part], dtype=torch.float32, device="cpu")
        generator = generator_of(self.seed, f"{self.name}/{part}{salt}")
        value = torch.randn(self.shapes[part], generator=generator, dtype=torch.float32, device="cpu")
        return value * (1 / math.sqrt(self.shapes[part][0]))

    def at(self, value: Tensor, part: str, positions: Tensor) -> Tensor:
        """What of a part in full lies at the positions of its kept units."""
        if not self.structured:
            return flat(value)[positions]
        return value[: len(positions) * len(value)].clone() if part == "bias" else value[:, positions]


def waits_for_file(adapter: str, name: str) -> str:
    """Sentence of an error."""
    return (
        f"The config of the adapter {adapter!r} holds an architecture, but not which entries of {name} it keeps: "
        "those are in the adapter's file. Load that adapter, or take its architecture for a new one: "
        "NASLoRAConfig.from_architecture(folder_or_model)."
    )


def flat(value: Tensor) -> Tensor:
    """A part's entries one column after the other, so that a position means the same whatever the rank is."""
    return value.t().flatten() if value.dim() == 2 else value


class NASLoRALayer(DeltaLayer):
    """Common to NAS-LoRA layers: creation, initial values, scores, pruning.

    A part that is not pruned is there in full. Of a pruned one, the values of the kept units (`Space.shape`) and, as
    a buffer, their ascending positions: flat ones of entries, or those of columns.
    """

    adapter_layer_names = tuple(CONTAINERS.values())
    other_param_names = (
        "nas_lora_U_positions",
        "nas_lora_V_positions",
        "nas_lora_bias_positions",
        "nas_lora_space",
        "nas_lora_active",
        "nas_lora_scores",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for container in CONTAINERS.values():
            setattr(self, container, nn.ModuleDict())
        for part in CONTAINERS:
            setattr(self, f"nas_lora_{part}_positions", IndexBuffers(partial(self._whole, part)))
        self.nas_lora_space: dict[str, Space] = {}
        #: Whether anything of the adapter is kept here; layers without are passed by at no cost.
        self.nas_lora_active: dict[str, bool] = {}
        #: By adapter and part, during a search, of parts that had a gradient; no buffers, which DDP would exchange in
        #: each step.
        self.nas_lora_scores: dict[str, dict[str, Tensor]] = {}
        #: Adapters whose positions a file had yet to tell when they were made.
        self._waiting: set[str] = set()

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.nas_lora_space

    def _whole(self, part: str, adapter: str) -> int:
        return self.nas_lora_space[adapter].whole(part)

    def is_active(self, adapter: str) -> bool:
        return self.nas_lora_active.get(adapter, False)

    def has_values(self, part: str, adapter: str) -> bool:
        """Whether there is anything of a part, be it empty."""
        return self.has_part(CONTAINERS[part], adapter)

    def values(self, part: str, adapter: str) -> Tensor:
        """A part's values, differentiable."""
        return self.value(CONTAINERS[part], adapter)

    def positions(self, part: str) -> BufferDict:
        """The container of the positions of a part's kept units, by adapter."""
        return getattr(self, f"nas_lora_{part}_positions")

    # -- creation ---------------------------------------------------------------------------------------------------

    def update_layer(self, adapter: str, config: NASLoRAConfig, name: str, rank: int, bias: bool) -> None:
        """Create the parameters of a new adapter.

        Args:
            name: the layer's name in the model.
            rank: of the low-rank update in the search space; 0: none.
            bias: whether the layer's bias belongs to the search space.
        """
        space = self.outline(adapter, config, name, rank, bias)
        if config.architecture is None:
            for part in space.shapes:
                self.put(CONTAINERS[part], adapter, space.initial(part))
            self.nas_lora_active[adapter] = True
        else:
            self.set_kept(adapter, self._given_positions(space, config))
        if not config.init_weights:
            for part in space.shapes:
                if self.has_values(part, adapter):
                    nn.init.normal_(self.values(part, adapter), std=TEST_STD)

    def outline(self, adapter: str, config: NASLoRAConfig, name: str, rank: int, bias: bool) -> Space:
        """Lay out the search space of a new adapter; arguments as for `update_layer`."""
        m, n = int(self.out_features), int(self.in_features)  # type: ignore[arg-type]
        shapes: dict[str, tuple[int, ...]] = {"U": (m, rank), "V": (n, rank)} if rank else {}
        if bias:
            shapes["bias"] = (m,)
        zeros = ("U", "bias") if config.init == "lora" else ("bias",)
        space = Space(shapes, zeros, config.granularity == "structured", config.init_seed, name)
        self.nas_lora_space[adapter] = space
        return space

    def restore_initial(self, adapter: str) -> None:
        """Undo the rounding of a fresh adapter's initial values to the type of a base in half precision."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        space = self.nas_lora_space[adapter]
        if dtype not in (torch.bfloat16, torch.float16) or self.is_pruned(adapter):
            return
        for part in space.shapes:
            value = self.values(part, adapter).data
            if value.dtype == torch.float32 and not value.is_meta:
                exact = space.initial(part).to(value.device)
                if torch.equal(value, exact.to(dtype).to(value.dtype)):
                    value.copy_(exact)

    @staticmethod
    def _given_positions(space: Space, config: NASLoRAConfig) -> dict[str, Tensor]:
        """Positions of an architecture: those of the config, random ones for tests, or unknown ones, as many as its
        counts say."""
        given = config.kept_positions.get(space.name)
        counts = (config.architecture or {}).get(space.name, {})
        positions: dict[str, Tensor] = {}
        for part in space.indexed():
            kept, of = counts.get(part, (0, space.size(part)))
            if of != space.size(part):
                raise ValueError(
                    f"The architecture has {of} parameters for {part} of {space.name}, but this model has "
                    f"{space.size(part)} there: it was found on a model of other sizes, or with another rank."
                )
            units = kept * space.whole(part) // of
            if config.init_weights:
                positions[part] = torch.full((units,), UNKNOWN, device="cpu")
            else:
                generator = generator_of(config.init_seed, space.name)
                order = torch.randperm(space.whole(part), generator=generator, device="cpu")
                positions[part] = order[:units].sort().values
        return positions if given is None else given

    # -- the form of an adapter: in full, or what is kept ------------------------------------------------------------

    def set_kept(
        self,
        adapter: str,
        positions: Mapping[str, Tensor] | None,
        optimizer: Optimizer | None = None,
        salt: str = "",
    ) -> None:
        """Keep the units at `positions`, at their initial values.

        Parameters are resized in place. Those of which nothing is left are empty until `drop_empty`; new ones are
        made where something is kept.

        Args:
            positions: of the kept units, for each indexed part of which any are; None: all parts in full.
            optimizer: whose state for what is resized is dropped.
            salt: another draw of the initial values.
        """
        space = self.nas_lora_space[adapter]
        self.nas_lora_active[adapter] = positions is None or any(len(own) for own in positions.values())
        self._waiting.discard(adapter)
        nothing = torch.empty(0, dtype=torch.int32, device="cpu")
        super().make_whole(adapter)
        for part in space.shapes:
            held = self.positions(part)
            own = None if positions is None else positions.get(space.index_of(part), nothing)
            if own is not None and len(own) and int(own.min()) == UNKNOWN:
                self._waiting.add(adapter)
                value = torch.zeros(space.shape(part, len(own)), dtype=torch.float32, device="cpu")
            else:
                value = space.initial(part, salt)
                value = value if own is None else space.at(value, part, own.long().cpu())
            if adapter in held:
                del held[adapter]
            device = self._device()
            if self.has_values(part, adapter):
                leaf, device = self.leaf(CONTAINERS[part], adapter), self.values(part, adapter).device
                leaf.set(value, optimizer) if value.numel() else leaf.clear(optimizer)
            elif value.numel():
                self.put(CONTAINERS[part], adapter, value.to(device))
            if own is not None and len(own) and part in space.indexed():
                held[adapter] = own.to(device, torch.int32)

    def _device(self) -> torch.device:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device if device is not None else torch.device("cpu")

    def make_whole(self, adapter: str) -> None:
        super().make_whole(adapter)
        for part in self.nas_lora_space[adapter].shapes if self.has_adapter(adapter) else ():
            if not self.has_values(part, adapter):  # of an adapter that was loaded pruned
                self.put_empty(CONTAINERS[part], adapter, self._device())

    def is_pruned(self, adapter: str) -> bool:
        """Whether the adapter is in the form of kept units here."""
        space = self.nas_lora_space[adapter]
        return any(
            adapter in self.positions(part) or self.units(adapter, part) < space.whole(part) for part in space.shapes
        )

    def kept(self, adapter: str, part: str) -> int:
        """Number of parameters of a part that are there now."""
        return self.leaf(CONTAINERS[part], adapter).shape.numel() if self.has_values(part, adapter) else 0

    def units(self, adapter: str, part: str) -> int:
        """Number of units of a part that are there now."""
        space = self.nas_lora_space[adapter]
        return self.kept(adapter, part) * space.whole(part) // space.size(part)

    def kept_positions(self, adapter: str) -> dict[str, Tensor]:
        """Positions of the units that are there now, for each indexed part of which something is."""
        found = {}
        for part in self.nas_lora_space[adapter].indexed():
            held = self.positions(part)
            if adapter in held:
                found[part] = held[adapter].cpu()
            elif self.units(adapter, part):
                found[part] = torch.arange(self.units(adapter, part), dtype=torch.int32, device="cpu")
        return found

    def knows_positions(self, adapter: str) -> bool:
        """Whether no position is still to be told by a file."""
        held = [self.positions(part) for part in self.nas_lora_space[adapter].shapes]
        return not any(adapter in h and (h[adapter].is_meta or bool((h[adapter] == UNKNOWN).any())) for h in held)

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        for adapter in adapters if self._waiting and not torch.compiler.is_compiling() else ():
            if adapter in self._waiting and not self.knows_positions(adapter):
                raise ValueError(waits_for_file(adapter, self.nas_lora_space[adapter].name))
            self._waiting.discard(adapter)
        return super().forward_with(x, adapters, *args, **kwargs)

    def counts(self, adapter: str) -> dict[str, list[int]]:
        """`{part: [parameters kept, parameters in the search space]}`."""
        space = self.nas_lora_space[adapter]
        return {part: [self.kept(adapter, part), space.size(part)] for part in space.shapes}

    def copy_frozen(self, source: str, adapter: str) -> None:
        """The units that another adapter keeps, at their initial values."""
        if self.is_pruned(source):
            self.set_kept(adapter, {part: own.clone() for part, own in self.kept_positions(source).items()})
            self.drop_empty(adapter)

    # -- scores -----------------------------------------------------------------------------------------------------

    def scored(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are scored: all of the kept ones, or, structured, without V."""
        space = self.nas_lora_space[adapter]
        parts = [part for part in space.indexed() if self.units(adapter, part)]
        return [(part, self.leaf(CONTAINERS[part], adapter).parameter) for part in parts]

    def unit_scores(self, adapter: str, part: str, scores: Tensor) -> Tensor:
        """Scores of a part's units from those of its entries: themselves, or sums over a column of U or a bias."""
        scores = for_float64(scores)
        if not self.nas_lora_space[adapter].structured:
            own = self.positions(part)
            return (scores if adapter in own else flat(scores)).double()
        return scores.sum(0, dtype=torch.float64).view(-1)

    # -- values in full ---------------------------------------------------------------------------------------------

    def bias_delta(self, adapter: str) -> Tensor | None:
        """db in full, differentiable; None if nothing of it is there."""
        positions = self.positions("bias")
        if not self.kept(adapter, "bias"):
            return None
        space, values = self.nas_lora_space[adapter], self.values("bias", adapter)
        if space.structured or adapter not in positions:
            return values
        return values.new_zeros(space.size("bias")).index_add(0, positions[adapter], values)

    def __repr__(self) -> str:
        return "nas_lora." + super().__repr__()


def layers_of(root: nn.Module, adapter: str) -> dict[str, NASLoRALayer]:
    """An adapter's layers by name, in the order of the model: that of units, by which ties are broken."""
    modules = root.named_modules()
    return {n: layer for n, layer in modules if isinstance(layer, NASLoRALayer) and layer.has_adapter(adapter)}


def space_of(layers: Mapping[str, NASLoRALayer], adapter: str) -> int:
    """Parameters of an adapter's search space."""
    return sum(of for layer in layers.values() for _, of in layer.counts(adapter).values())


def kept_of(layers: Mapping[str, NASLoRALayer], adapter: str) -> int:
    """Parameters of the search space that are there now."""
    return sum(kept for layer in layers.values() for kept, _ in layer.counts(adapter).values())


class NASLoRALinear(NASLoRALayer, DeltaLinear):
    """`y = x (W + U V^T)^T + b + db`; `x: (..., in_features)`, `U: (out_features, r)`, `V: (in_features, r)`.

    Source: arXiv 2305.16597, section 3 (the search space) and 3.2 (initial values).
    """

    def low_rank(self, adapter: str) -> Pair | None:
        a, b = self._factor("V", adapter), self._factor("U", adapter)
        if a is None and b is None:
            return None
        # Entries of one factor whose partners are all pruned have no effect, but stay in the graph, as DDP expects.
        shapes = self.nas_lora_space[adapter].shapes
        if a is None:
            a = self.values("U", adapter).new_zeros(shapes["V"][::-1])
        if b is None:
            b = self.values("V", adapter).new_zeros(shapes["U"][::-1]).t()
        return a, b, 1.0

    def _factor(self, part: str, adapter: str) -> Factor | None:
        """A = V^T, or B = U: entries where it is of such."""
        space = self.nas_lora_space[adapter]
        if not self.kept(adapter, part):
            return None
        values = self.values(part, adapter)
        if space.structured or adapter not in self.positions(part):
            return values.t() if part == "V" else values
        features, rank = space.shapes[part]
        return Entries(values, self.positions(part)[adapter], rank, features, turned=part == "U")


class NASLoRABias(NASLoRALayer, DeltaModule):
    """Any other module with a bias (a norm, a convolution), at `bias + db`; `db: (features,)`."""

    def parameter_deltas(self, adapter: str) -> dict[str, Tensor]:
        bias = self.bias_delta(adapter)
        return {} if bias is None else {"bias": bias}
