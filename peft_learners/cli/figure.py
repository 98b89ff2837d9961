"""What the pictures share: heat maps by block and kind of module, and how a picture becomes a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from . import CommandError
from .names import OUTSIDE, short_names

CELL = 10
#: Decorator of what draws: fonts that are readable at half size.
styled = matplotlib.rc_context({"font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12})


def heat_map(
    figure: Figure,
    axis: Any,
    values: Sequence[Sequence[Optional[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    percent: bool,
) -> None:
    """Draw numbers by block and kind of module, each with its value in the cell.

    Args:
        values: by row and column; None where there is nothing.
        rows: names of blocks, and `OUTSIDE`.
        label: of the colours.
        percent: whether the values are shares.
    """
    cells = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    axis.set_facecolor("0.9")  # shows where there is nothing
    # Small shares would all look alike on a scale up to 100 %.
    top = float(np.nanmax(cells)) or 1.0
    picture = axis.imshow(cells, cmap="viridis", vmin=0.0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            shown = f"{100 * value:.{1 if 0 < value < 0.095 else 0}f}" if percent else f"{value:g}"
            color = "black" if value > 0.6 * top else "white"
            axis.text(column, row, shown, ha="center", va="center", fontsize=CELL, color=color)
    blocks = [row for row in rows if row != OUTSIDE]
    axis.set_yticks(range(len(rows)), [*(short_names(blocks) if blocks else []), *rows[len(blocks) :]])
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_xlabel("module")
    axis.set_ylabel("block")
    ticks: dict[str, Any] = {"ticks": MaxNLocator(integer=True)}
    if percent:
        ticks = {"format": PercentFormatter(1.0, decimals=0 if top > 0.05 else 1)}
    figure.colorbar(picture, ax=axis, label=label, **ticks)


def save(figure: Figure, path: Path) -> None:
    """Write a picture into a file, of the kind that its ending says."""
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise CommandError(f"`out=` must end in .png, .svg or .pdf, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
