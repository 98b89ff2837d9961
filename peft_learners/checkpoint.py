"""A checkpoint is checked as a whole before any of it is loaded, so that a foreign one leaves the model as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers.indices import fault_of
from .structure.weights import base_of

#: `{name as in a file: shape}` of an adapter's values: names in a file are without the adapter's.
Shapes = dict[str, tuple[int, ...]]
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Indices:
    """What a value must be that holds indices: ascending whole numbers from 0.

    Attributes:
        module: name of the layer.
        what: they are, in words.
        count: what they must lie below.
    """

    module: str
    what: str
    count: int


def refuse_foreign(expected: Mapping[str, Any], prefix: str, adapter: str, keys: Iterable[str]) -> None:
    """Compare the names of an adapter's values in a file with those it should hold.

    Args:
        keys: of the file, without those of modules that are saved whole.

    Raises:
        ValueError: values are missing, or have no place.
    """
    parts_of = {key: key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for key in keys}
    found = {key for key, part in parts_of.items() if part.startswith(prefix)}
    missing, unknown = sorted(set(expected) - found), sorted(found - set(expected))
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(expected)} values are missing (first: {missing[0]})")
    if unknown:
        parts.append(f"{len(unknown)} values have no place in the model (first: {unknown[0]})")
    if parts:
        raise ValueError(_misfit(adapter, "; ".join(parts)))


def refuse_missing(whole: Mapping[str, str], adapter: str, state_dict: Mapping[str, Any]) -> None:
    """A file must hold all of the modules that are saved whole with an adapter.

    Args:
        whole: names of their values, in the model, by those in a file.

    Raises:
        ValueError: some are missing.
    """
    missing = [name for name, full in whole.items() if full not in state_dict]
    if missing:
        what = "values of the modules that are saved whole with the adapter are missing"
        raise ValueError(_misfit(adapter, f"{len(missing)} of {len(whole)} {what} (first: {missing[0]})"))


def refuse_shapes(
    expected: Shapes,
    adapter: str,
    state_dict: dict[str, torch.Tensor],
    whole: Collection[str] = (),
    num_labels: int | None = None,
) -> None:
    """Compare the shapes of values in a file with those they should have.

    Args:
        whole: names of the values of modules that are saved whole.
        num_labels: of the model's config, for telling that only the number of labels differs.

    Raises:
        ValueError: some differ.
    """
    given = {key: tuple(value.shape) for key, value in state_dict.items() if key in expected}
    differ = {key: shape for key, shape in given.items() if shape != expected[key]}
    if not differ:
        return
    first, shape = next(iter(differ.items()))
    sizes = f"{shape} in the file, {expected[first]} in the model"
    what = f"{len(differ)} shapes differ (size mismatch for {first}: {sizes})"
    rows = {own[:1] for own in differ.values()}
    of_labels = (expected[key] == (num_labels, *own[1:]) for key, own in differ.items())
    if differ.keys() <= set(whole) and len(rows) == 1 and all(of_labels):
        raise ValueError(
            f"The checkpoint does not fit the adapter {adapter!r}: {what}. Nothing was loaded. Its head has "
            f"{shape[0]} labels, and the base model was loaded with {num_labels}: load the base model with "
            f"num_labels={shape[0]}, AutoModelFor....from_pretrained(..., num_labels={shape[0]})."
        )
    raise ValueError(_misfit(adapter, what))


def missing_parts(own: Shapes, keys: Collection[str], part_of: Callable[[str], str | None]) -> list[str]:
    """Keys of an adapter's parts of which a state has nothing, while it has all of the others: it is of another phase,
    or of the trained parameters alone. One that has some of a part may be a shard: torch does not tell (`strict`).

    Args:
        own: shapes of the adapter's values in the model, by key.
        keys: of the adapter's values in the state.
        part_of: the part that a key is of.
    """
    there = {part_of(key) for key in keys}
    if any(part_of(key) in there and key not in keys for key in own):
        return []
    return [key for key, shape in own.items() if math.prod(shape) and part_of(key) not in there]


def refuse_other_form(own: Shapes, given: Shapes, adapter: str, missing: Sequence[str] = ()) -> None:
    """Compare a model's state with the adapter that it is about to be loaded into.

    Args:
        own, given: shapes of the adapter's values, by key, in the model and in the state.
        missing: keys that the state should have.

    Raises:
        ValueError: the state is that of an adapter in another form: of another phase, or of another config.
    """
    parts = []
    unknown = [key for key in given if key not in own]
    shapes = [key for key in given if key in own and own[key] != given[key]]
    if unknown:
        parts.append(f"{len(unknown)} values have no place in the model (first: {unknown[0]})")
    if missing:
        parts.append(f"{len(missing)} are missing (first: {missing[0]})")
    if shapes:
        key = shapes[0]
        parts.append(f"{len(shapes)} shapes differ (size mismatch for {key}: {given[key]}, {own[key]} in the model)")
    if parts:
        raise ValueError(
            f"The state does not fit the adapter {adapter!r}: {'; '.join(parts)}. Nothing of the adapter was loaded. "
            "It was saved in another phase, with another config, or without the buffers that model.state_dict() has. "
            "Load the adapter of that step first, PeftModel.from_pretrained(base_model, folder, is_trainable=True), "
            "and then the state."
        )


def without_others(
    root: nn.Module, adapter: str, own: Collection[str], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What of a file may be loaded: it may write to nothing but the adapter. A warning names what has no place.

    PEFT saves tables of embeddings beside an adapter in some cases (`save_embedding_layers`). They may hold what the
    model's do, except for rows that the model has been given for new tokens.

    Args:
        own: names of values that are the adapter's.

    Raises:
        ValueError: the file has other values of the model.
    """
    model, lost = root.state_dict(), []
    tables: set[int] | None = None
    for key in state_dict.keys() - own:
        short = key.removeprefix(_PEFT_PREFIX)  # PEFT takes that off for models that it has not wrapped
        place = key if key in model else short if short in model else None
        if place is None:
            lost.append(key)
            continue
        tables = _tables(root) if tables is None else tables
        present, given = model[place], state_dict[key]
        if present.data_ptr() not in tables or not _differs_in_new_rows_alone(root, present, given):
            raise ValueError(
                _misfit(
                    adapter,
                    f"it has values that are not the adapter's but the model's, which it may not change (first: {key}"
                    "). Modules that are to be trained and saved with an adapter are named in modules_to_save",
                )
            )
    if lost:
        warnings.warn(
            f"{len(lost)} values of the checkpoint have no place in the model and are left out of the adapter "
            f"{adapter!r}: {_first_names(lost)}.",
            stacklevel=2,
        )
    return {key: value for key, value in state_dict.items() if key not in lost}


