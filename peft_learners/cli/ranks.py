"""A picture of Learners: the rank of each update, and the energy that folding kept, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from matplotlib.figure import Figure

from ..hub.full_card import Adapter
from .figure import heat_map, styled
from .names import OUTSIDE, by_block, natural, shared_parts, split_name

#: Heads of panels, and whether they hold shares, by what rows tell.
PANELS = {"rank": ("rank of the update", False), "kept_energy": ("share of the energy that folding kept", True)}


@styled
def draw_adapters(adapters: Mapping[str, Adapter], title: Optional[str], widths: Mapping[str, int]) -> Figure:
    """A column of panels per adapter: ranks, and below them kept energies where it was folded."""
    tables = {}
    for name, adapter in adapters.items():
        rows = adapter.config.module_rows(adapter.shapes)
        tables[name] = {key: grid(rows, key) for key in PANELS if any(key in row for row in rows)}
    most = max(map(len, tables.values()))
    sizes = [(len(columns), len(blocks)) for own in tables.values() for blocks, columns, _ in own.values()]
    wide, high = (max(numbers) for numbers in zip(*sizes, strict=True))
    figure = Figure(figsize=((3.5 + 0.6 * wide) * len(tables), (3.2 + 0.36 * high) * most), layout="constrained")
    axes = figure.subplots(most, len(tables), squeeze=False)
    for column, (name, own) in zip(axes.T, tables.items(), strict=True):
        for axis in column[len(own) :]:
            axis.set_visible(False)
        for axis, (key, (blocks, columns, values)) in zip(column, own.items(), strict=False):
            label, percent = PANELS[key]
            heat_map(figure, axis, values, blocks, columns, "kept" if percent else "rank", percent)
            axis.set_title(f"{name}: {label}{' (%)' if percent else ''}", wrap=True)
    if title:
        figure.suptitle(title)
    return figure


def grid(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[str], list[str], list[list[Optional[float]]]]:
    """What rows tell under a key, by block and kind of module: names of blocks, kinds, and values."""
    shared = shared_parts(row["module"] for row in rows)
    found = {split_name(row["module"], shared): row[key] for row in rows if key in row}
    blocks = sorted({block for block, _ in found}, key=by_block)
    within = {kind for block, kind in found if block}
    kinds = sorted({kind for _, kind in found}, key=lambda kind: (kind not in within, natural(kind)))
    values = [[found.get((block, kind)) for kind in kinds] for block in blocks]
    return [block or OUTSIDE for block in blocks], kinds, values
