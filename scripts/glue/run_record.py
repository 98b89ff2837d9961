"""What a training run leaves behind: its checkpoints, its times, and one results file that later reports read."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

#: Raised when a key of the results file changes its meaning.
SCHEMA_VERSION = 1
#: Exit status of a script that found another process at its run (EX_TEMPFAIL).
EXIT_BUSY = 75
#: Name of the single phase of a method without phases.
ONLY_PHASE = "train"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "peft_learners", "datasets")
_SPEED_KEYS = ("_runtime", "_samples_per_second", "_steps_per_second", "_preparation_time", "_compilation_time")


class BusyError(RuntimeError):
    """Another process works in the folder of a run."""


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes of this kind out of a run's folder. The operating system ends it with the process.

    Raises:
        BusyError: one is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BusyError(
            f"--output_dir {folder}: another process trains there (it holds {lock.lock_file}). Wait for it, or choose "
            "another --output_dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


class PhaseTimer(TrainerCallback, ExportableState):
    """Adds up the seconds of optimizer steps per phase, without data loading, evaluation, logging and saving.

    The phase is the last one whose start `state.log_history` tells. The sums travel in every checkpoint, so that a
    resumed run counts each step that made it into the result once.

    Attributes:
        seconds: seconds in optimizer steps by phase name.
        loop_seconds: seconds from the start of training to now, with everything in between.
        peak_bytes: highest memory use of this process so far.
        optimizer_bytes: bytes of the optimizer's state after the first step of a phase, by its name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.loop_seconds = 0.0
        self.peak_bytes = 0
        self.optimizer_bytes: dict[str, int] = {}
        self._phase = ONLY_PHASE
        self._entries_read = 0
        self._step_start = self._loop_start = 0.0

    def state(self) -> dict[str, dict]:
        self._update()
        names = ("seconds", "loop_seconds", "peak_bytes", "optimizer_bytes")
        kept = {name: copy.copy(getattr(self, name)) for name in names}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        vars(self).update(copy.deepcopy(saved.get("attributes", {})))
        self._loop_start = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        for entry in state.log_history[self._entries_read :]:
            if "phase_first_step" in entry:  # others may still name the phase before
                self._phase = entry.get("phase", self._phase)
        self._entries_read = len(state.log_history)
        self._step_start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        step = time.perf_counter() - self._step_start
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + step
        if self._phase not in self.optimizer_bytes and "optimizer" in kwargs:
            self.optimizer_bytes[self._phase] = state_bytes(kwargs["optimizer"])

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self._update()
        self._loop_start = 0.0

    def _update(self) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_memory_bytes())
        if self._loop_start:
            now = time.perf_counter()
            self.loop_seconds += now - self._loop_start
            self._loop_start = now


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    kept = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def peak_memory_bytes() -> int:
    """Highest memory use of this process: on the GPU if it used one, else the resident set on the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a run depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package.replace("_", "-"))
    found["torch"] = str(torch.__version__)  # it names the build, which the package's own metadata may leave out
    return {**dict.fromkeys(("python", *PACKAGES)), **found}


@cache
def code() -> str | None:
    """The commit of the scripts as this process started, with "-dirty" if they or the package have changes, and of the
    package if that is of another checkout; None where there is no git."""
    scripts, package = (Path(find_spec(name).origin).parents[1] for name in ("scripts", "peft_learners"))
    own = _commit(scripts)
    return own if own is None or package == scripts else f"{own}, package {_commit(package)}"


def _commit(checkout: Path) -> str | None:
    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "scripts", "peft_learners")
        return git("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_record(args: TrainingArguments) -> dict[str, Any]:
    """The machine a run is on: kind and name of the device, number of processes and of threads per process."""
    kind = args.device.type
    name = torch.cuda.get_device_name(args.device) if kind == "cuda" else _cpu_name()
    return {"type": kind, "name": name, "processes": args.world_size, "threads": torch.get_num_threads()}


def model_label(name_or_path: str) -> str:
    """A model's name for the record: the Hub id, or the last part of a local folder."""
    folder = Path(name_or_path).expanduser()
    return folder.resolve().name if folder.is_dir() else name_or_path


