"""Train the runs of a protocol, as many as the time allows.

    python -m scripts.evidence.sweep --model_name_or_path MODEL --data_dir ../shared/glue --jobs 2 --budget_hours 2
    python -m scripts.evidence.sweep --list                          # the order, and what is finished
    python -m scripts.evidence.sweep ... --only 'grammar-(lora|fold)-.*'

Each job is a process that takes the first run in the plan that is not finished and that no other job trains. A
finished run is a line of `--out`. A run that was cut off goes on from its last checkpoint. So a sweep can be killed at
any time, started again, and started twice.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from scripts.evidence.plan import FILE, Protocol, Run
from scripts.glue import run_record

OUT = Path("results/evidence/runs.jsonl")
WORK = Path("runs/evidence")
#: File in a run's folder that says what its checkpoints were made with.
SETTINGS = "settings.json"
#: Seconds before a job that finds all that is left in training elsewhere looks again.
LOOK_AGAIN = 5.0

Record = dict[str, Any]


def finished(protocol: Protocol, out: Path = OUT) -> dict[Run, Record]:
    """The finished runs and their records.

    Raises:
        ValueError: a line is of no run of the protocol, or was made with other settings or rows than the protocol has.
    """
    found = {Run.parse(str(row.get("run"))): row for row in run_record.read_lines(out)}
    for run, record in found.items():
        if run.task not in protocol.tasks or run.variant not in protocol.variants:
            raise ValueError(f"{out} must hold runs of the protocol's tasks and variants, got {run.name}.")
        there = {**record["settings"], "rows": record["rows"]}
        if changed := run_record.differences(there, protocol.identity(run)):
            raise ValueError(
                f"{out}, {run.name}, was made with other settings ({'; '.join(changed)}). Delete the line to train it "
                "again."
            )
    return found


def scores(protocol: Protocol, records: Mapping[Run, Record]) -> dict[Run, float]:
    """What each run is judged by at its end, on the rows to choose by."""
    return {run: protocol.value(run.task, record["curve"][-1]) for run, record in records.items()}


def add(out: Path, record: Record) -> None:
    """Add a run's line to the file, which is replaced whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / ".lock"):
        run_record.write_lines(out, [*run_record.read_lines(out), record])


def _open(folder: Path, protocol: Protocol, run: Run) -> None:
    """Clear a run's folder of checkpoints that were made with other settings."""
    here, there = protocol.identity(run), run_record.read_json(folder / SETTINGS)
    if there is None or run_record.differences(there, here):
        for checkpoint in run_record.checkpoints(folder):
            shutil.rmtree(checkpoint)
        run_record.write_json(folder / SETTINGS, here)


def wanted(args: argparse.Namespace, done: Mapping[Run, Record]) -> list[Run]:
    """The runs in their order, as far as the finished ones tell."""
    runs = args.protocol.planned(scores(args.protocol, done))
    return [run for run in runs if re.fullmatch(args.only, run.name)]


def work(args: argparse.Namespace) -> int:
    """Train runs until none is left or the time is over; returns how many failed."""
    import datasets
    import transformers

    from scripts.evidence.run import train

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    failed: set[Run] = set()
    while time.time() < args.deadline:
        done = finished(args.protocol, args.out)
        left = [run for run in wanted(args, done) if run not in done and run not in failed]
        if not left:
            break
        for run in left:
            folder = args.work / run.name
            try:
                with run_record.only_process(folder):
                    if run not in finished(args.protocol, args.out):  # another job's, since the last look
                        print(run.name, flush=True)
                        _open(folder, args.protocol, run)
                        add(args.out, train(args.protocol, run, args.data_dir, args.model_name_or_path, folder))
                    shutil.rmtree(folder, ignore_errors=True)  # another job may clear it too
            except run_record.BusyError:
                continue
            except Exception as error:  # the others go on
                print(f"{run.name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed.add(run)
            break
        else:
            time.sleep(LOOK_AGAIN)
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the number of jobs with a run that failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data_dir", type=Path, help="folder of GLUE's tasks as TSV files, as in scripts.glue.train")
    parser.add_argument("--protocol", type=Path, default=FILE, help="YAML file")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the finished runs")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the runs in training")
    parser.add_argument("--only", default=".*", help="a regex: train only runs whose whole name it matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--budget_hours", type=float, default=float("inf"), help="begin no run after that time")
    parser.add_argument("--list", action="store_true", help="print the order and what is finished, and train nothing")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # of a job
    args = parser.parse_args(words)
    args.protocol = Protocol.read(args.protocol)
    if args.list:
        done = finished(args.protocol, args.out)
        print(*(f"{'x' if run in done else ' '} {run.name}" for run in wanted(args, done)), sep="\n")
        return 0
    if args.deadline is not None:
        return work(args)
    deadline = time.time() + 3600 * args.budget_hours
    command = [sys.executable, "-m", "scripts.evidence.sweep", *words, "--deadline", str(deadline)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // args.jobs))
    jobs = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}) for _ in range(args.jobs)]
    try:
        return sum(bool(job.wait()) for job in jobs)
    finally:
        for job in jobs:
            job.terminate()
            job.wait()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128))  # through `finally`, which ends the jobs
    sys.exit(main())
