"""Tables of scores: each protocol's, beside the paper's own numbers, and the one in README."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from scripts.bench.tables import Lines, markdown
from scripts.docs.runs import ALL_TASKS, FULL, LORA, Papers, Results, common_phrases, deviations, task_label
from scripts.docs.statistics import (
    MISSING,
    difference_cell,
    estimate,
    median_cell,
    median_difference_cell,
    paired_differences,
    score_cell,
    short_cell,
)
from scripts.sweep.plan import PROTOCOLS, VARIANTS

#: Marks a learning rate that the search has not passed on both sides.
OPEN = "†"
NOTHING: Lines = ["No finished runs yet."]


@dataclass(frozen=True)
class Layout:
    """A protocol's tables.

    Attributes:
        paper: whose numbers stand beside, and from which of its tables.
        references: what a variant is compared with, by the head of the column; not with itself.
        rates: whether a column has the learning rate, because it is not the same for all methods.
        medians: whether scores over seeds, and their paired differences, are medians, as in that paper; else they are
            means with standard errors.
    """

    protocol: str
    paper: tuple[str, ...]
    references: Mapping[str, Callable[[str], str | None]]
    rates: bool = False
    medians: bool = False

    def text(self, values: Collection[float]) -> str:
        """A cell of scores by seed: the mean with its error, or the median."""
        return median_cell(values) if self.medians else score_cell(estimate(values))

    def difference_text(self, ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
        """A cell of the difference between scores by seed: of the paired differences, what `text` gives of scores."""
        found = paired_differences(ours, theirs)
        return median_difference_cell(found) if self.medians else difference_cell(estimate(found))

    def centre(self, values: Collection[float]) -> tuple[float, float | None] | None:
        """The mean and its standard error (None with one seed), or the median and no error; None of no values."""
        if self.medians:
            return (median(values), None) if values else None
        found = estimate(values)
        return (found.mean, found.error) if found else None


def uniform_peer(variant: str) -> str | None:
    """What NAS-LoRA's search is held against: the same parameters without a search. None for other methods."""
    if not VARIANTS[variant].searches:
        return None
    return "bitfit" if VARIANTS[variant].arguments["r"] == 0 else "mam8"


_TO_FULL = {f"to {VARIANTS[FULL].label}": lambda variant: FULL}
_TO_BOTH = {**_TO_FULL, f"to {VARIANTS[LORA].label}": lambda variant: LORA}
LAYOUTS = {
    "table2-paper": Layout("paper", ("learners", "table2"), _TO_BOTH),
    "table2-tuned": Layout("tuned", ("learners", "table2"), _TO_BOTH, rates=True),
    "nas": Layout(
        "nas",
        ("nas", "table1", "table2"),
        {**_TO_FULL, "to BitFit or MaM": uniform_peer},
        rates=True,
        medians=True,
    ),
}


def rate_text(lr: float) -> str:
    """A learning rate without needless zeros: 3e-5."""
    mantissa, exponent = f"{lr:.0e}".split("e")
    return mantissa if int(exponent) == 0 else f"{mantissa}e{int(exponent)}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def label_of(results: Results, protocol: str, variant: str, common: Mapping[str, str], tasks: Sequence[str]) -> str:
    """A variant's label, with what of its runs' sizes is not the common one."""
    records = (record for task in tasks for record in results.cell(protocol, task, variant).values())
    others = deviations(records, common)
    return VARIANTS[variant].label + (f" ({', '.join(others)})" if others else "")


def averages(results: Results, protocol: str) -> tuple[list[str], dict[str, dict[int, float]]]:
    """The tasks that a protocol's averages are over, and each variant's by seed.

    The tasks are those in which all main variants share seeds, without those where they share fewer than in two
    others; the seeds are those that the main variants share in all of them: so their averages and the differences
    between them are of the same runs.
    """
    main = [name for name in results.shown(protocol) if VARIANTS[name].core]
    if not main:
        return [], {}
    shared = {task: set.intersection(*(set(results.scores(protocol, task, n)) for n in main)) for task in ALL_TASKS}
    second_most = sorted((len(seeds) for seeds in shared.values()), reverse=True)[1]
    tasks = [task for task, seeds in shared.items() if len(seeds) >= max(1, second_most)]
    seeds = set.intersection(*(shared[task] for task in tasks)) if tasks else set()
    found = {}
    for name in results.shown(protocol):
        by_seed = {s: score for s, score in results.averages(protocol, tasks, name).items() if s in seeds}
        if by_seed:
            found[name] = by_seed
    return tasks, found


def score_text(results: Results, layout: Layout, task: str, variant: str) -> str:
    """A cell of scores; seeds whose metrics are no numbers are counted beside."""
    scores = results.scores(layout.protocol, task, variant)
    lost = len(results.cell(layout.protocol, task, variant)) - len(scores)
    return layout.text(scores.values()) + (f", {lost} without a value" if lost else "")


def differences_of(layout: Layout, variant: str, values: Callable[[str], Mapping[int, float]]) -> list[str]:
    """The cells of a row's differences, paired by seed."""
    cells = []
    for reference in layout.references.values():
        other = reference(variant)
        same = other is None or other == variant
        cells.append("" if same else layout.difference_text(values(variant), values(other or "")))
    return cells


