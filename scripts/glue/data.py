"""GLUE tasks: their columns and labels, from TSV files or from `nyu-mll/glue` on the Hub."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        name: as in `nyu-mll/glue`.
        folder: the task's folder in `--data_dir`.
        columns: text columns as on the Hub; a TSV file may also call them `sentence` or `sentence1`, `sentence2`.
        labels: names of the classes in the order of their ids; empty for regression.
        dev_splits: `{suffix for metrics: (split on the Hub, name of the TSV file)}`.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    dev_splits: tuple[tuple[str, str, str], ...] = (("", "validation", "dev.tsv"),)

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_DEV = tuple((kind, f"validation_{kind}", f"dev_{kind}.tsv") for kind in ("matched", "mismatched"))
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable")),
        Task("sst2", "SST-2", ("sentence",), ("negative", "positive")),
        Task("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent")),
        Task("stsb", "STS-B", _PAIR, ()),
        Task("qqp", "QQP", ("question1", "question2"), ("not_duplicate", "duplicate")),
        Task("mnli", "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), _MNLI_DEV),
        Task("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT),
        Task("rte", "RTE", _PAIR, _ENTAILMENT),
        Task("wnli", "WNLI", _PAIR, ("not_entailment", "entailment")),
    )
}


@dataclass
class GlueData:
    """The rows of a task: `dev` maps a suffix for metrics ("" unless there are several dev splits) to its rows."""

    task: Task
    train: Dataset
    dev: dict[str, Dataset]


def find_task(name: str) -> Task:
    """The task of that name, whatever its case and hyphens ("STS-B", "sts_b" and "stsb" are one)."""
    key = re.sub(r"[-_ ]", "", name.lower())
    if key not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {name!r}.")
    return TASKS[key]


def load_glue(
    task: Task,
    data_dir: str | None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> GlueData:
    """The task's train and dev rows, with the columns `text`, `text_pair` (tasks on pairs) and `label`.

    Args:
        task: the task.
        data_dir: folder that holds the task's folder of TSV files; None: `nyu-mll/glue` from the Hub.
        max_train_samples: keep that many first rows for training; None: all.
        max_eval_samples: keep that many first rows of each dev split; None: all.
    """
    for name, value in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if data_dir is not None:
        folder = Path(data_dir).expanduser() / task.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"--data_dir must hold a folder {task.folder} for task {task.name}: {folder}")
        train = read_tsv(folder / "train.tsv", task)
        dev = {suffix: read_tsv(folder / file, task) for suffix, _, file in task.dev_splits}
    else:
        train, dev = _from_hub(task)
    dev = {suffix: _first(rows, max_eval_samples) for suffix, rows in dev.items()}
    return GlueData(task, _first(train, max_train_samples), dev)


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, pad: bool = False, description: str = ""
) -> Dataset:
    """Rows as model inputs with the column `labels`, cut (and with `pad`, filled up) to `max_length` tokens."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding="max_length" if pad else False)
        return {**encoded, "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=description or None)


def read_tsv(path: Path, task: Task) -> Dataset:
    """Rows of a TSV file: UTF-8, a header row, no quoting, the text columns and `label` (a class name or id, a score).

    Raises:
        ValueError: a missing column, a row of another length, an unknown label; the sentence names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Task {task.name} needs the file {path}.")
    # newline="\n": any other line separator is a character of the text.
    with path.open(encoding="utf-8", newline="\n") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(reader, [])
        texts = _text_columns(header, task, path)
        label = header.index("label")
        columns: dict[str, list] = {name: [] for name in ("text", "text_pair")[: len(texts)]}
        columns["label"] = []
        for row in reader:
            if len(row) != len(header):
                raise ValueError(f"{path}, line {reader.line_num}: {len(header)} columns expected, got {len(row)}.")
            for name, index in zip(columns, texts, strict=False):
                columns[name].append(row[index])
            columns["label"].append(_label(row[label], task, f"{path}, line {reader.line_num}"))
    if not columns["label"]:
        raise ValueError(f"{path}: at least one row below the header expected, got none.")
    return Dataset.from_dict(columns)


def _text_columns(header: list[str], task: Task, path: Path) -> list[int]:
    plain = _PAIR if len(task.columns) == 2 else ("sentence",)
    for names in (task.columns, plain):
        if {*names, "label"} <= set(header):
            return [header.index(name) for name in names]
    raise ValueError(f"{path}: the header must name the columns {', '.join((*plain, 'label'))}, got {header}.")


def _label(value: str, task: Task, where: str) -> int | float:
    if task.regression:
        try:
            score = float(value)
        except ValueError:
            score = float("nan")
        if not 0 <= score <= 5:
            raise ValueError(f"{where}: label must be a score from 0 to 5, got {value!r}.")
        return score
    if value in task.labels:
        return task.labels.index(value)
    if value.isdecimal() and int(value) < task.num_labels:
        return int(value)
    ids = f"0 to {task.num_labels - 1}"
    raise ValueError(f"{where}: label must be one of {', '.join(task.labels)} or {ids}, got {value!r}.")


def _from_hub(task: Task) -> tuple[Dataset, dict[str, Dataset]]:
    try:
        splits = load_dataset(HUB_DATASET, task.name)
    except Exception as error:
        raise RuntimeError(
            f"Task {task.name} could not be loaded from {HUB_DATASET} on the Hub ({type(error).__name__}: {error}). "
            f"Without network give --data_dir, a folder with {task.folder}/train.tsv and {task.dev_splits[0][2]}."
        ) from error
    names = dict(zip(task.columns, ("text", "text_pair"), strict=False))

    def rows(split: str) -> Dataset:
        return splits[split].select_columns([*task.columns, "label"]).rename_columns(names)

    return rows("train"), {suffix: rows(split) for suffix, split, _ in task.dev_splits}


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))
