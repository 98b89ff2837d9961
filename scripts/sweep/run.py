"""Train methods x tasks x seeds x learning rates, as many as the time allows.

    python -m scripts.sweep.run --model_name_or_path MODEL --data_dir ../shared/glue --jobs 2 --budget_hours 2
    python -m scripts.sweep.run ... --list                            # the order, and what is finished
    python -m scripts.sweep.run ... --tasks rte --variants lora64 -- --max_train_samples 64

Each run is a process of scripts.glue.train; what follows `--` goes to all of them. A run that is finished is skipped,
one that was cut off goes on from its last checkpoint, and one that another sweep of this folder trains is left to it,
so a sweep can be killed at any time, started again, and started twice. What comes in which order says plan.py.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import environ
from pathlib import Path
from typing import Any, Optional

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from scripts.glue import run_record
from scripts.sweep import store as sweep_store
from scripts.sweep.plan import ALL_TASKS, MINILM_ONLY, PROTOCOLS, VARIANTS, Run, planned, settings

#: Seconds between looks at the processes, and before a run that another sweep trained is looked at again.
POLL, LOOK_AGAIN = 0.5, 30.0
#: Seconds between drawings of the progress where stderr is no terminal: a log of hours stays readable.
LOG_PROGRESS = 60.0


@dataclass
class SweepArguments:
    """What is trained, and with what."""

    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "A Hub id or a local folder."}
    )
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "As in scripts.glue.train. Default: from the Hub."}
    )
    out: str = field(default="results/sweep", metadata={"help": "Folder of the results, a file per protocol."})
    protocols: Optional[list[str]] = field(
        default=None, metadata={"help": f"Of {', '.join(PROTOCOLS)}; default: all."}
    )
    tasks: Optional[list[str]] = field(default=None, metadata={"help": f"Of {', '.join(ALL_TASKS)}; default: all."})
    variants: Optional[list[str]] = field(default=None, metadata={"help": f"Of {', '.join(VARIANTS)}; default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "In their order."})
    devices: Optional[list[str]] = field(
        default=None,
        metadata={"help": "'cpu', or numbers of GPUs as this process sees them. Default: all GPUs, cpu without any."},
    )
    jobs: int = field(default=1, metadata={"help": "Runs side by side on each device."})
    threads: Optional[int] = field(default=None, metadata={"help": "CPU threads per run. Default: cores / runs."})
    budget_hours: Optional[float] = field(
        default=None, metadata={"help": "Stop after so many hours; what is cut off goes on next time."}
    )
    keep: Optional[str] = field(
        default=None, metadata={"help": "Folder for the adapters of finished runs. Default: they are deleted."}
    )
    list: bool = field(default=False, metadata={"help": "Print the order and what is finished, and train nothing."})

    def __post_init__(self) -> None:
        for name, values in {"protocols": PROTOCOLS, "tasks": ALL_TASKS, "variants": VARIANTS}.items():
            if unknown := [value for value in getattr(self, name) or () if value not in values]:
                raise ValueError(f"--{name} must be of {', '.join(values)}, got {', '.join(unknown)}.")
        for name in ("jobs", "threads", "budget_hours"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be above 0, got {value}.")
        if not self.seeds:
            raise ValueError("--seeds must name at least one seed, got none.")


@dataclass
class Job:
    """A run in training."""

    run: Run
    process: subprocess.Popen
    device: str
    log: Path

    def progress(self) -> str:
        """Steps of the training so far, from the log's progress bars; those of evaluations have fewer."""
        try:
            text = self.log.read_bytes()
        except FileNotFoundError:  # another sweep found the run finished, and cleared its folder
            return self.run.name
        bars = re.findall(rb"(\d+)/(\d+) \[[^\]]*(?:it/s|s/it)", text[-4096:])  # others count examples
        step, total = max(((int(a), int(b)) for a, b in bars), key=lambda bar: (bar[1], bar[0]), default=(0, 0))
        return f"{self.run.name} {step}/{total}" if total else self.run.name


