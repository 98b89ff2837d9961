"""Runs under engines (two gloo ranks on a CPU), killed at random times and started again until they end.

    PYTHONPATH=.:tests:tests/support python -m runs.engine_kills > results/engines/kills.jsonl

Each line is one kill: the share of the time that was left to train at which both ranks were killed, the last step that
was finished, the last whole checkpoint, and how many were half-written. `equal` tells whether the adapter's file at
the end is, bit for bit, that of a run that nobody killed. What is started again is always the same `program`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forks import Job, Warm
from runs.engines_tiny import BOUNDARY, CASES, ONE_RUN, STEPS, Runs, let_a_cpu_use_engines
from torch.nn import Dropout
from transformers import TrainerCallback

from peft_learners import PhaseCallback
from peft_learners.phases.whole_checkpoints import fault_of, last_whole

KILLED = ("fsdp2-full", "zero2", "zero3")
#: Kills of each case in a run of all: thirty, with three engines.
KILLS = {"learner": 4, "far": 3, "nas": 3}
ADAPTER = Path("final", "adapter_model.safetensors")


class Progress(TrainerCallback):
    """Tells, in a file, which steps are finished."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with self.file.open("a") as lines:
                lines.write(f"{state.global_step}\n")

    on_step_end = on_train_begin


def program(folder: str, engine: str, case: str) -> None:
    """What a user starts in each rank: it goes on from whatever whole checkpoints it finds."""
    let_a_cpu_use_engines()
    runs, fsdp = Runs(Path(folder), engine, "distilbert", case), engine.startswith("fsdp2")
    runs.folder = Path(folder)

    def train(name: str, adapter: Path | None, resume: Path | None, steps: int, stop: bool = False) -> Any:
        model = CASES[case]() if adapter is None else runs.loaded(adapter)
        for module in model.modules():  # else random numbers would not matter
            if isinstance(module, Dropout):
                module.p = 0.1
        callbacks = [PhaseCallback(stop_at_boundary=stop), Progress(runs.folder / "progress")]
        own = runs.trainer(name, model, callbacks, max_steps=steps, save_strategy="steps", save_steps=1)
        own.train(resume_from_checkpoint=None if resume is None else str(resume))
        return own

    if case in ONE_RUN:
        last = last_whole(runs.folder / "run")
        own = train("run", last if fsdp else None, last, STEPS)
    else:
        last = last_whole(runs.folder / "first")
        if last is None or step_of(last) < BOUNDARY:
            # The scores of a search lie in the adapter's file.
            adapter = last if fsdp or case.startswith("nas") else None
            train("first", adapter, last, STEPS, stop=True).accelerator.free_memory()
        boundary, last = runs.folder / "first" / f"checkpoint-{BOUNDARY}", last_whole(runs.folder / "second")
        own = train("second", last if fsdp and last else boundary, last, STEPS - BOUNDARY)
    runs.save(own)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def start(warm: Warm, folder: Path, engine: str, case: str) -> list[Job]:
    """Both ranks."""
    folder.mkdir(exist_ok=True)
    return warm.ranks(2, "runs.engine_kills:program", str(folder), engine, case, logs=folder)


def lines_of(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def is_alive(job: Job) -> bool:
    """Whether it has not ended; it may be there until it is waited for."""
    return Path(f"/proc/{job.number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def kill(jobs: Sequence[Job], progress: Path, seconds: float) -> None:
    """Both ranks, so many seconds after their training has begun."""
    began = len(lines_of(progress))
    while len(lines_of(progress)) == began and all(map(is_alive, jobs)):
        time.sleep(0.01)
    time.sleep(seconds)
    for job in jobs:
        os.kill(job.number, signal.SIGKILL)


def finish(jobs: Sequence[Job]) -> None:
    statuses = [job.wait() for job in jobs]
    if statuses != [0, 0]:
        raise RuntimeError("\n".join(job.output()[-3000:] for job in jobs))


def unbroken(warm: Warm, folder: Path, engine: str, case: str) -> float:
    """A run that nobody kills; the seconds from the begin of its training to its end."""
    jobs = start(warm, folder, engine, case)
    while not (folder / "progress").exists() and all(map(is_alive, jobs)):
        time.sleep(0.01)
    began = time.perf_counter()
    finish(jobs)
    return time.perf_counter() - began


def killed(
    warm: Warm, folder: Path, engine: str, case: str, shares: Sequence[float], seconds: float, expected: Path
) -> Iterator[dict[str, Any]]:
    """Kill a run at each of these shares of its time, start it again after each, and tell of each kill.

    Raises:
        RuntimeError: a run did not go on from what the kill had left.
    """
    found, left = [], 1.0
    for share in shares:
        jobs = start(warm, folder, engine, case)
        kill(jobs, folder / "progress", share * left * seconds)
        statuses = {job.wait() for job in jobs}
        if not statuses <= {0, -signal.SIGKILL}:
            raise RuntimeError("\n".join(job.output()[-3000:] for job in jobs))
        if -signal.SIGKILL not in statuses:
            break  # it had come to its end
        name = next(name for name in ("run", "second", "first") if (folder / name).exists())
        written, last = list((folder / name).glob("checkpoint-*")), last_whole(folder / name)
        whole = step_of(last) if last else 0
        told = {"engine": engine, "case": case, "share": round(share, 3), "run": name}
        told |= {"step": int(lines_of(folder / "progress")[-1]), "last_whole": whole}
        told |= {"half_written": sum(fault_of(checkpoint) is not None for checkpoint in written)}
        found.append(told)
        left = 1 - (whole + (BOUNDARY if name == "second" else 0)) / STEPS
    finish(start(warm, folder, engine, case))
    equal = (folder / ADAPTER).read_bytes() == (expected / ADAPTER).read_bytes()
    yield from ({**told, "equal": equal} for told in found)


@contextlib.contextmanager
def warm_process() -> Iterator[Warm]:
    """One to fork ranks from, that has imported what engines need."""
    warm = Warm("runs.engines_tiny", "deepspeed", DS_ACCELERATOR="cpu")
    yield warm
    warm.close()


def main(seed: int = 23) -> None:
    chance = random.Random(seed)
    with warm_process() as warm, tempfile.TemporaryDirectory() as root:
        for engine in KILLED:
            for case, count in KILLS.items():
                expected = Path(root) / f"{engine}-{case}"
                seconds = unbroken(warm, expected, engine, case)
                while count:
                    shares = [chance.random() for _ in range(min(count, chance.choice((1, 2))))]
                    folder = Path(root) / f"{engine}-{case}-{count}"
                    shutil.rmtree(folder, ignore_errors=True)
                    for told in killed(warm, folder, engine, case, shares, seconds, expected):
                        print(json.dumps(told), flush=True)
                        count -= 1


if __name__ == "__main__":
    from runs.engine_kills import main as run_all

    run_all()
