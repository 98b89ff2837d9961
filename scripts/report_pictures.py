"""The report's pictures: convergence, and score against trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import plot_bench  # chooses matplotlib's backend
import sweep_store
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from report_runs import Record, Results, task_label
from report_scores import average_tasks, listed
from report_statistics import estimate
from sweep_plan import PROTOCOLS, VARIANTS

COLOURS = (*(f"C{number}" for number in range(10)), "black", "gold")
MARKERS = "os^vDP*Xp"
Draw = Callable[[Results, Path], None]
Curve = list[tuple[float, float]]
SCORED = ("paper", "tuned", "nas")
#: Of all pictures that there can be.
NAMES = ("scores", *(f"convergence-{protocol}" for protocol in PROTOCOLS))


def curve_of(records: Sequence[Record], value: Callable[[Mapping], float | None]) -> Curve:
    """`(epoch, mean over the runs)` of the epochs in which all runs have a value."""
    found: dict[float, list[float]] = {}
    for record in records:
        for row in record["epochs"]:
            if (number := value(row)) is not None and row["epoch"] is not None:
                found.setdefault(row["epoch"], []).append(number)
    return sorted((epoch, fmean(values)) for epoch, values in found.items() if len(values) == len(records))


def main_variants(results: Results, protocol: str) -> list[str]:
    """The main methods that have a finished cell."""
    return [name for name in results.shown(protocol) if VARIANTS[name].core]


def style_of(variant: str) -> dict[str, str]:
    """A colour per method and a marker per variant of it, the same in all pictures."""
    methods = list(dict.fromkeys(other.method for other in VARIANTS.values()))
    method = VARIANTS[variant].method
    alike = [name for name, other in VARIANTS.items() if other.method == method]
    return {
        "color": COLOURS[methods.index(method) % len(COLOURS)],
        "marker": MARKERS[alike.index(variant) % len(MARKERS)],
    }


def draw_convergence(results: Results, path: Path, protocol: str) -> None:
    """Score on dev and training loss by epoch, a column per task, means over the seeds."""
    names = main_variants(results, protocol)
    tasks = [task for task in results.tasks(protocol) if any(results.cell(protocol, task, name) for name in names)]
    width = max(8.0, 3.2 * len(tasks) + 2.4)
    figure, grid = plt.subplots(2, len(tasks), squeeze=False, sharex=True, figsize=(width, 5.4), layout="constrained")
    labelled: dict[str, Any] = {}
    for column, task in enumerate(tasks):
        measures: tuple[Callable[[Mapping], float | None], ...] = (
            partial(sweep_store.score, task=task, prefix="eval_"),
            lambda row: row["train_loss"],
        )
        for panel, measure in zip(grid[:, column], measures, strict=True):
            for name in names:
                if curve := curve_of(list(results.cell(protocol, task, name).values()), measure):
                    label = VARIANTS[name].label
                    (line,) = panel.plot(*zip(*curve, strict=True), markersize=4, label=label, **style_of(name))
                    labelled.setdefault(label, line)
        grid[0, column].set_title(task_label(task), fontsize=10)
        grid[1, column].set_xlabel("epoch")
        grid[1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].set_ylabel("score on dev")
    grid[1, 0].set_ylabel("training loss")
    figure.legend(labelled.values(), labelled.keys(), fontsize=8, loc="outside right center")
    figure.suptitle(_title(results, protocol, tasks, names), fontsize=11)
    plot_bench.save(figure, path)


def _title(results: Results, protocol: str, tasks: Sequence[str], names: Sequence[str]) -> str:
    seeds = {len(cell) for task in tasks for name in names if (cell := results.cell(protocol, task, name))}
    number = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return f"{PROTOCOLS[protocol].label} ({number} seed{'' if seeds == {1} else 's'})"


def draw_scores(results: Results, path: Path) -> None:
    """Average score against trained parameters, a panel per protocol, with standard errors. A line leads to what a
    method of several phases trains in its first."""
    protocols = [protocol for protocol in SCORED if average_tasks(results, protocol)]
    figure, panels = plt.subplots(
        1, len(protocols), squeeze=False, figsize=(4.2 * len(protocols) + 2.4, 5.2), layout="constrained"
    )
    labelled: dict[str, Any] = {}
    for panel, protocol in zip(panels[0], protocols, strict=True):
        tasks, shown = average_tasks(results, protocol), []
        for name in results.shown(protocol):
            found = estimate(results.averages(protocol, tasks, name).values())
            trained = results.trained(name, (protocol,))
            if found is None or trained is None:
                continue
            first, last = trained
            panel.plot([first, last], [found.mean] * 2, color="0.85", linewidth=1, zorder=0)
            point = panel.errorbar(last, found.mean, yerr=found.error, linestyle="", markersize=6, **style_of(name))
            labelled.setdefault(VARIANTS[name].label, point)
            shown.append(name)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("trained parameters in the last phase")
        names = listed([task_label(task) for task in tasks])
        panel.set_title(f"{_title(results, protocol, tasks, shown)}\n{names}", fontsize=8)
    panels[0][0].set_ylabel("average score on dev")
    figure.legend(labelled.values(), labelled.keys(), fontsize=7, loc="outside right center")
    plot_bench.save(figure, path)


def pictures(results: Results) -> Iterator[tuple[str, str, Draw]]:
    """`(name, what it shows, how it is drawn)` of the pictures that there are runs for; each is `sweep-NAME.png`."""
    if any(average_tasks(results, protocol) for protocol in SCORED):
        yield "scores", "Average score against trained parameters, by protocol", draw_scores
    for protocol in PROTOCOLS:
        if main_variants(results, protocol):
            what = f"Score on dev and training loss by epoch: {PROTOCOLS[protocol].label}"
            yield f"convergence-{protocol}", what, partial(draw_convergence, protocol=protocol)


def file_of(name: str) -> str:
    """Name of a picture's file."""
    return f"sweep-{name}.png"