class Sweep:
    """A sweep over one folder."""

    def __init__(self, args: SweepArguments, extra: Sequence[str] = ()) -> None:
        self.args, self.extra = args, list(extra)
        self.out = Path(args.out)
        self.devices = args.devices or [str(i) for i in range(torch.cuda.device_count())] or ["cpu"]
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        self.visible = {name: visible_device(name, visible) for name in self.devices if name != "cpu"}
        cores = environ.get("OMP_NUM_THREADS") or max(1, torch.get_num_threads() // (args.jobs * len(self.devices)))
        self.threads = args.threads or int(cores)
        self.jobs: list[Job] = []
        self.failed: list[Run] = []
        self.elsewhere: dict[Run, float] = {}
        self.records: dict[Run, sweep_store.Record] = {}
        label = run_record.model_label(args.model_name_or_path).split("/")[-1]
        self.about = sweep_store.About(label, changed_settings(self.extra))

    # -- what there is ---------------------------------------------------------------------------------------------

    def read(self) -> list[Run]:
        """Read the finished runs again; returns all runs in their order."""
        args = self.args
        self.records = self.finished()
        self.elsewhere = {run: moment for run, moment in self.elsewhere.items() if run not in self.records}
        scores = sweep_store.holdout_scores(self.records)
        runs = planned(scores, args.seeds, args.tasks, args.variants, args.protocols)
        return runs if self.about.model == sweep_store.MODEL else [r for r in runs if r.variant not in MINILM_ONLY]

    def finished(self) -> dict[Run, sweep_store.Record]:
        """The finished runs. Those that are so since the last look move into the protocols' files."""
        if self.args.list:
            return sweep_store.finished(self.out, self.about)
        return sweep_store.collect(self.out, self.about, self.args.keep)

    def work(self, run: Run) -> Path:
        """Folder of a run in training."""
        return self.out / sweep_store.WORK / run.name

    def command(self, run: Run) -> list[str]:
        """The command of a run."""
        args = self.args
        words: dict[str, Any] = {
            "task": run.task,
            "method": VARIANTS[run.variant].method,
            "model_name_or_path": args.model_name_or_path,
            "data_dir": args.data_dir,
            "output_dir": self.work(run),
            "save_total_limit": 1,
            "disable_tqdm": False,
            **settings(run),
        }
        pairs = [word for key, value in words.items() if value is not None for word in (f"--{key}", str(value))]
        return [sys.executable, "-m", "scripts.glue.train", *pairs, *self.extra]

    # -- training --------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Train until all is finished or the budget ends; returns the number of runs that failed."""
        deadline = time.monotonic() + 3600 * (self.args.budget_hours or float("inf"))
        self.about.write(self.out)
        runs = self.read()
        pause = POLL if sys.stderr.isatty() else LOG_PROGRESS
        with tqdm(
            total=len(runs), initial=len(self.finished_of(runs)), unit="run", mininterval=pause, miniters=0
        ) as bar:
            try:
                while time.monotonic() < deadline and self.start(runs):
                    if self.collect():
                        runs = self.read()
                    bar.total = len(runs)
                    bar.set_postfix_str("; ".join(job.progress() for job in self.jobs), refresh=False)
                    bar.update(len(self.finished_of(runs)) - bar.n)
                    time.sleep(POLL)
            finally:
                self.stop()
        return len(self.failed)

    def finished_of(self, runs: Sequence[Run]) -> list[Run]:
        return [run for run in runs if run in self.records]

    def start(self, runs: Sequence[Run]) -> bool:
        """Start what free places allow; returns whether there is anything to wait for."""
        busy = {job.run for job in self.jobs}
        todo = [run for run in runs if run not in self.records and run not in busy and run not in self.failed]
        for device in self.devices:
            free = self.args.jobs - sum(job.device == device for job in self.jobs)
            for run in [run for run in todo if self.elsewhere.get(run, 0.0) < time.monotonic()]:
                if free < 1:
                    break
                if run_record.is_busy(self.work(run)):
                    self.elsewhere[run] = time.monotonic() + LOOK_AGAIN
                    continue
                todo.remove(run)
                self.records = self.finished()  # another sweep may have finished it since the last look
                if run not in self.records:
                    self.jobs.append(self.launch(run, device))
                    free -= 1
        return bool(self.jobs or todo)

    def launch(self, run: Run, device: str) -> Job:
        folder = self.work(run)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        variables = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        command = self.command(run)
        if device == "cpu":
            command.append("--use_cpu")
        else:
            variables["CUDA_VISIBLE_DEVICES"] = self.visible[device]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**environ, **variables}
            )
        return Job(run, process, device, log)

    def collect(self) -> bool:
        """Take the processes that have ended; returns whether any run may have been finished."""
        ended = [job for job in self.jobs if job.process.poll() is not None]
        for job in ended:
            self.jobs.remove(job)
            if job.process.returncode == run_record.EXIT_BUSY:
                self.elsewhere[job.run] = time.monotonic() + LOOK_AGAIN
            elif job.process.returncode:
                self.failed.append(job.run)
                tqdm.write(f"{job.run.name} failed with status {job.process.returncode}: see {job.log}")
        over = [run for run, moment in self.elsewhere.items() if moment < time.monotonic()]
        for run in over:
            del self.elsewhere[run]
        return bool(ended or over)

    def stop(self) -> None:
        """End the processes; their runs go on from their last checkpoints next time."""
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            job.process.wait()


