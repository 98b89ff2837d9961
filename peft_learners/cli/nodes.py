"""A picture of the FFN nodes that FAR adapters kept, layer by layer.

One panel per adapter: a row is a layer, a tick a kept node. The layers of an FFN keep the same hidden units and make
one row; with `granularity="output_node"` each has its own. Two adapters of one model are compared: which share of the
second one's nodes the first one kept too, and which share chance would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from matplotlib.figure import Figure
from safetensors import safe_open

from ..hub.full_card import Adapter
from ..hub.short_card import WEIGHTS
from . import CommandError
from .figure import CELL, styled
from .names import ends_with, natural, short_names

#: `{layer: (indices of the kept nodes, ascending; number of nodes)}`, in the order of the model.
Kept = dict[str, tuple[list[int], int]]


@dataclass(frozen=True)
class Overlap:
    """How far two adapters kept the same nodes of a layer.

    Attributes:
        share: of the second one's nodes, those that the first one kept too.
        chance: what `share` would be on average if the first one had drawn its nodes at random.
    """

    share: float
    chance: float


def read_kept(adapter: Adapter, widths: Mapping[str, int]) -> Kept:
    """The nodes that a saved FAR adapter kept.

    Args:
        widths: numbers of nodes, by endings of layers' names ("" for all layers); only looked at where the file does
            not hold the nodes that were not kept.

    Raises:
        ValueError: no nodes were selected yet, or a layer's number of nodes is unknown or can't be right.
    """
    found = {row["module"]: row["of_nodes"] for row in adapter.config.module_rows(adapter.shapes) if "nodes" in row}
    if not found:
        raise CommandError(
            f"{adapter.folder} was saved before its nodes were selected (in priming), so there are none to draw. Save "
            "the adapter after the boundary."
        )
    kept: Kept = {}
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        for layer in _one_per_unit(sorted(found, key=natural), adapter.config):
            indices = file.get_tensor(f"base_model.model.{layer}.far_kept").tolist()
            width = found[layer] if found[layer] is not None else _given_width(adapter, layer, widths)
            if indices and indices[-1] >= width:
                raise CommandError(f"{layer} keeps node {indices[-1]}, so it must have more than {width} nodes.")
            kept[layer] = (indices, width)
    return kept


def _one_per_unit(layers: Sequence[str], config: Any) -> list[str]:
    """The layers to draw: those that lead out of an FFN, or all where each has nodes of its own."""
    if config.granularity == "output_node":
        return list(layers)
    units: dict[str, str] = {}
    for layer in layers:
        unit, leads_out = layer, False
        for *first, last in config.ffn_modules or []:
            # The one that leads out is the one to take: a fused gate's rows are each unit's twice.
            leads_out = leads_out or ends_with(layer, last)
            for ending in first:
                if ends_with(layer, ending):
                    unit = layer[: len(layer) - len(ending)] + last
        if leads_out or unit not in units:
            units[unit] = layer
    return list(units.values())


def _given_width(adapter: Adapter, layer: str, widths: Mapping[str, int]) -> int:
    fitting = [ending for ending in widths if not ending or ends_with(layer, ending)]
    if not fitting:
        raise CommandError(
            f"The file in {adapter.folder} does not tell how many nodes {layer} has: with discard_unkept it holds "
            f"only those that were kept. Give the number: --width 1536, or --width {layer.rpartition('.')[2]}=1536"
        )
    return widths[max(fitting, key=len)]


def overlaps(first: Kept, second: Kept) -> dict[str, Overlap]:
    """The overlap of each layer that both adapters have nodes of, and in which the second kept any.

    Raises:
        ValueError: the adapters are not of one model.
    """
    found = {}
    for layer, (indices, width) in second.items():
        others, other_width = first.get(layer, ([], width))
        if width != other_width:
            raise CommandError(f"{layer} has {other_width} nodes in the first adapter and {width} in the second.")
        if layer in first and indices:
            found[layer] = Overlap(len({*indices} & {*others}) / len(indices), len(others) / width)
    if not found:
        raise CommandError("The two adapters keep nodes of no layer in common, so they can't be compared.")
    return found


def title_of(name: str, config: Any) -> str:
    """A panel's title: which adapter, and how its nodes were selected."""
    unit = config.granularity.replace("_", " ")
    return f"{name}: {config.retention_ratio:.0%} of the {unit}s kept (selection: {config.selection})"


@styled
def draw_adapters(adapters: Mapping[str, Adapter], title: Optional[str], widths: Mapping[str, int]) -> Figure:
    """A panel per adapter, below each other; overlaps stand beside the rows of the second of two."""
    kept = {name: read_kept(adapter, widths) for name, adapter in adapters.items()}
    compared = overlaps(*kept.values()) if len(kept) == 2 else {}
    heights = [max(len(own), 2) for own in kept.values()]
    figure = Figure(figsize=(11, 1.3 * len(kept) + 0.34 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(kept), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, own) in zip(axes, kept.items(), strict=True):
        config: Any = adapters[name].config
        rows = range(len(own))
        positions, most = [indices for indices, _ in own.values()], max(width for _, width in own.values())
        thin = min(3.0, max(0.7, 500 / most))
        axis.eventplot(positions, lineoffsets=list(rows), linelengths=0.8, linewidths=thin, colors="tab:blue")
        for row, (_, width) in zip(rows, own.values(), strict=True):  # where layers differ, their ends show
            axis.plot([width - 0.5] * 2, [row - 0.4, row + 0.4], color="0.6", linewidth=1)
        axis.set_yticks(rows, short_names(list(own)))
        axis.set_ylim(len(own) - 0.5, -0.5)
        axis.set_xlim(-0.5, most - 0.5)
        axis.set_title(title_of(name, config))
        axis.set_ylabel("layer")
    axis.set_xlabel(f"index of the {config.granularity.replace('_', ' ')}")
    for row, layer in enumerate(own):
        if layer in compared:
            text = f" {compared[layer].share:.0%} (chance {compared[layer].chance:.0%})"
            axis.text(1, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=CELL)
    if compared:
        axis.text(1, -0.6, " kept above too", transform=axis.get_yaxis_transform(), va="bottom", fontsize=CELL)
    if title:
        figure.suptitle(title)
    return figure
