"""What a sweep has finished: its folder of results files, and the scores in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from scripts.glue import run_record
from scripts.glue.metrics import METRIC_NAMES
from scripts.sweep.plan import PROTOCOLS, VARIANTS, Run, settings

Record = dict[str, Any]
#: What a record that does not name a setting was made with: the settings are younger than some records.
DEFAULTS: Mapping[str, Any] = {"holdout_share": 0.0, "train_sampling_strategy": "random"}
MODEL = "all-MiniLM-L6-v2"
#: Says what all runs of a folder have in common that is not in their names.
ABOUT = "sweep.json"


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


def finished(folder: Path, reuse: Sequence[Path] = (), about: Optional[About] = None) -> dict[Run, Record]:
    """The finished runs of a sweep and what their files hold.

    Args:
        folder: of the sweep; a file is named after its run.
        reuse: folders of records of `scripts.glue.train` with names of their own; those that were made with the
            settings of a run stand for it.
        about: the sweep's; None: as the folder says.

    Raises:
        ValueError: a file of `folder` was made with other settings than its name says.
    """
    about = about or About.read(folder) or About()
    records: dict[Run, Record] = {}
    for _, record in _records(reuse):
        for run in _runs_like(record):
            if not differences(record, run, about):
                records.setdefault(run, record)
    for path, record in _records([folder]):
        run = Run.parse(path.stem)
        if run is None:
            continue
        if found := differences(record, run, about):
            raise ValueError(
                f"{path} was made with other settings ({'; '.join(found)}). Choose another --out for this sweep, or "
                "delete the file to train again."
            )
        records[run] = record
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
            alike = variant.method == record.get("method") and record.get("task") in METRIC_NAMES
            if alike and variant.is_in(protocol):
                yield Run(protocol, record["task"], name, config.get("learning_rate"), config.get("seed"))