def visible_device(number: str, visible: Optional[str]) -> str:
    """What `CUDA_VISIBLE_DEVICES` must be for a process that is to have one GPU alone.

    Args:
        number: of the GPU as this process sees it.
        visible: this process's own `CUDA_VISIBLE_DEVICES`; None or empty: it sees all.

    Raises:
        ValueError: this process does not see so many.
    """
    if not visible:
        return number
    names = [name.strip() for name in visible.split(",")]
    if not (number.isdecimal() and int(number) < len(names)):
        raise ValueError(
            f"--devices must be numbers below {len(names)}, got {number}: CUDA_VISIBLE_DEVICES={visible} leaves "
            f"{len(names)}, which are counted from 0."
        )
    return names[int(number)]


def changed_settings(extra: Sequence[str]) -> dict[str, Any]:
    """The settings in `--name value` words that decide what a run is, as scripts.glue.train records them."""
    if not extra:
        return {}
    from scripts.glue.arguments import GlueTrainingArguments, ScriptArguments, run_config
    from scripts.glue.method_arguments import MethodArguments

    parser = HfArgumentParser((ScriptArguments, MethodArguments, GlueTrainingArguments))
    script, method, training = parser.parse_args_into_dataclasses(["--task", "rte", "--use_cpu", *extra])
    config = {**run_config(script, method, training), **asdict(method)}
    names = [word.removeprefix("--").split("=")[0] for word in extra if word.startswith("--")]
    return {name: config[name] for name in names if name in config and name != "float32_matmul_precision"}


def listing(sweep: Sweep) -> str:
    """The runs in their order, with a mark at the finished ones."""
    runs = sweep.read()
    lines = [f"{'x' if run in sweep.records else ' '} {run.name}" for run in runs]
    return "\n".join([*lines, f"{len(sweep.finished_of(runs))} of {len(runs)} finished"])


def parsed(argv: Optional[Sequence[str]] = None) -> Sweep:
    """The sweep that the words of a command line ask for."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    (args,) = HfArgumentParser(SweepArguments, description=__doc__).parse_args_into_dataclasses(own)
    return Sweep(args, extra)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; returns the number of runs that failed."""
    sweep = parsed(argv)
    if sweep.args.list:
        print(listing(sweep))
        return 0
    return sweep.train()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128))  # through `finally`, which ends the processes
    sys.exit(min(main(), 100))
