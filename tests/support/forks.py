"""Processes forked from one that has done nothing but import, which takes most of a small process's time.

warm = Warm("peft", "transformers.trainer")
job = warm.start("train_tiny:main", [str(out)], log=out / "log.txt")
assert job.wait() == 0, job.output()
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes

COULD_NOT_START = 70


@dataclass
class Job:
    """A running fork. What it prints goes to `log`, and stderr to a file beside it."""

    warm: Warm
    number: int
    log: Path

    def wait(self) -> int:
        """The exit status; negative for a signal."""
        return self.warm.ask(wait=self.number)

    def output(self) -> str:
        return self.log.read_text() + _errors(self.log).read_text()


def _errors(log: Path) -> Path:
    return log.with_name(f"{log.name}.stderr")


class Warm:
    """A process to fork from. It ends with this one.

    Args:
        imports: names of modules that it imports.
        environment: what it has beside `processes.environment`, such as a hash seed of its own.
    """

    def __init__(self, *imports: str, **environment: str) -> None:
        command = [sys.executable, "-m", "forks", *imports]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=processes.environment(**environment), stdin=pipe, stdout=pipe, text=True
        )

    def ask(self, **question: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process to fork from is gone: exit status {self.process.wait()}")
        return int(answer)

    def start(self, target: str, *arguments: Any, log: Path, folder: Path | None = None, **environment: str) -> Job:
        """Fork, and call there `target` ("module:function") with arguments that JSON can hold. What it returns is its
        exit status if it is a number.

        Args:
            log: where its stdout goes, and that of its own processes.
            folder: where it runs.
            environment: what it has beside its parent's.
        """
        number = self.ask(
            target=target, arguments=arguments, log=str(log), folder=folder and str(folder), environment=environment
        )
        return Job(self, number, log)

    def run(self, target: str, *arguments: Any, log: Path, **more: Any) -> int:
        return self.start(target, *arguments, log=log, **more).wait()

    def python(self, code: str, *arguments: str, log: Path) -> str:
        """What code prints, as `python -c` would run it.

        Raises:
            RuntimeError: it failed.
        """
        job = self.start("forks:execute", code, list(arguments), log=log)
        if job.wait():
            raise RuntimeError(job.output())
        return log.read_text().strip()

    def results(self, target: str, out: Path, ranks: int, *arguments: Any, **environment: str) -> dict[str, Any]:
        """What `target` leaves as `results.json` in a new folder, which it is given; in several ranks of one world, or
        in one process without.

        Args:
            arguments: further ones.
            environment: what it has beside its parent's.
        """

        def start() -> list[Job]:
            out.mkdir()
            return self.ranks(ranks, target, str(out), *arguments, logs=out, **environment)

        jobs = start()
        statuses = [job.wait() for job in jobs]
        if min(statuses) < 0:  # a signal: gloo's own thread has crashed once, in libc, in a run that passes otherwise
            print(f"{target} in {out}: exit statuses {statuses}, started once more", file=sys.stderr)
            shutil.rmtree(out)
            jobs = start()
            statuses = [job.wait() for job in jobs]
        assert statuses == [0] * ranks, [job.output()[-3000:] for job in jobs]
        return json.loads((out / "results.json").read_text())

    def ranks(self, count: int, target: str, *arguments: Any, logs: Path, **environment: str) -> list[Job]:
        """Start the ranks of one world, or one process without.

        Args:
            logs: folder in which `log-RANK` is where a rank's stdout goes.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        jobs = []
        for rank in map(str, range(count)):
            own = {} if count == 1 else {**world, "RANK": rank, "LOCAL_RANK": rank}
            jobs.append(self.start(target, *arguments, log=logs / f"log-{rank}", **own, **environment))
        return jobs

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def execute(code: str, arguments: Sequence[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def _in_fork(target: str, arguments: Sequence[Any], log: str, folder: str | None, environment: dict[str, str]) -> int:
    for stream, path in ((1, log), (2, _errors(Path(log)))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    module, _, function = target.partition(":")
    try:
        status = getattr(importlib.import_module(module), function)(*arguments)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else 0


def main(imports: Sequence[str]) -> None:
    import gc

    for name in imports:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported is no garbage of the forks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                status = COULD_NOT_START
                try:
                    status = _in_fork(**question)
                finally:
                    os._exit(status)
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    from forks import main as start  # the same functions as a fork's "forks:..."

    start(sys.argv[1:])