def epoch_rows(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per evaluation (per training log if there was none): `epoch`, `step`, `train_loss`, `phase`, `eval_*`.

    `train_loss` is the mean over the steps since the row before; `phase` (of a method with phases) is that of the last
    of them.
    """
    evaluated = any(eval_values(entry) for entry in log_history)
    starts = _phase_starts(log_history)
    rows: dict[int, dict[str, Any]] = {}
    loss_sum, last_step, steps = 0.0, 0, 0
    for entry in log_history:
        step = entry.get("step", 0)
        if "loss" in entry:
            loss_sum += entry["loss"] * (step - last_step)
            steps += step - last_step
            last_step = step
        values = eval_values(entry)
        if values or ("loss" in entry and not evaluated):
            if step not in rows:
                rows[step] = {"epoch": entry.get("epoch"), "step": step}
                rows[step]["train_loss"] = loss_sum / steps if steps else None
                # By steps: an entry written at a boundary may name either phase.
                if names := [name for name, start in starts.items() if start["phase_first_step"] < max(step, 1)]:
                    rows[step]["phase"] = names[-1]
                loss_sum, steps = 0.0, 0
            rows[step].update(values)
    return list(rows.values())


def phase_rows(
    log_history: list[dict[str, Any]], seconds: Mapping[str, float], last_step: int, trained_parameters: int
) -> list[dict[str, Any]]:
    """One row per phase with `name`, `first_step`, `steps`, `seconds`, `trained_parameters`.

    Args:
        log_history: the Trainer's; entries with `phase_first_step` mark the starts of phases.
        seconds: seconds in optimizer steps by phase name.
        last_step: number of optimizer steps of the whole training.
        trained_parameters: number of trained parameters of a method without phases.
    """
    starts = _phase_starts(log_history)
    starts = starts or {ONLY_PHASE: {"phase_first_step": 0, "trained_parameters": trained_parameters}}
    first_steps = [int(start["phase_first_step"]) for start in starts.values()]
    return [
        {
            "name": name,
            "first_step": first,
            "steps": end - first,
            "seconds": seconds.get(name, 0.0),
            "trained_parameters": int(start["trained_parameters"]),
        }
        for (name, start), first, end in zip(starts.items(), first_steps, [*first_steps[1:], last_step], strict=True)
    ]


def _phase_starts(log_history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    starts: dict[str, dict[str, Any]] = {}
    for entry in log_history:
        if "phase" in entry and "phase_first_step" in entry:
            starts.setdefault(entry["phase"], entry)  # a resumed run may announce its phase again
    return starts


def eval_seconds(log_history: list[dict[str, Any]]) -> float:
    """Seconds in all evaluations of a run."""
    return sum(v for e in log_history for k, v in e.items() if k.startswith("eval_") and k.endswith("_runtime"))


def eval_values(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The `eval_*` values of an evaluation or a log entry, without those on its speed."""
    return {k: v for k, v in entry.items() if k.startswith("eval_") and not k.endswith(_SPEED_KEYS)}


def saved_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder (its safetensors files)."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step: a reader sees the old file or the new one. NaN and infinities become null."""
    _replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, as `write_json` does."""
    _replace(path, "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file or it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no such file.

    Raises:
        ValueError: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise ValueError(
                f"{path}, line {number}, must be a JSON object, got {line[:80]!r}; delete the file, and make it again."
            )
    return rows


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two records, as phrases "<key>: <old> there, <new> here"; nested keys have dots."""
    a, b = _flat(_finite(old)), _flat(_finite(new))
    missing = "nothing"
    return [
        f"{key}: {a.get(key, missing)!r} there, {b.get(key, missing)!r} here"
        for key in sorted({*a, *b})
        if a.get(key, missing) != b.get(key, missing)
    ]


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, last step first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(m[1]), p) for p in output_dir.glob("*") if (m := pattern.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
