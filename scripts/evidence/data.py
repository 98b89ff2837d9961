"""The rows of the protocol's tasks: some to train on, some to choose by, and a large part that only tests.

GLUE's tasks are cut anew from all rows of a task's train and dev files: their dev parts are too small to tell methods
apart. The grammar task of scripts.demo is written by rules. The cut is the same in every call.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from scripts.demo import task as grammar
from scripts.glue import data as glue_data

#: Of the cut. Not a run's seed: all runs that are compared have the same rows.
CUT_SEED = 0


@dataclass(frozen=True)
class Parts:
    """The rows of a task, as text: to train on, to choose by, and to test with."""

    train: Dataset
    choice: Dataset
    test: Dataset


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows; None: all that are left."""

    train: int
    choice: int
    test: int


def cut(name: str, sizes: Sizes, data_dir: Path) -> Parts:
    """The three parts of a task.

    Args:
        name: "grammar", or a task of GLUE.
        sizes: numbers of rows.
        data_dir: folder of GLUE's tasks as TSV files. SST-2 may lie there as `SST-2-part`, without dev rows.

    Raises:
        ValueError: there are fewer rows than that.
    """
    if name == "grammar":
        return _written(sizes)
    rows = _distinct(_read(name, data_dir))
    needed = sizes.train + sizes.choice + sizes.test
    if len(rows) < needed:
        raise ValueError(f"Task {name} needs {needed} different rows in {data_dir}, and has {len(rows)}.")
    order = random.Random(CUT_SEED).sample(range(len(rows)), needed)
    bounds = (0, sizes.test, sizes.test + sizes.choice, needed)
    test, choice, train = (rows.select(order[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
    return Parts(train, choice, test)


def _read(name: str, data_dir: Path) -> Dataset:
    task = glue_data.find_task(name)
    part = data_dir / f"{task.folder}-part"
    folder = part if part.is_dir() else data_dir / task.folder
    files = [folder / "train.tsv", *(folder / file for _, _, file in task.dev_splits)]
    return concatenate_datasets(
        [glue_data.read_tsv(file, task) for file in files if file == files[0] or file.is_file()]
    )


def _distinct(rows: Dataset) -> Dataset:
    """One row of each text: the same words must not train and test."""
    names = [name for name in rows.column_names if name != "label"]
    first = {tuple(texts): i for i, texts in reversed(list(enumerate(zip(*(rows[n] for n in names), strict=True))))}
    return rows.select(sorted(first.values()))


def _written(sizes: Sizes) -> Parts:
    """Sentences come in pairs, and a pair stays together. Those to choose by and to test with share their words, which
    no sentence to train on has."""
    if any(count % 2 for count in (sizes.train, sizes.choice, sizes.test)):
        raise ValueError(f"The grammar task has pairs of rows, so even numbers are needed, got {sizes}.")
    others = grammar.load("dev", (sizes.choice + sizes.test) // 2, CUT_SEED)
    kept = partial(_sentences, others)
    return Parts(
        _sentences(grammar.load("train", sizes.train // 2, CUT_SEED), 0, sizes.train),
        kept(0, sizes.choice // 2),
        kept(sizes.choice // 2, sizes.choice + sizes.test),
    )


def _sentences(sentences: list[grammar.Sentence], first: int, end: int) -> Dataset:
    """Those of the pairs from `first` to before `end`."""
    found = [each for each in sentences if first <= each.pair < end]
    return Dataset.from_dict({"text": [s.text for s in found], "label": [s.label for s in found]})
