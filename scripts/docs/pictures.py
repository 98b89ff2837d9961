"""Which pictures the report has and what they show: convergence, score against trained parameters, architectures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from PIL import Image

from scripts.docs import drawing as report_drawing
from scripts.docs.drawing import Convergence, Curve, Heatmap, Line, Metadata, Point, Scores
from scripts.docs.runs import ALL_TASKS, Record, Results, task_label
from scripts.docs.scores import LAYOUTS, Layout, averages, listed
from scripts.glue import plot_architecture
from scripts.sweep import store as sweep_store
from scripts.sweep.plan import PROTOCOLS, VARIANTS

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


@dataclass(frozen=True)
class Picture:
    """A picture, `sweep-NAME.png`.

    Attributes:
        caption: what it shows.
        data: a dataclass with all that the drawing takes; numbers, texts and lists of them.
        paint: draws the data into a file and writes texts into it.
    """

    name: str
    caption: str
    data: Any
    paint: Callable[[Any, Path, Metadata], None]

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"sweep-{self.name}.png"

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal digits, of the name and the data as JSON, in their order and with nine digits."""
        text = json.dumps(_canonical([self.name, asdict(self.data)]), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def draw(self, folder: Path) -> Path:
        """Draw it into its file; returns the path."""
        path = folder / self.file
        self.paint(self.data, path, {KEYWORD: self.digest})
        return path

    def is_drawn(self, folder: Path) -> bool:
        """Whether its file is there, whole, and drawn from the same data."""
        return _digest_in(folder / self.file) == self.digest


def _canonical(value: Any) -> Any:
    """Nine digits are as many as can be seen, and the same whatever way a mean was summed up."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest_in(path: Path) -> str | None:
    """What a picture's file was drawn from; None if it does not say, or is no whole picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(KEYWORD)
    except (OSError, SyntaxError, ValueError):
        return None


def curve_of(
    records: Sequence[Record], value: Callable[[Mapping], float | None], centre: Callable[[list[float]], float] = fmean
) -> Curve:
    """`(epoch, mean over the runs)` of the epochs in which all runs have a value; of several, `centre` in the place of
    the mean."""
    found: dict[float, list[float]] = {}
    for record in records:
        for row in record["epochs"]:
            if (number := value(row)) is not None and row["epoch"] is not None:
                found.setdefault(row["epoch"], []).append(number)
    return sorted((epoch, centre(values)) for epoch, values in found.items() if len(values) == len(records))


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


def _seeds(protocol: str, seeds: Collection[int]) -> str:
    """How many seeds stand behind what is shown, and whether what is shown of several is their medians."""
    number = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    middle = "medians, " if protocol in MEDIANS and seeds != {1} else ""
    return f"{middle}{number} seed{'' if seeds == {1} else 's'}"


def convergence(results: Results, protocol: str) -> Convergence:
    """Score on dev and training loss of the main methods, over the seeds what the protocol's table gives of them."""
    centre = median if protocol in MEDIANS else fmean
    names = main_variants(results, protocol)
    panels = {}
    for task in results.tasks(protocol):
        cells = {name: list(cell.values()) for name in names if (cell := results.cell(protocol, task, name))}
        score = partial(sweep_store.score, task=task, prefix="eval_")
        lines = [
            Line(
                VARIANTS[name].label,
                style_of(name),
                curve_of(cell, score, centre),
                curve_of(cell, lambda row: row["train_loss"], centre),
            )
            for name, cell in cells.items()
        ]
        if lines:
            panels[task_label(task)] = lines
    cells = [results.cell(protocol, task, name) for task in results.tasks(protocol) for name in names]
    seeds = _seeds(protocol, {len(cell) for cell in cells if cell})
    return Convergence(f"{PROTOCOLS[protocol].label} ({seeds})", panels)


def scores(results: Results) -> Scores:
    """Average score against trained parameters: what the tables of a protocol say."""
    return Scores(dict(panel for layout in LAYOUTS.values() if (panel := _panel(results, layout))))


def _panel(results: Results, layout: Layout) -> tuple[str, list[Point]] | None:
    """A protocol's title and points; None if no method has an average."""
    protocol = layout.protocol
    tasks, found = averages(results, protocol)
    points = {}
    for name, by_seed in found.items():
        centre, trained = layout.centre(by_seed.values()), results.trained(name, (protocol,))
        if centre and trained:
            points[name] = Point(VARIANTS[name].label, style_of(name), *centre, *trained)
    if not points:
        return None
    seeds = _seeds(protocol, {len(found[name]) for name in points})
    title = f"{PROTOCOLS[protocol].label}\n{listed([task_label(task) for task in tasks])} ({seeds})"
    return title, list(points.values())


def architecture(results: Results, variant: str) -> Picture | None:
    """What a variant's runs by the NAS recipe kept, their mean; None if no record tells."""
    cells = {task: results.cell("nas", task, variant) for task in ALL_TASKS}
    found = {
        (task, seed): plot_architecture.RecordedArchitecture.of(record)
        for task, cell in cells.items()
        for seed, record in cell.items()
        if record.get("architecture")
    }
    if not found:
        return None
    table = plot_architecture.average(
        {f"{variant} on {task}, seed {seed}": kept for (task, seed), kept in found.items()}
    )
    tasks = listed([task_label(task) for task in dict.fromkeys(task for task, _ in found)])
    label = f"{VARIANTS[variant].label} on {tasks} ({len(found)} run{'s' if len(found) > 1 else ''})"
    data = Heatmap(f"{label}\n{plot_architecture.title_of(table)}", table)
    caption = f"What {label} kept, by block and module"
    return Picture(f"architecture-{variant}", caption, data, report_drawing.draw_heatmap)


def pictures(results: Results) -> Iterator[Picture]:
    """The pictures that there are runs for."""
    if (shown := scores(results)).panels:
        yield Picture(
            "scores", "Average score against trained parameters, by protocol", shown, report_drawing.draw_scores
        )
    for protocol in PROTOCOLS:
        if main_variants(results, protocol):
            caption = f"Score on dev and training loss by epoch: {PROTOCOLS[protocol].label}"
            data = convergence(results, protocol)
            yield Picture(f"convergence-{protocol}", caption, data, report_drawing.draw_convergence)
    yield from filter(None, (architecture(results, variant) for variant in SEARCHED))
