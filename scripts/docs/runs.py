"""Finished runs of a sweep as tables of pandas, and the papers' own numbers. No page, no picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from scripts.glue import data as glue_data
from scripts.glue import run_record
from scripts.glue.metrics import METRIC_NAMES
from scripts.sweep import store
from scripts.sweep.plan import ALL_TASKS, VARIANTS, Run, best_rate, missing_rates, rates
from scripts.sweep.store import Record

#: What the report compares with.
FULL, LORA = "full", "lora64"
COLUMNS = ("protocol", "task", "variant", "lr", "seed", "score", "counts", "record")
#: Places of tasks and of variants in tables.
ORDER = {name: place for names in (ALL_TASKS, VARIANTS) for place, name in enumerate(names)}


def task_label(task: str) -> str:
    """A task as people write it: STS-B."""
    return glue_data.TASKS[task].folder


def phrases_of(record: Mapping[str, Any]) -> dict[str, str]:
    """A run's size in words, by what they are about: epochs, rows, tokens. Where rows were cut down, they say so."""
    config, rows = record["config"], record["rows"]
    steps = config.get("max_steps") or -1
    phrases = {"epochs": f"{config['num_train_epochs']:g} epochs" if steps < 1 else f"{steps} steps"}
    for split, limit in {"train": config.get("max_train_samples"), "dev": config.get("max_eval_samples")}.items():
        phrases[split] = f"{'the first ' if limit else ''}{rows[split]:,} {split} rows"
    if rows.get("holdout"):
        phrases["train"] += f" ({rows['holdout']:,} more held out)"
    return {**phrases, "tokens": f"up to {config['max_length']} tokens"}