def task_table(results: Results, papers: Papers, layout: Layout, task: str) -> Lines:
    """One task's methods."""
    protocol = layout.protocol
    variants = results.shown(protocol, (task,))
    # What searches first trains for longer: it is the exception, also where most rows are of its kind.
    usual = [name for name in variants if not VARIANTS[name].searches] or variants
    common = common_phrases(r for name in usual for r in results.cell(protocol, task, name).values())
    theirs = papers.rows(*layout.paper)
    head = ["", "trained", *(["learning rate"] if layout.rates else []), "score", *layout.references]
    body = []
    for name in variants:
        record = next(iter(results.cell(protocol, task, name).values()))
        paper = papers.score(theirs.get(name), task)
        body.append(
            [
                label_of(results, protocol, name, common, (task,)),
                f"{record['parameters']['trained_last_phase']:,}",
                *([rate_cell(results, protocol, task, name)] if layout.rates else []),
                score_text(results, layout, task, name),
                *differences_of(layout, name, lambda variant: results.scores(protocol, task, variant)),
                MISSING if paper is None else f"{paper:.1f}",
            ]
        )
    epochs = f"{papers.epochs(layout.paper[0], task):g} epochs"
    size = {**common, "epochs": common["epochs"] + ("" if common["epochs"] == epochs else f" (paper: {epochs})")}
    title = f"**{task_label(task)}**: {', '.join(size.values())}"
    return [title, "", *markdown([*head, f"paper, {papers.model(layout.paper[0])}"], body), ""]


def rate_cell(results: Results, protocol: str, task: str, variant: str) -> str:
    """The learning rate of a cell's runs, marked where it was chosen and the search goes on."""
    record = next(iter(results.cell(protocol, task, variant).values()))
    open_end = protocol == "tuned" and not results.is_searched(task, variant)
    return rate_text(record["config"]["learning_rate"]) + (f" {OPEN}" if open_end else "")


def average_table(results: Results, papers: Papers, layout: Layout) -> Lines:
    """Averages over the tasks; none if there is but one."""
    protocol = layout.protocol
    tasks, found = averages(results, protocol)
    if len(tasks) < 2:
        return []
    theirs = papers.rows(*layout.paper)
    head = ["", "trained", "average", *layout.references, "paper, same tasks", "paper, all tasks"]
    body = []
    for name, by_seed in found.items():
        row = theirs.get(name)
        same = [score for task in tasks if (score := papers.score(row, task)) is not None]
        trained = results.trained(name, (protocol,))
        body.append(
            [
                VARIANTS[name].label,
                f"{trained[1]:,}" if trained else MISSING,
                layout.text(by_seed.values()),
                *differences_of(layout, name, lambda variant: found.get(variant, {})),
                f"{fmean(same):.1f}" if len(same) == len(tasks) else MISSING,
                f"{row['average']:.1f}" if row else MISSING,
            ]
        )
    return [f"**Average of {listed([task_label(task) for task in tasks])}**", "", *markdown(head, body), ""]


def score_tables(results: Results, papers: Papers, layout: Layout) -> Lines:
    """A table of averages, and one per task."""
    tasks = results.tasks(layout.protocol)
    if not tasks:
        return NOTHING
    lines = average_table(results, papers, layout)
    lines += [line for task in tasks for line in task_table(results, papers, layout, task)]
    marked = any(line.endswith("|") and f" {OPEN} |" in line for line in lines)
    note = f"{OPEN} The best rate so far is at the end of the grid; what lies beyond is not trained yet."
    return [*lines, note] if marked else lines[:-1]


def headline(results: Results) -> Lines:
    """The main methods in both protocols of the Learners paper, in one table."""
    both = ("paper", "tuned")
    main = [n for n in VARIANTS if VARIANTS[n].core and any(n in results.shown(protocol) for protocol in both)]
    tasks = [task for task in ALL_TASKS if any(task in results.tasks(protocol) for protocol in both)]
    if not main:
        return NOTHING
    body = []
    for name in main:
        trained = results.trained(name, both)
        cells = (
            " / ".join(short_cell(estimate(results.scores(protocol, task, name).values())) for protocol in both)
            for task in tasks
        )
        body.append([VARIANTS[name].label, f"{trained[1]:,}" if trained else MISSING, *cells])
    for split in ("train", "dev"):
        rows = (" / ".join(_rows_text(results, protocol, task, main, split) for protocol in both) for task in tasks)
        body.append([f"*{split} rows*", "", *rows])
    caption = (
        f"Score on dev, mean ± standard error (seeds): {PROTOCOLS['paper'].label} / {PROTOCOLS['tuned'].label}. "
        "A score is the mean of the task's metrics, times 100."
    )
    return [caption, "", *markdown(["", "trained", *(task_label(task) for task in tasks)], body)]


def _rows_text(results: Results, protocol: str, task: str, variants: Sequence[str], split: str) -> str:
    """The number of rows that the runs of a column had; several where they differ."""
    records = (record for name in variants for record in results.cell(protocol, task, name).values())
    return " or ".join(dict.fromkeys(f"{record['rows'][split]:,}" for record in records)) or MISSING
