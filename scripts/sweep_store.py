"""What a sweep has finished: its folder of results files, and the learning rates that follow from them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import run_record
from glue_metrics import METRIC_NAMES
from sweep_plan import PROTOCOLS, VARIANTS, Run, best_rate, missing_rates, settings

Record = dict[str, Any]
#: What a record that does not name a setting was made with: the settings are younger than some records.
DEFAULTS: Mapping[str, Any] = {"holdout_share": 0.0, "train_sampling_strategy": "random"}
MODEL = "all-MiniLM-L6-v2"


def finished(
    folder: Path, reuse: Sequence[Path] = (), model: Optional[str] = MODEL, changed: Optional[Mapping[str, Any]] = None
) -> dict[Run, Record]:
    """The finished runs of a sweep and what their files hold.

    Args:
        folder: of the sweep; a file is named after its run.
        reuse: folders of records of `train_glue.py` with names of their own; those that were made with the settings of
            a run stand for it.
        model: label of the model; None: any.
        changed: settings of all runs of this sweep that are not those of `sweep_plan.settings`.

    Raises:
        ValueError: a file of `folder` was made with other settings than its name says.
    """
    records: dict[Run, Record] = {}
    for _, record in _records(reuse):
        for run in _runs_like(record):
            if not differences(record, run, model, changed):
                records.setdefault(run, record)
    for path, record in _records([folder]):
        run = Run.parse(path.stem)
        if run is None:
            continue
        if found := differences(record, run, model, changed):
            raise ValueError(
                f"{path} was made with other settings ({'; '.join(found)}). Choose another --out for this sweep, or "
                "delete the file to train again."
            )
        records[run] = record
    return records


def differences(
    record: Record, run: Run, model: Optional[str] = None, changed: Optional[Mapping[str, Any]] = None
) -> list[str]:
    """What in a record is not as the run is to be made; empty: the record is the run's."""
    config = {**DEFAULTS, **record["config"]}
    expected = {**settings(run), **{key: value for key, value in (changed or {}).items() if key in config}}
    found = [
        f"{key} {config.get(key)!r} there, {value!r} here"
        for key, value in expected.items()
        if config.get(key) != value
    ]
    names = {"method": VARIANTS[run.variant].method, "task": run.task, **({"model": model} if model else {})}
    return [
        f"{key} {record.get(key)!r} there, {value!r} here" for key, value in names.items() if record.get(key) != value
    ] + found


def score(values: Optional[Mapping[str, Optional[float]]], task: str, prefix: str = "") -> Optional[float]:
    """A task's GLUE score: the mean of its metrics, times 100; None where one is not there or not a number.

    Args:
        values: metrics by name.
        prefix: before the names, "eval_" for those on dev.
    """
    found = [(values or {}).get(f"{prefix}{name}") for name in METRIC_NAMES[task]]
    return None if any(value is None for value in found) else 100 * sum(found) / len(found)  # type: ignore[arg-type]


def holdout_scores(records: Mapping[Run, Record]) -> dict[Run, Optional[float]]:
    """Score of each run on the rows that it held out; None where it held out none, and minus infinity where a metric
    is no number (training diverged)."""
    scores: dict[Run, Optional[float]] = {}
    for run, record in records.items():
        values = record.get("holdout")
        found = score(values, run.task)
        scores[run] = found if found is not None or values is None else float("-inf")
    return scores


def chosen(records: Mapping[Run, Record], seed: int = 0) -> dict[tuple[str, str], float]:
    """Learning rate of the tuned protocol by task and variant: the best on held-out rows, of the finished ones."""
    scores = holdout_scores(records)
    cells = {(run.task, run.variant) for run in records if run.protocol == "tuned"}
    rates = {cell: best_rate(scores, *cell, seed) for cell in sorted(cells)}
    return {cell: rate for cell, rate in rates.items() if rate is not None}


def is_searched(records: Mapping[Run, Record], task: str, variant: str, seed: int = 0) -> bool:
    """Whether the grid of learning rates is finished, and goes on beyond none of its ends."""
    return not missing_rates(holdout_scores(records), task, variant, seed)


def _records(folders: Sequence[Path]) -> Iterator[tuple[Path, Record]]:
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            record = run_record.read_json(path)
            if record is not None and record.get("finished") and isinstance(record.get("config"), dict):
                yield path, record


def _runs_like(record: Record) -> Iterator[Run]:
    config = record["config"]
    for protocol in PROTOCOLS:
        for name, variant in VARIANTS.items():
            in_protocol = variant.nas_lr is not None if protocol == "nas" else bool(variant.lrs)
            if in_protocol and variant.method == record.get("method") and record.get("task") in METRIC_NAMES:
                yield Run(protocol, record["task"], name, config.get("learning_rate"), config.get("seed"))
