"""How the report's pictures are drawn, from what they show and nothing else: no files, no statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from scripts.bench import plot as plot_bench  # chooses matplotlib's backend
from scripts.glue import plot_architecture

Curve = list[tuple[float, float]]
#: Colour and marker, as matplotlib takes them.
Style = Mapping[str, str]
#: Texts to be written into a picture's file, by keyword.
Metadata = Mapping[str, str]


@dataclass(frozen=True)
class Line:
    """A method on a task: `(epoch, value)` of the score on dev and of the training loss."""

    label: str
    style: Style
    score: Curve
    loss: Curve


@dataclass(frozen=True)
class Convergence:
    """Methods by task."""

    title: str
    panels: Mapping[str, Sequence[Line]]


@dataclass(frozen=True)
class Point:
    """A method's score, its standard error (None: not known), and what it trains in its first and last phase."""

    label: str
    style: Style
    score: float
    error: float | None
    first: int
    last: int


@dataclass(frozen=True)
class Scores:
    """Methods by title of their panel."""

    panels: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Heatmap:
    """What a search kept."""

    title: str
    table: plot_architecture.Table


def draw_convergence(shown: Convergence, path: Path, metadata: Metadata) -> None:
    """Draw score on dev and training loss by epoch, a column per task."""
    width = max(8.0, 3.2 * len(shown.panels) + 2.4)
    figure, grid = plt.subplots(
        2, len(shown.panels), squeeze=False, sharex=True, figsize=(width, 5.4), layout="constrained"
    )
    labelled: dict[str, Any] = {}
    for (above, below), (task, lines) in zip(grid.T, shown.panels.items(), strict=True):
        for line in lines:
            for panel, curve in ((above, line.score), (below, line.loss)):
                if curve:
                    (drawn,) = panel.plot(*zip(*curve, strict=True), markersize=4, label=line.label, **line.style)
                    labelled.setdefault(line.label, drawn)
        above.set_title(task, fontsize=10)
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].set_ylabel("score on dev")
    grid[1, 0].set_ylabel("training loss")
    figure.legend(labelled.values(), labelled.keys(), fontsize=8, loc="outside right center")
    figure.suptitle(shown.title, fontsize=11)
    plot_bench.save(figure, path, metadata)


def draw_scores(shown: Scores, path: Path, metadata: Metadata) -> None:
    """Draw scores against trained parameters. A line leads to what a method of several phases trains in its first."""
    figure, panels = plt.subplots(
        1,
        len(shown.panels),
        squeeze=False,
        sharey=True,
        figsize=(4.2 * len(shown.panels) + 2.4, 5.2),
        layout="constrained",
    )
    labelled: dict[str, Any] = {}
    for panel, (title, points) in zip(panels[0], shown.panels.items(), strict=True):
        for point in points:
            panel.plot([point.first, point.last], [point.score] * 2, color="0.85", linewidth=1, zorder=0)
            drawn = panel.errorbar(
                point.last, point.score, yerr=point.error, linestyle="", markersize=6, **point.style
            )
            labelled.setdefault(point.label, drawn)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("trained parameters in the last phase")
        panel.tick_params(axis="x", labelsize=8)
        panel.set_title(title, fontsize=8)
    panels[0][0].set_ylabel("average score on dev")
    figure.legend(labelled.values(), labelled.keys(), fontsize=7, loc="outside right center")
    plot_bench.save(figure, path, metadata)


def draw_heatmap(shown: Heatmap, path: Path, metadata: Metadata) -> None:
    """Draw a table of shares kept."""
    plot_architecture.draw(shown.table, path, shown.title, metadata)
