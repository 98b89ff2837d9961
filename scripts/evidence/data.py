"""The rows of the protocol's tasks: some to train on, some to choose by, and a large part that only tests.

GLUE's tasks are cut anew from all rows of a task's train and dev files: their dev parts are too small to tell methods
apart. The grammar task of scripts.demo is written by rules. The cut is the same in every call.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from scripts.demo import task as grammar
from scripts.glue import data as glue_data

#: Of the cut. Not a run's seed: all runs that are compared have the same rows.
CUT_SEED = 0
Parts = dict[str, Dataset]


def cut(name: str, counts: Mapping[str, int], data_dir: Path | None) -> Parts:
    """The rows of a task, as text, by part: "train", "choice" and "test".

    Args:
        name: "grammar", or a task of GLUE.
        counts: numbers of rows by part.
        data_dir: folder of GLUE's tasks as TSV files. SST-2 may lie there as `SST-2-part`, without dev rows. The
            grammar task needs none.

    Raises:
        ValueError: there is no folder, or fewer rows than that.
    """
    if name == "grammar":
        return _written(**counts)
    if data_dir is None:
        raise ValueError(f"Task {name} needs --data_dir, the folder of GLUE's tasks as TSV files.")
    rows, needed = _distinct(_read(name, data_dir)), sum(counts.values())
    if len(rows) < needed:
        raise ValueError(f"Task {name} needs {needed} different rows in {data_dir}, and has {len(rows)}.")
    order = iter(random.Random(CUT_SEED).sample(range(len(rows)), needed))
    drawn = {part: [next(order) for _ in range(counts[part])] for part in ("test", "choice", "train")}
    return {part: rows.select(positions) for part, positions in drawn.items()}


def _read(name: str, data_dir: Path) -> Dataset:
    task = glue_data.find_task(name)
    part = data_dir / f"{task.folder}-part"
    folder = part if part.is_dir() else data_dir / task.folder
    dev = [folder / file for _, _, file in task.dev_splits if folder != part]
    return concatenate_datasets([glue_data.read_tsv(file, task) for file in (folder / "train.tsv", *dev)])


def _distinct(rows: Dataset) -> Dataset:
    """One row of each text. Rows that share a sentence, or SST-2's phrases of one, may still be in two parts."""
    texts = zip(*(rows[name] for name in rows.column_names if name != "label"), strict=True)
    first: dict[tuple[str, ...], int] = {}
    for position, text in enumerate(texts):
        first.setdefault(text, position)
    return rows.select(first.values())


def _written(train: int, choice: int, test: int) -> Parts:
    """Sentences come in pairs, and a pair stays together. Those to choose by and to test with share their words, which
    no sentence to train on has."""
    others = grammar.load("dev", (choice + test) // 2, CUT_SEED)
    return {
        "train": _as_rows(grammar.load("train", train // 2, CUT_SEED)),
        "choice": _as_rows(each for each in others if each.pair < choice // 2),
        "test": _as_rows(each for each in others if each.pair >= choice // 2),
    }


def _as_rows(sentences: Iterable[grammar.Sentence]) -> Dataset:
    found = list(sentences)
    return Dataset.from_dict({"text": [s.text for s in found], "label": [s.label for s in found]})
