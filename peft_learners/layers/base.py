"""What the layers of all tuners share: merging, disabling, mixed batches, freezing of parts.

A tuner layer stands in for one original module and holds, per adapter, *deltas* on its parameters. The original
module is written to by `merge` alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..structure.weights import is_offloaded, is_plain_float, stored_as
from .value import Value

BASE_ADAPTER = "__base__"
#: Name of the adapter in layers that are made to be counted.
OUTLINE = "__outline__"
#: Standard deviation of every delta under `init_weights=False`.
TEST_STD = 0.05


def parameter_at(module: nn.Module, name: str) -> Any:
    """The parameter of a dotted name. Under FSDP it may be a plain tensor, which `get_parameter` refuses."""
    return functools.reduce(getattr, name.split("."), module)


def _rows_of(value: Any, indices: list[int], length: int) -> Any:
    """Some rows of what has a row for each of a batch, and other values as they are."""
    return value[indices] if isinstance(value, Tensor) and value.dim() and len(value) == length else value


def check_mergeable(root: nn.Module, adapters: Iterable[str], shared_weights: bool = False) -> None:
    """Refuse to merge adapters of which a part could not be merged, before any part is.

    Args:
        shared_weights: whether weights that several modules use may be merged into.

    Raises:
        ValueError: one of their weight updates lies on a quantised layer, or on a weight that other modules use too.
    """
    names = list(adapters)
    users: dict[int, list[str]] = {}
    for place, module in root.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(place.removesuffix(".base_layer"))
    for place, layer in root.named_modules():
        if not isinstance(layer, DeltaLayer):
            continue
        for name in filter(layer.has_adapter, names):
            layer.check_mergeable(name)
            sharing = users.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
            if len(sharing) > 1 and layer.is_active(name) and not shared_weights:
                others = " and ".join(other for other in sharing if other != place)
                raise ValueError(
                    f"{place} shares its weight with {others}, which the update of the adapter {name!r} would change, "
                    "too, if it were merged. Keep the adapter unmerged; or train one with exclude_modules="
                    f"[{place.rpartition('.')[2]!r}]; or load the base model with tie_word_embeddings=False and give "
                    "each its own copy of the weight before you merge."
                )


def refuse_merged(layers: Iterable[DeltaLayer]) -> None:
    """For what reads an adapter beside the base model's own values.

    Raises:
        ValueError: a layer has adapters merged into its base.
    """
    if any(layer.merged for layer in layers):
        raise ValueError("The model's weights have adapters merged into them: call `model.unmerge_adapter()` first.")


def tuner_layers(root: nn.Module) -> Iterator[DeltaLayer]:
    """All tuner layers of this package in a model."""
    return (module for module in root.modules() if isinstance(module, DeltaLayer))


def adapter_parameters(root: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """All parameters of one adapter, the modules that it saves whole (the head) among them."""
    for module in root.modules():
        if isinstance(module, DeltaLayer):
            yield from (value for _, value in module.parts_of(adapter) if isinstance(value, nn.Parameter))
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            yield from module.modules_to_save[adapter].parameters()


def values_of(root: nn.Module, adapter: str, part: str) -> dict[str, Tensor]:
    """`{layer: value}` of what an adapter has in one container of the tuner layers, where it has data."""
    layers = ((name, layer) for name, layer in root.named_modules() if isinstance(layer, DeltaLayer))
    found = {name: layer.leaf(part, adapter).tensor for name, layer in layers if layer.has_part(part, adapter)}
    return {name: value for name, value in found.items() if not value.is_meta and value.numel()}


def draw_first(value: Tensor, config: Any, kaiming: bool = False) -> None:
    """Give a parameter of a new adapter its first values: zeros, or Kaiming-uniform; random without `init_weights`."""
    if kaiming:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    elif config.init_weights:
        nn.init.zeros_(value)
    if not config.init_weights:
        nn.init.normal_(value, std=TEST_STD)


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A module plus the deltas of its adapters.

    A subclass names its containers in `adapter_layer_names` (each a `ModuleDict` keyed by adapter; those of a `Value`
    are the *parts* that phases freeze), and defines `forward_with` and `get_deltas`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters = []
        self._disable_adapters = False
        #: Read by PEFT's `_cast_input_dtype`, and switched by its `disable_input_dtype_casting`.
        self.cast_input_dtype_enabled = True
        #: Set by the tuner while the model computes a batch whose rows have different adapters.
        self.in_mixed_batch = False
        #: By part and adapter: values of which nothing is left, whose parameters an optimizer may hold.
        self._gone: dict[tuple[str, str], Value] = {}

    # -- for the subclass -------------------------------------------------------------------------------------------

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Output of the module with these adapters (all present here) added, without touching the module.

        Args:
            x: (..., in_features).
            adapters: names, each of which has deltas in this layer; at least one.
        """
        raise NotImplementedError

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        """`{name of the module's parameter: what the adapter adds to it}`, in the parameter's own layout."""
        raise NotImplementedError

    def effective_deltas(self, adapter: str) -> dict[str, Tensor]:
        """The same with the deltas on parameters that are shared with another layer, which merges them."""
        return self.get_deltas(adapter)

    def merged_values(self, adapter: str) -> dict[str, Tensor]:
        """`{name of the module's parameter: its value with the adapter's delta added}`."""
        base = self.get_base_layer()
        return {key: self.sum_with(base, key, delta, 1) for key, delta in self.get_deltas(adapter).items()}

    def has_adapter(self, adapter: str) -> bool:
        """Whether the adapter has deltas in this layer."""
        return any(adapter in getattr(self, name) for name in self.adapter_layer_names)

    def parts_of(self, adapter: str) -> Iterator[tuple[str, Tensor]]:
        """`(name of the container, parameter, or buffer where it is frozen)` of what the adapter has here."""
        for part in self.adapter_layer_names:
            if adapter in getattr(self, part):
                held = getattr(self, part)[adapter]
                yield from ((part, value) for value in itertools.chain(held.parameters(), held.buffers()))

    def has_part(self, part: str, adapter: str) -> bool:
        """Whether a container has anything of an adapter."""
        return part in self.adapter_layer_names and adapter in getattr(self, part)

    def value(self, part: str, adapter: str) -> Tensor:
        """The tensor of an adapter in a container, differentiable while it trains."""
        return getattr(self, part)[adapter]()

    def leaves_of(self, adapter: str) -> list[tuple[str, Value]]:
        """`(name of the container, module)` of what an adapter has here that can freeze."""
        held = [
            (part, getattr(self, part)[adapter]) for part in self.adapter_layer_names if self.has_part(part, adapter)
        ]
        return [(part, leaf) for part, leaf in held if isinstance(leaf, Value)]

    def leaf(self, part: str, adapter: str) -> Value:
        """The module that holds the tensor of an adapter in a container."""
        return getattr(self, part)[adapter]

    def add_parameter(self, part: str, adapter: str, config: Any, *shape: int, kaiming: bool = False) -> None:
        """Put a new parameter into a container, at its first values (`draw_first`)."""
        value = torch.empty(*shape, dtype=torch.float32, device=self.drawing_device(adapter))
        draw_first(value, config, kaiming)
        self.put(part, adapter, value)

    def drawing_device(self, adapter: str) -> str | None:
        """Where an adapter's first values are drawn: on the CPU, whatever torch's default is, from where PEFT moves
        them to the base layer; nowhere for a layer that serves for counting alone."""
        if adapter == OUTLINE:
            return "meta"
        return None if any(p.is_meta for p in self.base_layer.parameters()) else "cpu"

    def file_key(self, part: str) -> str:
        """What the tensor in a container is called in a file, after the layer's name."""
        if part not in self.adapter_layer_names:
            return part
        return f"{part}.bias" if "bias" in part else f"{part}.weight"

    def put(self, part: str, adapter: str, value: Tensor) -> None:
        """Put a new parameter into a container. One of a bias is called so: Trainer exempts it from weight decay."""
        getattr(self, part)[adapter] = Value(value, self.file_key(part).rpartition(".")[2])

    def put_empty(self, part: str, adapter: str, device: torch.device) -> None:
        """Put a parameter into a container of which nothing is left, for an optimizer that is yet to be made."""
        self.put(part, adapter, torch.empty(0, dtype=torch.float32, device=device))
        self.leaf(part, adapter).is_empty = True

    def let_go(self) -> None:
        """The layer is about to give its place back to its base: undo what was put outside of it."""

    def is_active(self, adapter: str) -> bool:
        """Whether the adapter changes what this layer computes."""
        return self.has_adapter(adapter)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: Optional[list[str]] = None, **kwargs: Any) -> Tensor:
        """Output of the adapted module for `x: (..., in_features)`.

        Args:
            adapter_names: one name per row of x's first dimension (`"__base__"` for none): a mixed batch.
        """
        if adapter_names is not None:
            self._check_mixed(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        adapters = [] if self.merged else [name for name in self.active_adapters if self.is_active(name)]
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_at_hand(x, adapters, *args, **kwargs)

    def _forward_at_hand(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """`forward_with`, with weights that are offloaded fetched for it."""
        parts = self._modules.values()
        if not any("_hf_hook" in part.__dict__ and is_offloaded(part) for part in parts if part is not None):
            return self.forward_with(x, adapters, *args, **kwargs)
        # Their own forward would fetch them again, over values that `forward_with` has put in their place.
        fetched: list[tuple[Any, Any]] = []
        out: Any = None
        try:
            for module in self.modules():
                if is_offloaded(module):
                    hook: Any = module._hf_hook
                    (x, *args), kwargs = hook.pre_forward(module, x, *args, **kwargs)
                    fetched.append((module, module.forward))
                    module.forward = module._old_forward  # type: ignore[assignment]
            out = self.forward_with(x, adapters, *args, **kwargs)
        finally:
            for module, forward in fetched:
                module.forward = forward
                out = module._hf_hook.post_forward(module, out)
        return out

    def _check_mixed(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name if self.has_adapter(name) else BASE_ADAPTER, []).append(row)
        out: Tensor | None = None
        for name, indices in rows.items():
            part, *own = (_rows_of(value, indices, len(x)) for value in (x, *args))
            options = {key: _rows_of(value, indices, len(x)) for key, value in kwargs.items()}
            if name == BASE_ADAPTER:
                result = self.base_layer(part, *own, **options)
            else:
                result = self._forward_at_hand(part, [name], *own, **options)
            if out is None:
                out = result.new_empty((len(x), *result.shape[1:]))
            out[indices] = result.to(out.dtype)
        return out if out is not None else self.base_layer(x, *args, **kwargs)

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Add the adapters' deltas to the original module's parameters.

        Args:
            safe_merge: check the sums for NaN and infinity before any is written.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a sum that is not finite, or the module's weight is no float matrix.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.has_adapter(name):
                continue
            self.check_mergeable(name)
            base = self.get_base_layer()
            with self._weights_at_hand():
                sums = self.merged_values(name)
                if safe_merge:
                    for key, value in sums.items():
                        if not torch.isfinite(value).all():
                            raise ValueError(
                                f"NaNs detected in the merged weights. The adapter {name} seems to be broken "
                                f"(parameter {key!r} of a {type(base).__name__})."
                            )
                for key, value in sums.items():
                    parameter_at(base, key).data = value
            self.merged_adapters.append(name)

    def check_mergeable(self, adapter: str) -> None:
        """Refuse to merge what the module's weight can't take.

        Raises:
            ValueError: the adapter has a weight update here, and the weight is quantised.
        """

    @contextmanager
    def _weights_at_hand(self) -> Iterator[None]:
        """Weights that are offloaded, fetched to be written to, unless PEFT has done so already."""
        base = self.get_base_layer()
        absent = is_offloaded(base) and any(p.is_meta for p in base.parameters(recurse=False))
        with onload_layer(self) if absent else nullcontext():
            yield
            for module in base.modules():  # PEFT keeps what was written to the base layer itself, not to its insides
                if module is not base and is_offloaded(module):
                    hook: Any = module._hf_hook
                    values = itertools.chain(
                        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
                    )
                    hook.weights_map = {name: value.detach().to("cpu") for name, value in values}

    def unmerge(self) -> None:
        """Subtract the merged deltas again; exact to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        with self._weights_at_hand():
            while self.merged_adapters:
                for key, delta in self.get_deltas(self.merged_adapters.pop()).items():
                    parameter_at(base, key).data = self.sum_with(base, key, delta, -1)

    @staticmethod
    def sum_with(base: nn.Module, key: str, delta: Tensor, sign: int) -> Tensor:
        if not is_plain_float(parameter_at(base, key)):
            raise ValueError(cannot_merge_into(base))
        value = parameter_at(base, key).data
        # In the wider of both types, so that a float32 delta is rounded once.
        return torch.add(value, delta.to(value.device), alpha=sign).to(value.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` loses nothing here; if not, a warning names what does not lose it."""
        warnings.warn(
            "PEFT's convert_to_lora would drop the biases, norms and whole modules of this adapter. Use "
            "peft_learners.export.to_lora(model, rank), which keeps them.",
            stacklevel=2,
        )
        return False

    # -- freezing ---------------------------------------------------------------------------------------------------

    def freeze_parts(self, adapter: str, parts: Collection[str]) -> list[nn.Parameter]:
        """Let some parts of an adapter contribute without training: they become buffers, whatever is switched later.

        The others train where the adapter is active and trained.

        Args:
            parts: names of containers.

        Returns:
            The parameters that stopped training.
        """
        stopped = []
        for part, held in self.leaves_of(adapter):
            if held.is_empty:
                continue
            if part in parts and not held.is_frozen:
                if held.parameter.requires_grad:
                    stopped.append(held.parameter)
                held.freeze()
            elif part not in parts and held.is_frozen:
                held.unfreeze()
                held.parameter.requires_grad_(adapter in self.active_adapters and not self.disable_adapters)
        return stopped

    def empty_keys(self, adapter: str) -> list[str]:
        """Keys, in a state dict, of parameters of which nothing is left."""
        return [f"{part}.{adapter}.{leaf.name}" for part, leaf in self.leaves_of(adapter) if leaf.is_empty]

    def drop_empty(self, adapter: str) -> list[nn.Parameter]:
        """Let go of parameters of which nothing is left; gives those that an optimizer may have state of."""
        stopped: list[nn.Parameter] = []
        for part, held in self.leaves_of(adapter):
            if held.is_empty:
                held.parameter.requires_grad_(False)
                stopped.append(held.parameter)
                self._gone[part, adapter] = held
                del getattr(self, part)[adapter]
        return stopped

    def cast_frozen(self, adapter: str) -> None:
        """Bring frozen values of half precision to float32, as PEFT does with parameters."""
        for _, held in self.leaves_of(adapter):
            if held.is_frozen and held().dtype.itemsize < 4:
                setattr(held, held.name, held().float())

    def copy_frozen(self, source: str, adapter: str) -> None:
        """Give an adapter of the same config what another one holds beside its parameters: frozen values, indices.

        Whoever clones an adapter by its named parameters gets all of it thus.
        """
        for name in self.other_param_names:
            own = getattr(self, name)
            if isinstance(own, BufferDict) and source in own:
                own[adapter] = own[source].clone()
        for part, held in self.leaves_of(source):
            if held.is_frozen and self.has_part(part, adapter):
                self.leaf(part, adapter).set(held().clone())

    def make_whole(self, adapter: str) -> None:
        """Put back, empty, the parameters of which nothing is left, for an optimizer that is yet to be made."""
        for part, name in [key for key in self._gone if key[1] == adapter]:
            held = getattr(self, part)[name] = self._gone.pop((part, name))
            held.parameter.requires_grad_(adapter in self.active_adapters and not self.disable_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        for key in [key for key in self._gone if key[1] == adapter_name]:
            del self._gone[key]
        super().delete_adapter(adapter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # HQQ's weight has another name
            values = itertools.chain(base_layer.parameters(), base_layer.buffers())
            device = next((value.device for value in values), None)
        if device is not None and device.type == "meta" and is_offloaded(base_layer):
            device = torch.device(base_layer._hf_hook.execution_device)  # where it computes
        if dtype is not None and dtype.itemsize < 2:  # fp8: an adapter would lose most of its digits
            dtype = None
        return device, dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # Under low_cpu_mem_usage buffers have no data yet, which PEFT expects of parameters only.
        held = [getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)]
        held = [own for own in held if isinstance(own, (BufferDict, nn.ModuleDict)) and adapter_name in own]
        without_data = [(own, own[adapter_name]) for own in held if _has_no_data(own[adapter_name])]
        for own, _ in without_data:
            del own[adapter_name]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for own, value in without_data:
            own[adapter_name] = value


def _has_no_data(value: Tensor | nn.Module) -> bool:
    return value.is_meta if isinstance(value, Tensor) else any(buffer.is_meta for buffer in value.buffers())


def cannot_merge_into(base: nn.Module) -> str:
    """Sentence of an error."""
    return (
        f"The {type(base).__name__} to merge into is quantised, it stores {stored_as(base)} values: the sum would "
        "have to be rounded again, and the merged model would not be the one that was trained. Keep the adapter "
        "unmerged, or merge into the base model in float and quantise what comes out: "
        "PeftModel.from_pretrained(float_model, adapter).merge_and_unload()."
    )


class TransparentLayer(DeltaLayer):
    """A layer whose base's public attributes can be read through it (`eps`, `stride`, `padding_idx`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return self._read_through(name)

    def _read_through(self, name: str) -> Any:
        """Value of an attribute that the layer itself does not have."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_layer, name)


def check_adapter_name(name: str) -> None:
    """Refuse a name that torch's containers can't hold.

    Raises:
        ValueError: it has a dot, or is the name of one of their methods.
    """
    if hasattr(nn.ModuleDict(), name) or hasattr(BufferDict, name) or "." in name:
        better = name.replace(".", "_") if "." in name else f"{name}_1"
        raise ValueError(
            "adapter_name must have no dot, nor be the name of a method of torch's containers, which hold adapters by "
            f"their names, got {name!r}. Take another: {better!r}."
        )
