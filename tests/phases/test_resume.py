"""Runs killed anywhere and resumed in a fresh process end bit for bit like one that was never stopped.

Every run is a process of its own, forked from one that has done nothing but import, which takes most of such a run's
time. Those that resume have another parent with a hash seed of its own, or are fresh interpreters as a user's are.

Weight decay, warm-up, dropout, a scaled priming rate, and a clip norm that bites are on (tests/support/training.py).
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
import torch
from forks import Warm
from runs import train_tiny

Run = Callable[..., int]


def forked(warm: Warm) -> Run:
    """What gives the exit status of a run; negative for a signal."""

    def run(out: Path, *options: str) -> int:
        job = warm.start("runs.train_tiny:main", [str(out), *options], log=out / "log.txt")
        status = job.wait()
        assert status in (0, -9), job.output()[-3000:]
        return status

    return run


@pytest.fixture(scope="module")
def run(warm: Warm) -> Run:
    return forked(warm)


@pytest.fixture(scope="module")
def resume() -> Iterator[Run]:
    warm = Warm("peft", "transformers.trainer", PYTHONHASHSEED="random")
    yield lambda out, *options: forked(warm)(out, "--resume", *options)
    warm.close()


def resume_afresh(out: Path, *options: str) -> int:
    command = [sys.executable, train_tiny.__file__, str(out), "--resume", *options]
    done = subprocess.run(command, env=processes.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.returncode


#: By tuner: the phases with their first steps, and the parts whose state the optimizer has let go of at the end.
TUNERS = {
    "learner": ({"priming": 0, "learning": 5}, "learner_dense_delta"),
    "learner-fold": ({"priming": 0, "learning": 5}, "learner_dense_delta"),
    "far": ({"priming": 0, "reconfigured": 5}, None),
    "far-discard": ({"priming": 0, "reconfigured": 5}, None),
    "nas": ({"search_1": 0, "search_2": 3, "retraining": 6}, None),
    "nas-structured": ({"search": 0, "retraining": 5}, None),
    "bottleneck": ({"training": 0}, None),
}


@pytest.fixture(scope="module")
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    @functools.cache
    def train(tuner: str) -> dict:
        out = tmp_path_factory.mktemp("uninterrupted")
        assert run(out, "--tuner", tuner) == 0
        return torch.load(out / "final.pt")

    return train


#: In priming, on the boundary, after it, all in mid-epoch. Without the unkept only the boundary differs. NAS-LoRA: in
#: a search, between two of them, in the second, on its end, in the retraining.
CASES = [
    *((tuner, step) for tuner in ("learner", "learner-fold", "far") for step in (2, 5, 7)),
    ("far-discard", 5),
    *(("nas", step) for step in (2, 3, 4, 6, 7)),
    *(("nas-structured", step) for step in (4, 5)),
    ("bottleneck", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("tuner,kill_after", CASES)
def test_killed(tmp_path: Path, run, resume, uninterrupted, tuner, kill_after):
    """A run that was killed and resumed ends with the same bits."""
    expected = uninterrupted(tuner)
    starts, let_go = TUNERS[tuner]
    assert run(tmp_path, "--tuner", tuner, "--kill_after", str(kill_after)) == -9
    assert not (tmp_path / "final.pt").exists()
    resume = resume_afresh if (tuner, kill_after) == ("learner", 5) else resume
    assert resume(tmp_path, "--tuner", tuner) == 0
    resumed = torch.load(tmp_path / "final.pt")
    assert expected["starts"] == starts
    assert resumed["learned"] == expected["learned"]
    for part in ("adapter", "optimizer"):
        assert resumed[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(resumed[part][name], value), name
    assert let_go is None or not [name for name in resumed["optimizer"] if let_go in name]
    moments = {name.rpartition("/")[0]: v for name, v in resumed["optimizer"].items() if name.endswith("exp_avg")}
    assert all(moments[name].shape == resumed["adapter"][name].shape for name in moments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [["per_device_train_batch_size=4"], ["num_train_epochs=5"], ["ignore_data_skip=true"]],
    ids=lambda changed: changed[0].split("=")[0],
)
def test_changed_settings(tmp_path: Path, run, resume, changed):
    """A resumed run keeps its boundary, whatever else was changed."""
    assert run(tmp_path, "--kill_after", "2") == -9
    assert resume(tmp_path, "--set", *changed) == 0
    assert torch.load(tmp_path / "final.pt")["starts"] == {"priming": 0, "learning": 5}
