"""`peft-learners show`: what a saved adapter is, from its config and its file of weights alone."""

from __future__ import annotations

import json as json_format
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safetensors import safe_open

from ..costs import in_units
from ..hub.full_card import Adapter, phases_by_file
from ..hub.short_card import WEIGHTS, auto_class, num_labels_in
from .names import natural, shared_parts, split_name
from .source import read

#: Names of types in a file, as torch has them.
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


def run(adapter: str, json: bool) -> None:
    """Print what an adapter is."""
    found = summary(read(adapter), adapter)
    print(json_format.dumps(found, indent=2) if json else text_of(found))


def summary(adapter: Adapter, name: str) -> dict[str, Any]:
    """What there is to say of an adapter, as plain values.

    Args:
        name: as the user calls it.
    """
    config, file = adapter.config, adapter.folder / WEIGHTS
    kind, values = auto_class(config), Counter[str]()
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            part = tensors.get_slice(key)
            values[TYPES.get(part.get_dtype(), part.get_dtype())] += math.prod(part.get_shape())
    whole: Counter[str] = Counter()
    for key, shape in adapter.shapes.items():
        if f".{config.method}_" not in key:
            whole[key.removeprefix("base_model.model.").rpartition(".")[0]] += math.prod(shape)
    rows = sorted(config.module_rows(adapter.shapes), key=lambda row: natural(row["module"]))
    firsts, complete = config.phase_first_steps or {}, list(config.completed_phases)
    phases = [
        {
            "name": phase,
            "state": "done" if phase in complete else "current" if phase == config.present_phase else "to come",
            "steps": steps if phase in firsts else None,
            "trained_parameters": trained,
        }
        for phase, steps, trained in phases_by_file(adapter)
    ]
    energies = {row["module"]: row["kept_energy"] for row in rows if "kept_energy" in row}
    return {
        "adapter": name,
        "method": config.method,
        "display_name": config.shown_name(),
        "base_model": {
            "name": config.base_model_name_or_path,
            "revision": config.revision,
            "class": kind,
            "num_labels": num_labels_in(config, kind, adapter.shapes),
        },
        "phases": phases,
        "file": {"bytes": file.stat().st_size, "values": dict(values)},
        "trained_whole": dict(whole),
        "kept": _kept(rows),
        "kept_energy": _spread(energies) if energies else None,
        "modules": rows,
    }


def _kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What is left of the things that were chosen from (FAR's nodes, NAS-LoRA's parameters)."""
    for name in ("nodes", "parameters"):
        chosen = [row for row in rows if f"of_{name}" in row]
        if chosen:
            kept = sum(row[name] for row in chosen)
            known = all(row[f"of_{name}"] is not None for row in chosen)
            return {"what": name, "kept": kept, "of": sum(row[f"of_{name}"] for row in chosen) if known else None}
    return None


def _spread(energies: Mapping[str, float]) -> dict[str, Any]:
    least = min(energies, key=lambda module: energies[module])
    return {"least": energies[least], "module": least, "median": statistics.median(energies.values())}


# -- as text ----------------------------------------------------------------------------------------------------------


def text_of(found: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    base, file = found["base_model"], found["file"]
    values = " and ".join(f"{count:,} {kind}" for kind, count in file["values"].items())
    lines = [f"{found['adapter']}: {found['display_name']} adapter", ""]
    facts = {
        "base model": base["name"] or "not named in the config",
        "revision": base["revision"],
        "load with": base["class"] and f"{base['class']}{_labels(base['num_labels'])}",
        "file": f"{in_units(file['bytes'])}: {values} values",
        "trained whole": ", ".join(f"{name} ({count:,})" for name, count in found["trained_whole"].items()),
        "kept": found["kept"] and found["kept"]["of"] and _kept_text(found["kept"]),
        "kept energy": found["kept_energy"] and _energy_text(found["kept_energy"]),
    }
    width = max(len(name) for name, value in facts.items() if value)
    lines += [f"{name:<{width}}  {value}" for name, value in facts.items() if value]
    phases = [
        [
            phase["name"],
            phase["state"],
            phase["steps"] or "not recorded",
            "not in the file" if phase["trained_parameters"] is None else f"{phase['trained_parameters']:,}",
        ]
        for phase in found["phases"]
    ]
    lines += ["", *table(["phase", "state", "steps", "trained parameters"], phases, numbers=1)]
    if found["modules"]:
        lines += ["", *table(*by_kind(found["modules"]))]
    return "\n".join(lines)


def _labels(number: int | None) -> str:
    return f", num_labels={number}" if number is not None else ""


def _kept_text(kept: Mapping[str, Any]) -> str:
    share = f"{kept['kept'] / kept['of']:.1%} of the {kept['what']}"
    return f"{share} ({kept['kept']:,} of {kept['of']:,})" if kept["what"] == "parameters" else share


def _energy_text(energy: Mapping[str, Any]) -> str:
    return f"least {energy['least']:.1%} ({energy['module']}), median {energy['median']:.1%}"


def by_kind(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a line for each kind of module in a block."""
    shared = shared_parts(row["module"] for row in rows)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((split_name(row["module"], shared)[1], row.get("kind", "")), []).append(row)
    shown = [column for column in COLUMNS if any(row.get(column, False) is not False for row in rows)]
    lines = []
    for (module, _), own in groups.items():
        cells = [COLUMNS[column][1]([row[column] for row in own if column in row]) for column in shown]
        lines.append([module, f"{len(own)}", *cells])
    return ["module", "modules", *(COLUMNS[column][0] for column in shown)], lines


def _range(form: str) -> Callable[[Sequence[Any]], str]:
    """From the least to the largest value, once where they are equal."""

    def text(values: Sequence[Any]) -> str:
        if not values:
            return ""
        if None in values:
            return "?"
        return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))

    return text


def _sum(values: Sequence[int]) -> str:
    return f"{sum(values):,}"


def _how_many(values: Sequence[bool]) -> str:
    return f"{sum(values)} of {len(values)}" if any(values) else ""


#: Heads of columns, and how the values of several modules are told.
COLUMNS: dict[str, tuple[str, Callable[[Sequence[Any]], str]]] = {
    "kind": ("update", lambda values: values[0].replace("_", "-")),
    "rank": ("rank", _range(",")),
    "bottleneck_dim": ("bottleneck_dim", _range(",")),
    "primed": ("primed", _how_many),
    "kept_energy": ("kept energy", _range(".1%")),
    "nodes": ("nodes kept", _range(",")),
    "of_nodes": ("of", _range(",")),
    "parameters": ("parameters", _sum),
    "of_parameters": ("of", _sum),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right.

    Args:
        numbers: how many columns more than the first are texts.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if place <= numbers else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