def _tables(root: nn.Module) -> set[int]:
    """Where the data of the input and output embeddings' parameters lies."""
    found: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(root, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            found.update(p.data_ptr() for p in base_of(module).parameters() if not p.is_meta)
    return found


def _differs_in_new_rows_alone(root: nn.Module, present: Tensor, given: Tensor) -> bool:
    """Whether a table of embeddings in a file is the model's, except for rows that were added to the model."""
    if present.shape != given.shape or not given.is_floating_point():
        return False
    given = given.to(present)
    if torch.equal(given, present):
        return True
    config: Any = getattr(root, "config", None)
    try:  # as PEFT does, to find out that a vocabulary was resized
        known = type(config).from_pretrained(config.name_or_path, local_files_only=True).vocab_size
    except (AttributeError, OSError, ValueError):
        return False
    return 0 < known < len(present) and torch.equal(given[:known], present[:known])


def refuse_types(
    indices: Collection[str], whole: Mapping[str, Tensor], adapter: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Values must be of the kind that they are in the model: floating-point numbers (in any precision), or not.

    Args:
        indices: names of the values that are whole numbers; all others of the adapter are floating-point ones.
        whole: the values of modules that are saved whole.

    Raises:
        ValueError: some are of another kind.
    """
    for key, value in state_dict.items():
        number = whole[key].is_floating_point() if key in whole else key not in indices
        integral = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if key in whole and whole[key].dtype == torch.bool:
            integral = value.dtype == torch.bool
        if not (value.is_floating_point() if number else integral):
            right = "floating-point numbers" if number else "whole numbers"
            raise ValueError(_misfit(adapter, f"{key} must hold {right}, got {value.dtype}"))


def refuse_indices(indices: Mapping[str, Indices], adapter: str, state_dict: Mapping[str, Tensor]) -> None:
    """Indices must lie inside of what they are indices of, and ascend.

    Args:
        indices: what they must be, by name.

    Raises:
        ValueError: some don't.
    """
    for key, right in indices.items():
        if key not in state_dict or state_dict[key].is_meta:
            continue
        fault = fault_of(state_dict[key], right.count)
        if fault:
            raise ValueError(_misfit(adapter, f"{right.what} of {right.module} {fault}"))


def warn_not_finite(adapter: str, state_dict: Mapping[str, Tensor]) -> None:
    """Name values that hold NaN or infinity."""
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and not _is_finite(value)]
    if broken:
        warnings.warn(
            f"{len(broken)} of {len(state_dict)} values of the checkpoint for the adapter {adapter!r} hold NaN or "
            f"infinity: {_first_names(broken)}. What the model computes with them will do so, too.",
            stacklevel=2,
        )


def _is_finite(value: Tensor) -> bool:
    if value.is_meta:
        return True
    return bool(torch.isfinite(value if value.element_size() > 1 else value.float()).all())


def _first_names(keys: Iterable[str]) -> str:
    first = sorted(keys)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _misfit(adapter: str, what: str) -> str:
    return (
        f"The checkpoint does not fit the adapter {adapter!r}: {what}. Nothing was loaded. Load it with the "
        "adapter_config.json it was saved with (PeftModel.from_pretrained does), on the same base model."
    )


def before_next_load(root: nn.Module, action: Callable[[dict[str, Tensor]], None]) -> None:
    """Do something once when values are about to be loaded into a model, with these values by name."""

    def hook(module: nn.Module, values: dict[str, Tensor], *args: Any) -> None:
        handle.remove()
        action(values)

    handle = root.register_load_state_dict_pre_hook(hook)
