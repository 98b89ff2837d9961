"""Tables of scores: each protocol's, beside the paper's own numbers, and the headline of both protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from scripts.docs.pages import Lines, markdown
from scripts.docs.runs import FULL, LORA, Papers, Results, common_phrases, deviations, task_label
from scripts.sweep.plan import ALL_TASKS, PROTOCOLS, VARIANTS

#: Of a cell that nothing stands behind.
MISSING = "\N{EN DASH}"
#: Marks a learning rate that the search has not passed on both sides.
OPEN = "†"
NOTHING: Lines = ["No finished runs yet."]


def number(values: pd.Series, medians: bool = False, signed: bool = False) -> str:
    """A cell of values by seed: `mean ± standard error (n seeds)`, or the median.

    Args:
        values: by seed; those that are no numbers don't count.
        medians: whether to give the median.
        signed: whether the values are paired differences: with their sign, and the word "tie" where the mean is
            smaller than its own error. One seed can't tell.
    """
    values = values.dropna()
    if values.empty:
        return MISSING
    centre, count = values.median() if medians else values.mean(), len(values)
    text = f"{round(centre, 1) + 0.0:+.1f}" if signed else f"{centre:.1f}"  # no minus before a zero
    if count == 1:
        return f"{text} (one seed)"
    if medians:
        return f"{text} (median of {count} {'pairs' if signed else 'seeds'})"
    error = values.sem()
    tie = ", tie" if signed and (abs(centre) < error or centre == 0) else ""
    return f"{text} ± {error:.1f} ({count} seeds){tie}"


def short_number(values: pd.Series) -> str:
    """As `number`, with the number of seeds alone in the brackets."""
    if values.empty:
        return MISSING
    return f"{values.mean():.1f}{f' ± {values.sem():.1f}' if len(values) > 1 else ''} ({len(values)})"


def uniform_peer(variant: str) -> str | None:
    """What NAS-LoRA's search is held against: the same parameters without a search. None for other methods."""
    if not VARIANTS[variant].searches:
        return None
    return "bitfit" if VARIANTS[variant].arguments["r"] == 0 else "mam8"


@dataclass(frozen=True)
class Layout:
    """A protocol's tables.

    Attributes:
        paper: whose numbers stand beside, and from which of its tables.
        references: what a variant is compared with, by the head of the column; not with itself.
        rates: whether a column has the learning rate, because it is not the same for all methods.
        medians: whether scores over seeds, and their paired differences, are medians, as in that paper.
    """

    protocol: str
    paper: tuple[str, ...]
    references: Mapping[str, Callable[[str], str | None]]
    rates: bool = False
    medians: bool = False

    def cells(self, variant: str, values: Callable[[str], pd.Series]) -> dict[str, str]:
        """A row's differences, paired by seed.

        Args:
            values: gives a variant's values by seed.
        """
        others = {head: reference(variant) for head, reference in self.references.items()}
        return {
            head: ""
            if other is None or other == variant
            else number(values(variant) - values(other), self.medians, signed=True)
            for head, other in others.items()
        }


_TO_FULL = {f"to {VARIANTS[FULL].label}": lambda variant: FULL}
_TO_BOTH = {**_TO_FULL, f"to {VARIANTS[LORA].label}": lambda variant: LORA}
LAYOUTS = {
    "table2-paper": Layout("paper", ("learners", "table2"), _TO_BOTH),
    "table2-tuned": Layout("tuned", ("learners", "table2"), _TO_BOTH, rates=True),
    "nas": Layout(
        "nas", ("nas", "table1", "table2"), {**_TO_FULL, "to BitFit or MaM": uniform_peer}, rates=True, medians=True
    ),
}


