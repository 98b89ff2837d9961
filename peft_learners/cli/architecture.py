"""A heat map of the architectures that NAS-LoRA adapters learned: which updates were kept, block by block.

A row is a block of the model (the last one, what lies outside the blocks), a column an update of one kind of module
within a block, and the colour which share of its parameters was kept, averaged over the adapters: other tasks, other
seeds, the same search space. So are the learned architectures shown in arXiv 2305.16597, figure 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from matplotlib.figure import Figure

from ..hub.full_card import Adapter
from ..nas_lora import Architecture
from . import CommandError
from .figure import heat_map, styled
from .names import OUTSIDE, by_block, natural, shared_parts, split_name

LABELS = {"low_rank": "low-rank", "bias": "bias"}


class Column(NamedTuple):
    """One kind of update in every block: a module's name within its block, and "low_rank" or "bias"."""

    module: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Shares kept, averaged over adapters.

    Attributes:
        granularity: "structured" or "unstructured", the same for all adapters.
        space: parameters of the search space.
        budgets: of the adapters, in parameters.
        rows: names of the blocks, and `OUTSIDE` if something lies there.
        columns: low-rank updates before biases, and last what no block has.
        shares: by row and column: the mean over adapters of the share of the parameters that is kept; None where a
            block has no such update.
    """

    granularity: str
    space: int
    budgets: list[int]
    rows: list[str]
    columns: list[Column]
    shares: list[list[Optional[float]]]


def read_architecture(adapter: Adapter) -> Architecture:
    """The architecture of a saved adapter, without its positions.

    Raises:
        ValueError: it was saved before its last pruning.
    """
    config: Any = adapter.config
    if not config.phases_complete:
        raise CommandError(
            f"{adapter.folder} was saved in its search ({config.pruned_rounds} of rounds={config.rounds} over), so "
            "its architecture is not what is kept in the end. Save the adapter after its last search."
        )
    return Architecture.of(config, {})


def average(architectures: Mapping[str, Any]) -> Table:
    """The table of several architectures of one search space.

    Args:
        architectures: with `granularity`, `budget` and `rows()`; by what an error calls them.

    Raises:
        ValueError: other granularities or search spaces.
    """
    (first, reference), *others = architectures.items()
    sizes = _sizes(reference)
    for name, other in others:
        if other.granularity != reference.granularity:
            raise CommandError(
                f"Adapters of one granularity can be averaged, but {first} is {reference.granularity} and {name} is "
                f"{other.granularity}."
            )
        _check_same(first, sizes, name, _sizes(other))
    rows = [row for architecture in architectures.values() for row in architecture.rows()]
    shared = shared_parts(str(row["module"]) for row in rows)
    found: dict[tuple[str, Column], list[float]] = {}
    for row in rows:
        block, rest = split_name(str(row["module"]), shared)
        found.setdefault((block, Column(rest, str(row["kind"]))), []).append(row["parameters"] / row["of"])
    means = {place: statistics.fmean(values) for place, values in found.items()}
    within = {column for block, column in means if block}
    blocks = sorted({block for block, _ in means}, key=by_block)
    columns = sorted(
        {column for _, column in means},
        key=lambda column: (column not in within, column.kind != "low_rank", natural(column.module)),
    )
    return Table(
        granularity=reference.granularity,
        space=sum(sizes.values()),
        budgets=[architecture.budget for architecture in architectures.values()],
        rows=[block or OUTSIDE for block in blocks],
        columns=columns,
        shares=[[means.get((block, column)) for column in columns] for block in blocks],
    )


def _sizes(architecture: Any) -> dict[tuple[str, str], int]:
    """Parameters in the search space by module and kind of update."""
    return {(str(row["module"]), str(row["kind"])): int(row["of"]) for row in architecture.rows()}


def _check_same(
    first: str, sizes: Mapping[tuple[str, str], int], second: str, others: Mapping[tuple[str, str], int]
) -> None:
    """Raise ValueError with the first update in which two search spaces differ."""
    for module, kind in sorted({*sizes, *others}, key=lambda update: natural(".".join(update))):
        a, b = sizes.get((module, kind)), others.get((module, kind))
        if a != b:
            here, there = (f"{size:,} parameters" if size else "none" for size in (a, b))
            raise CommandError(
                f"Adapters of one search space can be averaged, but the {LABELS[kind]} update of {module} has {here} "
                f"in that of {first} and {there} in that of {second}. Draw them apart."
            )


def title_of(table: Table) -> str:
    """The picture's title, if none is given."""
    low, high, count = min(table.budgets), max(table.budgets), len(table.budgets)
    budget = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    among = "" if count == 1 else f", mean of {count} adapters"
    return f"NAS-LoRA ({table.granularity}): share kept by a budget of {budget} of {table.space:,} parameters{among}"


def draw_adapters(adapters: Mapping[str, Adapter], title: Optional[str], widths: Mapping[str, int]) -> Figure:
    """The picture of saved adapters of one search space."""
    table = average({name: read_architecture(adapter) for name, adapter in adapters.items()})
    return draw(table, title or title_of(table))


@styled
def draw(table: Table, title: str) -> Figure:
    """The picture of a table."""
    figure = Figure(figsize=(3.5 + 0.6 * len(table.columns), 3.5 + 0.36 * len(table.rows)), layout="constrained")
    columns = [f"{column.module} {LABELS[column.kind]}" for column in table.columns]
    axis = figure.subplots()
    heat_map(figure, axis, table.shares, table.rows, columns, "parameters kept", percent=True)
    axis.set_title(title, wrap=True)
    return figure