def common_phrases(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Of each phrase of the runs' sizes, the most frequent one."""
    found = [phrases_of(record) for record in records]
    return {key: Counter(each[key] for each in found).most_common(1)[0][0] for key in (found[0] if found else ())}


def deviations(records: Iterable[Mapping[str, Any]], common: Mapping[str, str]) -> list[str]:
    """What of the runs' sizes is not the common one."""
    found = (phrases_of(record) for record in records)
    return list(dict.fromkeys(text for phrases in found for key, text in phrases.items() if text != common[key]))


@dataclass(frozen=True)
class Results:
    """Finished runs and their records."""

    records: Mapping[Run, Record]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """The finished runs of a sweep's folder.

        Raises:
            ValueError: a record was made with other settings than its name says.
        """
        return cls(store.finished(folder))

    @cached_property
    def held_out(self) -> dict[Run, float | None]:
        """Score on held-out rows of each run."""
        return store.holdout_scores(self.records)

    def is_searched(self, task: str, variant: str) -> bool:
        """Whether the search for the learning rate is over: none is missing, in the grid or beyond its ends."""
        return not missing_rates(self.held_out, task, variant)

    def grid_size(self, task: str, variant: str) -> int:
        """How many learning rates of a variant's grid have a finished run."""
        return len({*VARIANTS[variant].lrs} & {*rates(self.held_out, task, variant)})

    def chosen(self, task: str, variant: str) -> float | None:
        """Learning rate in the tuned protocol; None before the grid is finished, or if all of it diverged."""
        if self.grid_size(task, variant) < len(VARIANTS[variant].lrs):
            return None
        return best_rate(self.held_out, task, variant)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row per run: what names it, its `score` on dev at the end of training (in percent; NaN where a metric is
        no number), whether it `counts` (in the tuned protocol, only at the chosen rate) and its `record`; in the order
        of the plan's tasks and variants, then of learning rates and seeds."""
        found = [
            {
                **vars(run),
                "score": store.score(record["final"], run.task, "eval_"),
                "counts": run.protocol != "tuned" or run.lr == self.chosen(run.task, run.variant),
                "record": record,
            }
            for run, record in self.records.items()
        ]
        found.sort(key=lambda row: (ORDER[row["task"]], ORDER[row["variant"]], row["lr"], row["seed"]))
        return pd.DataFrame(found, columns=list(COLUMNS)).astype({"score": float, "counts": bool})

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The runs that count.

        Raises:
            ValueError: a protocol that chooses nothing has runs of several learning rates.
        """
        cells = self.runs[self.runs.counts]
        for (protocol, task, variant), lrs in cells.groupby(["protocol", "task", "variant"]).lr:
            if lrs.nunique() > 1:
                raise ValueError(
                    f"Runs of the protocol {protocol!r} must have one learning rate for {variant} on {task}, got "
                    f"{', '.join(f'{lr:g}' for lr in lrs.unique())}: move the lines of the others out of the folder."
                )
        return cells

    def of(self, protocol: str, task: str | None = None, variant: str | None = None) -> pd.DataFrame:
        """The runs that count in a protocol, of a task, of a variant."""
        found = self.cells[self.cells.protocol == protocol]
        found = found if task is None else found[found.task == task]
        return found if variant is None else found[found.variant == variant]

    def scores(self, protocol: str, task: str, variant: str) -> pd.Series:
        """Scores by seed, without seeds whose metrics are no numbers."""
        return self.of(protocol, task, variant).set_index("seed").score.dropna()

    def shown(self, protocol: str, task: str | None = None) -> list[str]:
        """The variants that have a finished cell, in the order of the plan."""
        return sorted({*self.of(protocol, task).variant}, key=ORDER.__getitem__)

    def tasks(self, protocol: str) -> list[str]:
        """The tasks in which any variant has a finished cell."""
        return sorted({*self.of(protocol).task}, key=ORDER.__getitem__)

    def trained(self, variant: str, protocols: Sequence[str] = ("paper", "tuned", "nas")) -> tuple[int, int] | None:
        """Trained parameters in the first and in the last phase, of the first record in the order of protocols and
        tasks: a head for another number of classes makes a small difference between tasks."""
        for record in (record for protocol in protocols for record in self.of(protocol, variant=variant).record):
            counts = record["parameters"]
            return counts["trained_first_phase"], counts["trained_last_phase"]
        return None

    def averages(self, protocol: str) -> tuple[list[str], pd.DataFrame]:
        """The tasks that a protocol's averages are over, and the averages: a row per seed, a column per variant.

        The tasks are those in which all main variants share seeds, without those where they share fewer than in two
        others; the seeds are those that the main variants share in all of them: so their averages and the differences
        between them are of the same runs.
        """
        names = self.shown(protocol)
        main = [name for name in names if VARIANTS[name].core]
        by_task = {t: self.of(protocol, t).pivot(index="seed", columns="variant", values="score") for t in ALL_TASKS}
        shared = {task: found.reindex(columns=main).dropna().index for task, found in by_task.items()}
        second_most = sorted(map(len, shared.values()), reverse=True)[1]
        tasks = [task for task, seeds in shared.items() if len(seeds) >= max(1, second_most)] if main else []
        if not tasks:
            return [], pd.DataFrame()
        total = sum(by_task[task].reindex(columns=names) for task in tasks) / len(tasks)
        seeds = [seed for seed in total.index if all(seed in shared[task] for task in tasks)]
        return tasks, total.loc[seeds].dropna(axis="columns", how="all")


@dataclass(frozen=True)
class Papers:
    """The papers' own numbers, from `results/papers.json`."""

    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Papers:
        """
        Raises:
            FileNotFoundError: there is no such file, or it holds no JSON object.
        """
        data = run_record.read_json(path)
        if data is None:
            raise FileNotFoundError(f"{path} must hold the papers' numbers as a JSON object, but does not.")
        return cls(data)

    def model(self, paper: str) -> str:
        """Name of the model that a paper trains."""
        return self.data[paper]["model"]

    def rows(self, paper: str, *tables: str) -> dict[str, Mapping[str, Any]]:
        """The rows of the methods that we have too, by our names for them."""
        found = (row for table in tables for row in self.data[paper][table]["rows"])
        return {row["ours"]: row for row in found if row["ours"] is not None}

    def epochs(self, paper: str, task: str) -> float:
        """The number of epochs that a paper trains on a task."""
        epochs = self.data[paper]["recipe"]["epochs"]
        return epochs[task] if isinstance(epochs, Mapping) else epochs

    @staticmethod
    def score(row: Mapping[str, Any] | None, task: str) -> float | None:
        """The mean of a task's metrics; None if the row gives another number of them than we do."""
        values = row["scores"].get(task, ()) if row else ()
        return fmean(values) if len(values) == len(METRIC_NAMES[task]) else None
