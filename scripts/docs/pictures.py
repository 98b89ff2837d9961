"""The report's pictures: convergence, score against trained parameters, learned architectures.

A picture's data is all that its drawing takes, as plain dicts, lists, numbers and texts: a file holds their digest, so
that it can be told whether it is drawn from these results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from PIL import Image

from peft_learners.cli import architecture as kept_updates
from scripts.bench import plot as plot_bench  # chooses matplotlib's backend
from scripts.docs.runs import Results, task_label
from scripts.docs.scores import LAYOUTS, Layout, listed
from scripts.sweep import store
from scripts.sweep.plan import PROTOCOLS, VARIANTS

from matplotlib import pyplot as plt  # isort: skip
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter  # isort: skip

COLOURS = (*(f"C{number}" for number in range(10)), "black", "gold")
MARKERS = "os^vDP*Xp<>hd8"
#: Protocols whose scores over seeds are medians.
MEDIANS = frozenset(layout.protocol for layout in LAYOUTS.values() if layout.medians)
#: Whose learned architectures are drawn.
SEARCHED = ("u_bitfit18", "s_bitfit18", "u_mam100", "s_mam100")
#: Of all pictures that there can be.
NAMES = (
    "scores",
    *(f"convergence-{protocol}" for protocol in PROTOCOLS),
    *(f"architecture-{name}" for name in SEARCHED),
)
#: Keyword under which a file says what it was drawn from.
KEYWORD = "Data-SHA256"
Metadata = Mapping[str, str]


@dataclass(frozen=True)
class Picture:
    """A picture, `sweep-NAME.png`.

    Attributes:
        caption: what it shows.
        data: all that the drawing takes.
        paint: draws the data into a file and writes texts into it.
    """

    name: str
    caption: str
    data: dict[str, Any]
    paint: Callable[[dict[str, Any], Path, Metadata], None]

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"sweep-{self.name}.png"

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal digits, of the name and the data as JSON, in their order and with nine digits."""
        text = json.dumps(_canonical([self.name, self.data]), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def draw(self, folder: Path) -> Path:
        """Draw it into its file; returns the path."""
        path = folder / self.file
        self.paint(self.data, path, {KEYWORD: self.digest})
        return path

    def is_drawn(self, folder: Path) -> bool:
        """Whether its file is there, whole, and drawn from the same data."""
        try:
            with Image.open(folder / self.file) as image:
                image.load()
                return image.info.get(KEYWORD) == self.digest
        except (OSError, SyntaxError, ValueError):
            return False


def _canonical(value: Any) -> Any:
    """Nine digits are as many as can be seen, and the same whatever way a mean was summed up."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- what they show ------------------------------------------------------------------------------------------------


def pictures(results: Results) -> Iterator[Picture]:
    """The pictures that there are runs for."""
    if panels := dict(filter(None, (_panel(results, layout) for layout in LAYOUTS.values()))):
        yield Picture(
            "scores", "Average score against trained parameters, by protocol", {"panels": panels}, draw_scores
        )
    for protocol, recipe in PROTOCOLS.items():
        if names := [name for name in results.shown(protocol) if VARIANTS[name].core]:
            caption = f"Score on dev and training loss by epoch: {recipe.label}"
            data = convergence(results, protocol, names)
            yield Picture(f"convergence-{protocol}", caption, data, draw_convergence)
    yield from filter(None, (architecture(results, variant) for variant in SEARCHED))


def curve_of(records: pd.Series, value: Callable[[Mapping], float | None], medians: bool) -> list[tuple[float, float]]:
    """`(epoch, mean or median over the runs)` of the epochs in which all runs have a value."""
    columns = [
        pd.Series({row["epoch"]: value(row) for row in record["epochs"] if row["epoch"] is not None}, dtype=float)
        for record in records
    ]
    found = pd.concat(columns, axis="columns").dropna().sort_index()
    return list((found.median(axis="columns") if medians else found.mean(axis="columns")).items())


def style_of(variant: str) -> dict[str, str]:
    """A colour per method and a marker per variant of it, the same in all pictures."""
    methods = list(dict.fromkeys(other.method for other in VARIANTS.values()))
    method = VARIANTS[variant].method
    alike = [name for name, other in VARIANTS.items() if other.method == method]
    return {
        "color": COLOURS[methods.index(method) % len(COLOURS)],
        "marker": MARKERS[alike.index(variant) % len(MARKERS)],
    }


def _seeds(protocol: str, seeds: Collection[int]) -> str:
    """How many seeds stand behind what is shown, and whether what is shown of several is their medians."""
    number = f"{min(seeds)}" if len({*seeds}) == 1 else f"{min(seeds)} to {max(seeds)}"
    middle = "medians, " if protocol in MEDIANS and {*seeds} != {1} else ""
    return f"{middle}{number} seed{'' if {*seeds} == {1} else 's'}"


def convergence(results: Results, protocol: str, names: Collection[str]) -> dict[str, Any]:
    """Score on dev and training loss of methods, over the seeds what the protocol's table gives of them."""
    panels: dict[str, list[dict[str, Any]]] = {}
    seeds = []
    for task in results.tasks(protocol):
        for name in names:
            records = results.of(protocol, task, name).record
            if records.empty:
                continue
            seeds.append(len(records))
            line = {
                "label": VARIANTS[name].label,
                "style": style_of(name),
                "score": curve_of(records, partial(store.score, task=task, prefix="eval_"), protocol in MEDIANS),
                "loss": curve_of(records, lambda row: row["train_loss"], protocol in MEDIANS),
            }
            panels.setdefault(task_label(task), []).append(line)
    return {"title": f"{PROTOCOLS[protocol].label} ({_seeds(protocol, seeds)})", "panels": panels}


def _panel(results: Results, layout: Layout) -> tuple[str, list[dict[str, Any]]] | None:
    """A protocol's title, and its methods' average score, its standard error (None: not known) and what they train in
    their first and last phase; None if no method has an average."""
    tasks, found = results.averages(layout.protocol)
    points, seeds = [], []
    for name, scores in found.items():
        scores, trained = scores.dropna(), results.trained(name, (layout.protocol,))
        if trained is not None:
            seeds.append(len(scores))
            points.append(
                {
                    "label": VARIANTS[name].label,
                    "style": style_of(name),
                    "score": scores.median() if layout.medians else scores.mean(),
                    "error": None if layout.medians or len(scores) < 2 else scores.sem(),
                    "first": trained[0],
                    "last": trained[1],
                }
            )
    if not points:
        return None
    where = f"{listed([task_label(task) for task in tasks])} ({_seeds(layout.protocol, seeds)})"
    return f"{PROTOCOLS[layout.protocol].label}\n{where}", points


def architecture(results: Results, variant: str) -> Picture | None:
    """What a variant's runs by the NAS recipe kept, their mean; None if no record tells."""
    found = {
        (run.task, run.seed): _recorded(run.record["architecture"])
        for run in results.of("nas", variant=variant).itertuples()
        if run.record.get("architecture")
    }
    if not found:
        return None
    table = kept_updates.average({f"{variant} on {task}, seed {s}": kept for (task, s), kept in found.items()})
    tasks = listed([task_label(task) for task in dict.fromkeys(task for task, _ in found)])
    label = f"{VARIANTS[variant].label} on {tasks} ({len(found)} run{'s' if len(found) > 1 else ''})"
    data = {"title": f"{label}\n{kept_updates.title_of(table)}", "table": asdict(table)}
    caption = f"What {label} kept, by block and module"
    return Picture(f"architecture-{variant}", caption, data, draw_architecture)


def _recorded(found: Mapping[str, Any]) -> SimpleNamespace:
    """What a record says of an architecture, as `peft_learners.cli.architecture.average` takes it."""
    return SimpleNamespace(granularity=found["granularity"], budget=found["budget"], rows=lambda: found["rows"])


# -- how they are drawn --------------------------------------------------------------------------------------------


def draw_convergence(shown: dict[str, Any], path: Path, metadata: Metadata) -> None:
    """Draw score on dev and training loss by epoch, a column per task."""
    panels = shown["panels"]
    size = (max(8.0, 3.2 * len(panels) + 2.4), 5.4)
    figure, grid = plt.subplots(2, len(panels), squeeze=False, sharex=True, figsize=size, layout="constrained")
    labelled: dict[str, Any] = {}
    for (above, below), (task, lines) in zip(grid.T, panels.items(), strict=True):
        for line in lines:
            for panel, curve in ((above, line["score"]), (below, line["loss"])):
                if curve:
                    at, values = zip(*curve, strict=True)
                    (drawn,) = panel.plot(at, values, markersize=4, label=line["label"], **line["style"])
                    labelled.setdefault(line["label"], drawn)
        above.set_title(task, fontsize=10)
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].set_ylabel("score on dev")
    grid[1, 0].set_ylabel("training loss")
    figure.legend(labelled.values(), labelled.keys(), fontsize=8, loc="outside right center")
    figure.suptitle(shown["title"], fontsize=11)
    plot_bench.save(figure, path, metadata)


def draw_scores(shown: dict[str, Any], path: Path, metadata: Metadata) -> None:
    """Draw scores against trained parameters. A line leads to what a method of several phases trains in its first."""
    count = len(shown["panels"])
    size = (4.2 * count + 2.4, 5.2)
    figure, panels = plt.subplots(1, count, squeeze=False, sharey=True, figsize=size, layout="constrained")
    labelled: dict[str, Any] = {}
    for panel, (title, points) in zip(panels[0], shown["panels"].items(), strict=True):
        for point in points:
            score, ends = point["score"], [point["first"], point["last"]]
            panel.plot(ends, [score] * 2, color="0.85", linewidth=1, zorder=0)
            drawn = panel.errorbar(
                point["last"], score, yerr=point["error"], linestyle="", markersize=6, **point["style"]
            )
            labelled.setdefault(point["label"], drawn)
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


def draw_architecture(shown: dict[str, Any], path: Path, metadata: Metadata) -> None:
    """Draw a table of shares kept."""
    table = kept_updates.Table(**shown["table"])
    plot_bench.save(kept_updates.draw(table, shown["title"]), path, metadata)