def rate_text(lr: float) -> str:
    """A learning rate without needless zeros: 3e-5."""
    mantissa, exponent = f"{lr:.0e}".split("e")
    return mantissa if int(exponent) == 0 else f"{mantissa}e{int(exponent)}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def task_table(results: Results, papers: Papers, layout: Layout, task: str) -> Lines:
    """One task's methods."""
    protocol, theirs = layout.protocol, papers.rows(*layout.paper)
    cells = results.of(protocol, task)
    # What searches first trains for longer: it is the exception, also where most rows are of its kind.
    usual = cells[[not VARIANTS[name].searches for name in cells.variant]]
    common = common_phrases((cells if usual.empty else usual).record)
    rows = []
    for name, own in cells.groupby("variant", sort=False):
        others = deviations(own.record, common)
        record, paper, lost = own.record.iloc[0], papers.score(theirs.get(name), task), int(own.score.isna().sum())
        open_end = f" {OPEN}" if protocol == "tuned" and not results.is_searched(task, name) else ""
        rate = {"learning rate": rate_text(own.lr.iloc[0]) + open_end} if layout.rates else {}
        rows.append(
            {
                "": VARIANTS[name].label + (f" ({', '.join(others)})" if others else ""),
                "trained": f"{record['parameters']['trained_last_phase']:,}",
                **rate,
                "score": number(own.score, layout.medians) + (f", {lost} without a value" if lost else ""),
                **layout.cells(name, lambda variant: results.scores(protocol, task, variant)),
                f"paper, {papers.model(layout.paper[0])}": MISSING if paper is None else f"{paper:.1f}",
            }
        )
    epochs = f"{papers.epochs(layout.paper[0], task):g} epochs"
    size = {**common, "epochs": common["epochs"] + ("" if common["epochs"] == epochs else f" (paper: {epochs})")}
    return [f"**{task_label(task)}**: {', '.join(size.values())}", "", *markdown(pd.DataFrame(rows)), ""]


def average_table(results: Results, papers: Papers, layout: Layout) -> Lines:
    """Averages over the tasks; none if there is but one."""
    tasks, averages = results.averages(layout.protocol)
    if len(tasks) < 2:
        return []
    theirs = papers.rows(*layout.paper)
    rows = []
    for name, own in averages.items():
        row, trained = theirs.get(name), results.trained(name, (layout.protocol,))
        same = [score for task in tasks if (score := papers.score(row, task)) is not None]
        rows.append(
            {
                "": VARIANTS[name].label,
                "trained": f"{trained[1]:,}" if trained else MISSING,
                "average": number(own, layout.medians),
                **layout.cells(name, lambda variant: averages.get(variant, pd.Series(dtype=float))),
                "paper, same tasks": f"{fmean(same):.1f}" if len(same) == len(tasks) else MISSING,
                "paper, all tasks": f"{row['average']:.1f}" if row else MISSING,
            }
        )
    return [f"**Average of {listed([task_label(task) for task in tasks])}**", "", *markdown(pd.DataFrame(rows)), ""]


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
    rows = []
    for name in main:
        trained = results.trained(name, both)
        cells = {
            task_label(t): " / ".join(short_number(results.scores(protocol, t, name)) for protocol in both)
            for t in tasks
        }
        rows.append({"": VARIANTS[name].label, "trained": f"{trained[1]:,}" if trained else MISSING, **cells})

    def sizes(protocol: str, task: str, split: str) -> str:
        """The number of rows that the runs of a column had; several where they differ."""
        records = results.of(protocol, task)[lambda found: found.variant.isin(main)].record
        return " or ".join(dict.fromkeys(f"{record['rows'][split]:,}" for record in records)) or MISSING

    for split in ("train", "dev"):
        cells = {task_label(t): " / ".join(sizes(protocol, t, split) for protocol in both) for t in tasks}
        rows.append({"": f"*{split} rows*", "trained": "", **cells})
    caption = (
        f"Score on dev, mean ± standard error (seeds): {PROTOCOLS['paper'].label} / {PROTOCOLS['tuned'].label}. "
        "A score is the mean of the task's metrics, times 100."
    )
    return [caption, "", *markdown(pd.DataFrame(rows))]
