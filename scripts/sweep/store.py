"""What a sweep has finished: a file of JSON lines per protocol, a line per run.

A run's record is written by scripts.glue.train into the run's own folder, `.work/<run>`, and moves from there into
`<protocol>.jsonl`, which is replaced whole and under a lock: killed at any moment, a sweep leaves each record in at
least one of the two places, and a record that is in both counts once.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock

from scripts.glue import run_record
from scripts.glue.metrics import METRIC_NAMES
from scripts.sweep.plan import VARIANTS, Run, settings

Record = dict[str, Any]
#: What a record that does not name a setting was made with: the settings are younger than some records.
DEFAULTS: Mapping[str, Any] = {"holdout_share": 0.0, "train_sampling_strategy": "random"}
MODEL = "all-MiniLM-L6-v2"
#: Says what all runs of a folder have in common that is not in their names.
ABOUT = "sweep.json"
#: Folder of the runs in training, and name of the record there.
WORK, RESULTS = ".work", "results.json"


@dataclass(frozen=True)
class About:
    """What all runs of a sweep have in common.

    Attributes:
        model: label of the model: the last part of its Hub id or folder.
        settings: settings of all runs that are not those of `plan.settings`.
    """

    model: str = MODEL
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Optional["About"]:
        """What a sweep wrote into its folder; None if it wrote nothing."""
        found = run_record.read_json(folder / ABOUT)
        return cls(found["model"], found["settings"]) if found else None

    def write(self, folder: Path) -> None:
        """
        Raises:
            ValueError: the folder is one of another model or of other settings.
        """
        there = self.read(folder)
        if there is None:
            run_record.write_json(folder / ABOUT, asdict(self))
        elif there != self:
            raise ValueError(
                f"{folder} holds a sweep of {there.model} with the settings {dict(there.settings)}, and this one is "
                f"of {self.model} with {dict(self.settings)}. Choose another --out."
            )


def finished(folder: Path, about: Optional[About] = None) -> dict[Run, Record]:
    """The finished runs of a sweep and their records. A line may name a `file` of its record in place of holding it.

    Args:
        folder: of the sweep.
        about: the sweep's; None: as the folder says.

    Raises:
        ValueError: a line is of no run, or its record was made with other settings than its name says.
    """
    about = about or About.read(folder) or About()
    records: dict[Run, Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in run_record.read_lines(path):
            run = Run.parse(str(row.get("run")))
            record = run_record.read_json(folder / row["file"]) if "file" in row else row
            if run is None or record is None or not record.get("finished"):
                raise ValueError(f"{path} must hold finished runs, got {row.get('run')!r} {row.get('file', '')}.")
            _check(record, run, about, f"{path}, {run.name},")
            records[run] = record
    return records


def _check(record: Record, run: Run, about: About, place: str) -> None:
    if found := differences(record, run, about):
        raise ValueError(
            f"{place} was made with other settings ({'; '.join(found)}). Choose another --out for this sweep, or "
            "delete it to train again."
        )


def collect(folder: Path, about: About, keep: Optional[str] = None) -> dict[Run, Record]:
    """Move the records of finished runs from their own folders into the protocols' files, and delete these folders.

    Args:
        folder: of the sweep.
        about: the sweep's.
        keep: folder for the adapters; None: they are deleted.

    Returns:
        All finished runs and their records.
    """
    folders = {run: path for path in (folder / WORK).glob("*") if (run := Run.parse(path.name))}
    for run, path in folders.items():
        record = run_record.read_json(path / RESULTS)
        if record and record.get("finished"):
            _check(record, run, about, str(path))
            with FileLock(folder / WORK / ".lock"):
                rows = run_record.read_lines(file := folder / f"{run.protocol}.jsonl")
                if run.name not in (row["run"] for row in rows):
                    run_record.write_lines(file, [*rows, {"run": run.name, **record}])
    records = finished(folder, about)
    for run, path in folders.items():
        if run in records and not run_record.is_busy(path):
            if keep and (path / "adapter").is_dir():
                shutil.copytree(path / "adapter", Path(keep) / run.name, dirs_exist_ok=True)
            shutil.rmtree(path, ignore_errors=True)
    return records


def differences(record: Record, run: Run, about: About) -> list[str]:
    """What in a record is not as the run is to be made; empty: the record is the run's."""
    config = {**DEFAULTS, **record["config"]}
    changed = {key: value for key, value in about.settings.items() if key in config}
    expected = {"method": VARIANTS[run.variant].method, "task": run.task, "model": about.model}
    expected |= {**settings(run), **changed}
    expected["total_batch_size"] = expected["per_device_train_batch_size"] * expected["gradient_accumulation_steps"]
    model = str(record.get("model")).split("/")[-1]
    found = {**config, "method": record.get("method"), "task": record.get("task"), "model": model}
    return [
        f"{key} {found.get(key)!r} there, {value!r} here" for key, value in expected.items() if found.get(key) != value
    ]


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
