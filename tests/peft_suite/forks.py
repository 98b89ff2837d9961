"""Runs pytest several times, each time on another copy of the package, at the price of importing PEFT once."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from peft_suite import runner

#: What PEFT's tests and ours import beside the package: slow, and the same for all copies.
COMMON = (
    "accelerate.test_utils.testing",
    "datasets",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
)
COULD_NOT_START = 70


@dataclass
class Job:
    """A run of pytest.

    Attributes:
        package: folder that holds the copy of the package.
        folder: where pytest runs.
        arguments: pytest's.
        log: file for what it prints.
    """

    package: str
    folder: str
    arguments: list[str]
    log: str


def run(jobs: list[Job]) -> list[int]:
    """Pytest's exit statuses of the jobs, which run one after another in forks of a new process."""
    command = [sys.executable, "-m", "peft_suite.forks"]
    given = json.dumps([asdict(job) for job in jobs])
    done = subprocess.run(command, input=given, env=runner.environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The process to fork from failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_here(job: Job) -> int:
    import pytest

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job.folder)
    sys.path.insert(0, job.package)
    package = importlib.import_module("peft_learners")
    if not Path(str(package.__file__)).is_relative_to(job.package):
        raise ImportError(f"peft_learners is {package.__file__}, not the copy in {job.package}")
    status = pytest.main(job.arguments)
    sys.stdout.flush()
    return int(status)


def _fork(job: Job) -> int:
    child = os.fork()
    if child == 0:
        status = COULD_NOT_START
        try:
            status = _run_here(job)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    for name in COMMON:
        importlib.import_module(name)
    assert "peft_learners" not in sys.modules
    print(json.dumps([_fork(job) for job in jobs]))


if __name__ == "__main__":
    main()
