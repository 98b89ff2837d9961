"""A heat map of the architectures that NAS-LoRA adapters learned: which updates were kept, block by block.

    python -m scripts.glue.plot_architecture ADAPTER_FOLDER [OTHER_FOLDER ...] --out heatmap.png [--json table.json]

A row is a block of the model (the last one, what lies outside the blocks), a column an update of one kind of module
within a block, and the colour which share of its parameters was kept, averaged over the adapters: other tasks, other
seeds, the same search space. So are the learned architectures shown in arXiv 2305.16597, figure 1.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from peft_learners import Architecture, NASLoRAConfig
from scripts.bench import plot as plot_bench  # chooses matplotlib's backend
from scripts.glue import run_record
from scripts.glue.plot_nodes import name_of, natural, read_config, short_names

OUTSIDE = "outside the blocks"
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


def read_architecture(folder: Path) -> Architecture:
    """The architecture in the folder of a saved adapter.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it holds one of another method, or one that was saved before its last pruning.
    """
    read_config(folder, "NAS_LORA", "NAS-LoRA")
    config: Any = NASLoRAConfig.from_pretrained(str(folder))
    if not config.phases_complete:
        raise ValueError(
            f"{folder} was saved in its search ({config.pruned_rounds} of rounds={config.rounds} over), so its "
            "architecture is not what is kept in the end. Save the adapter after its last search."
        )
    return Architecture.from_pretrained(str(folder))


def split_name(module: str, shared: int = 0) -> tuple[str, str]:
    """A module's name as that of its block and the rest; outside the blocks the block is "", and the rest is without
    its first `shared` parts."""
    parts = module.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():  # a list in a block (T5's `layer`, MobileBERT's `ffn`) is a part of the block
            return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
    return "", ".".join(parts[shared:])


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
            raise ValueError(
                f"Adapters of one granularity can be averaged, but {first} is {reference.granularity} and {name} is "
                f"{other.granularity}."
            )
        _check_same(first, sizes, name, _sizes(other))
    found = pd.DataFrame(row for architecture in architectures.values() for row in architecture.rows())
    shared = _shared_parts(found.module)
    places = [split_name(module, shared) for module in found.module]
    found["block"] = [block for block, _ in places]
    found["column"] = [Column(rest, kind) for (_, rest), kind in zip(places, found.kind, strict=True)]
    means = (found.parameters / found.of).groupby([found.block, found.column]).mean()
    within = {column for block, column in means.index if block}
    blocks = sorted({*found.block}, key=lambda block: (not block, "decoder" in block, natural(block)))
    columns = sorted(
        {*found.column},
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
            raise ValueError(
                f"Adapters of one search space can be averaged, but the {LABELS[kind]} update of {module} has {here} "
                f"in that of {first} and {there} in that of {second}. Draw them apart."
            )


def _shared_parts(modules: Iterable[str]) -> int:
    """How many parts at their beginning all names have in common, their last parts aside."""
    columns = zip(*(module.split(".")[:-1] for module in modules), strict=False)  # ends with the shortest
    return [*(len({*parts}) == 1 for parts in columns), False].index(False)


def as_json(table: Table, adapters: list[str]) -> dict[str, Any]:
    """The table as the JSON file holds it, with the names of the adapters."""
    return {"adapters": adapters, **vars(table), "columns": [column._asdict() for column in table.columns]}


def title_of(table: Table) -> str:
    """The picture's title, if none is given."""
    low, high, count = min(table.budgets), max(table.budgets), len(table.budgets)
    budget = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    among = "" if count == 1 else f", mean of {count} adapters"
    return f"NAS-LoRA ({table.granularity}): share kept by a budget of {budget} of {table.space:,} parameters{among}"


def draw(table: Table, path: Path, title: str, metadata: Optional[Mapping[str, str]] = None) -> None:
    """Draw the table into a PNG file.

    Args:
        metadata: texts by keyword, to be written into the file.
    """
    shares = np.array([[np.nan if share is None else share for share in row] for row in table.shares])
    height, width = shares.shape
    figure, axis = plt.subplots(figsize=(2.5 + 0.42 * width, 2.5 + 0.32 * height), layout="constrained")
    axis.set_facecolor("0.9")  # shows where there is nothing to keep
    # Small budgets would all look alike on a scale up to 100 %.
    top = float(np.nanmax(shares)) or 1.0
    picture = axis.imshow(shares, cmap="viridis", vmin=0.0, vmax=top, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            color = "black" if share > 0.6 * top else "white"
            text = f"{100 * share:.{1 if 0 < share < 0.095 else 0}f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    blocks = [row for row in table.rows if row != OUTSIDE]
    axis.set_yticks(range(height), [*(short_names(blocks) if blocks else []), *table.rows[len(blocks) :]])
    axis.set_xticks(range(width), [f"{c.module} {LABELS[c.kind]}" for c in table.columns], rotation=90, fontsize=8)
    axis.set_title(title, fontsize=10, wrap=True)
    figure.colorbar(picture, ax=axis, label="kept", format=PercentFormatter(1.0))
    plot_bench.save(figure, path, metadata)


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Draw which updates NAS-LoRA adapters kept, block by block.")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER_FOLDER", help="folder of a saved adapter")
    parser.add_argument("--out", type=Path, default=Path("heatmap.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="the averaged table, as JSON")
    parser.add_argument("--title", help="of the picture (default: granularity, budget and number of adapters)")
    args = parser.parse_args(argv)
    architectures = {folder: read_architecture(folder) for folder in args.adapters}
    table = average({str(folder): architecture for folder, architecture in architectures.items()})
    draw(table, args.out, args.title or title_of(table))
    print(f"-> {args.out}")
    if args.json:
        run_record.write_json(args.json, as_json(table, [name_of(folder) for folder in architectures]))
        print(f"-> {args.json}")


if __name__ == "__main__":
    main()
