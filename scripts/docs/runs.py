"""Finished runs of a sweep as the report needs them: records by seed, scores, sizes. No table, no picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.glue import data as glue_data
from scripts.glue import run_record
from scripts.glue.metrics import METRIC_NAMES
from scripts.sweep import store as sweep_store
from scripts.sweep.plan import GRID_SEED, TASKS, VARIANTS, Run, chosen_rates, missing_rates, planned, rates
from scripts.sweep.store import Record

#: In the order of the columns.
ALL_TASKS = tuple(task for group in TASKS for task in group)
#: What the report compares with.
FULL, LORA = "full", "lora64"


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
    return {
        key: Counter(phrases[key] for phrases in found).most_common(1)[0][0] for key in (found[0] if found else ())
    }


def deviations(records: Iterable[Mapping[str, Any]], common: Mapping[str, str]) -> list[str]:
    """What of the runs' sizes is not the common one."""
    found = (phrases_of(record) for record in records)
    return list(dict.fromkeys(text for phrases in found for key, text in phrases.items() if text != common[key]))


@dataclass(frozen=True)
class Results:
    """Finished runs and what their files hold."""

    records: Mapping[Run, Record]

    @classmethod
    def read(cls, folder: Path, reuse: Sequence[Path] = ()) -> Results:
        """The finished runs of a sweep's folder. Files that are cut off, unfinished or of other names are passed over.

        Args:
            reuse: folders of records that may stand for runs.

        Raises:
            ValueError: a file was made with other settings than its name says.
        """
        return cls(sweep_store.finished(folder, reuse))

    @cached_property
    def chosen(self) -> dict[tuple[str, str], float]:
        """Learning rate by task and variant in the tuned protocol."""
        return chosen_rates(self.held_out)

    @cached_property
    def held_out(self) -> dict[Run, float | None]:
        """Score on held-out rows of each run."""
        return sweep_store.holdout_scores(self.records)

    @cached_property
    def planned_seeds(self) -> dict[tuple[str, str, str], set[int]]:
        """Seeds of the planned runs by protocol, task and variant, as far as the finished runs tell."""
        seeds: dict[tuple[str, str, str], set[int]] = {}
        for run in planned(self.held_out):
            seeds.setdefault((run.protocol, run.task, run.variant), set()).add(run.seed)
        return seeds

    @cached_property
    def _runs(self) -> dict[tuple[str, str, str], list[Run]]:
        runs: dict[tuple[str, str, str], list[Run]] = {}
        for run in sorted(self.records):
            runs.setdefault((run.protocol, run.task, run.variant), []).append(run)
        return runs

    # -- one cell --------------------------------------------------------------------------------------------------

    def missing_of_grid(self, task: str, variant: str) -> int:
        """How many learning rates of a variant's grid have no finished run yet."""
        return len({*VARIANTS[variant].lrs} - {*rates(self.held_out, task, variant, GRID_SEED)})

    def is_searched(self, task: str, variant: str) -> bool:
        """Whether the search for the learning rate is over: none is missing, in the grid or beyond its ends."""
        return not missing_rates(self.held_out, task, variant, GRID_SEED)

    def cell(self, protocol: str, task: str, variant: str) -> dict[int, Record]:
        """Records by seed, ascending. In the tuned protocol those of the chosen rate, once the grid is finished.

        Raises:
            ValueError: a protocol that chooses nothing has runs of several learning rates.
        """
        runs = self._runs.get((protocol, task, variant), [])
        if protocol == "tuned":
            if self.missing_of_grid(task, variant):
                return {}
            runs = [run for run in runs if run.lr == self.chosen.get((task, variant))]
        if len(found := {run.lr for run in runs}) > 1:
            raise ValueError(
                f"Runs of the protocol {protocol!r} must have one learning rate for {variant} on {task}, got "
                f"{', '.join(f'{lr:g}' for lr in sorted(found))}: move the files of the others out of the folder."
            )
        return {run.seed: self.records[run] for run in runs}

    def scores(self, protocol: str, task: str, variant: str) -> dict[int, float]:
        """Scores on dev at the end of training, in percent, by seed, without seeds whose metrics are no numbers."""
        cell = self.cell(protocol, task, variant)
        found = {seed: sweep_store.score(record["final"], task, "eval_") for seed, record in cell.items()}
        return {seed: score for seed, score in found.items() if score is not None}

    def averages(self, protocol: str, tasks: Sequence[str], variant: str) -> dict[int, float]:
        """Means over the tasks, by seed, of the seeds that have a score in each of them."""
        found = [self.scores(protocol, task, variant) for task in tasks]
        shared = sorted(set.intersection(*(set(scores) for scores in found))) if found else []
        return {seed: fmean(scores[seed] for scores in found) for seed in shared}

    # -- several ---------------------------------------------------------------------------------------------------

    def shown(self, protocol: str, tasks: Iterable[str] = ALL_TASKS) -> list[str]:
        """The variants that have a finished cell in one of the tasks, in the order of the plan."""
        tasks = tuple(tasks)
        return [name for name in VARIANTS if any(self.cell(protocol, task, name) for task in tasks)]

    def tasks(self, protocol: str) -> list[str]:
        """The tasks in which any variant has a finished cell."""
        return [task for task in ALL_TASKS if self.shown(protocol, (task,))]

    def cells(self, protocol: str, variant: str) -> list[Record]:
        """The records of a variant's cells, over all tasks."""
        return [record for task in ALL_TASKS for record in self.cell(protocol, task, variant).values()]

    def trained(self, variant: str, protocols: Sequence[str] = ("paper", "tuned", "nas")) -> tuple[int, int] | None:
        """Trained parameters in the first and in the last phase, of the first record in the order of protocols and
        tasks: a head for another number of classes makes a small difference between tasks."""
        for protocol in protocols:
            for record in self.cells(protocol, variant):
                counts = record["parameters"]
                return counts["trained_first_phase"], counts["trained_last_phase"]
        return None


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
