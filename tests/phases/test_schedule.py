from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_learners import LearnerConfig
from peft_learners.phases.schedule import Phase, Schedule, ScheduleError, epochs_to_steps, lay_out

A, B = frozenset({"p", "q"}), frozenset({"p"})


def two(first: int) -> Schedule:
    return Schedule((Phase("one", 0, A), Phase("two", first, B)))


@pytest.mark.parametrize(
    "epochs,per_epoch,steps",
    [(0, 10, 0), (1, 10, 10), (2, 230, 460), (0.5, 7, 4), (0.5, 10, 5), (0.25, 10, 3), (1e-9, 10, 1), (1.5, 3, 5)],
)
def test_epochs_to_steps(epochs, per_epoch, steps):
    """Epochs are rounded half up to steps, at least one."""
    assert epochs_to_steps(epochs, per_epoch) == steps


@pytest.mark.parametrize("epochs,per_epoch", [(-1, 10), (float("nan"), 10), (float("inf"), 10), (1, 0)])
def test_epochs_to_steps_refuses(epochs, per_epoch):
    with pytest.raises(ScheduleError):
        epochs_to_steps(epochs, per_epoch)


def test_phase_at():
    """A phase owns the steps that begin at or after its first."""
    schedule = two(3)
    assert [schedule.phase_at(step).name for step in range(5)] == ["one", "one", "one", "two", "two"]
    assert [schedule.completed(step) for step in (2, 3)] == [[], ["one"]]


@pytest.mark.parametrize(
    "phases",
    [(), (Phase("a", 1, A),), (Phase("a", 0, A), Phase("b", 0, B)), (Phase("a", 0, A), Phase("a", 2, B))],
)
def test_impossible_schedules(phases):
    """Impossible schedules are refused."""
    with pytest.raises(ScheduleError):
        Schedule(phases)


def test_recorded_boundaries():
    """Recorded boundaries win."""
    assert two(3).with_first_steps({"one": 0, "two": 8}).first_steps == {"one": 0, "two": 8}
    assert two(3).with_first_steps({"two": 0}).first_steps == {"two": 0}
    with pytest.raises(ScheduleError, match=r"\['three'\] are not phases"):
        two(3).with_first_steps({"three": 0})


def test_empty_phase():
    """A phase of no length is left out."""
    assert lay_out([("one", 0), ("two", None)], 10).first_steps == {"two": 0}


def test_too_few_steps():
    """The error names what is needed and what there is."""
    assert lay_out([("one", 10), ("two", None)], 10).first_steps == {"one": 0, "two": 10}
    with pytest.raises(ScheduleError, match=r"one needs 10 optimizer steps, but training has only 9\. Do this\."):
        lay_out([("one", 10), ("two", None)], 9, "Do this.")


def test_learner_schedule():
    schedule = LearnerConfig(priming_epochs=2).schedule(total_steps=1150, steps_per_epoch=230)
    assert schedule.first_steps == {"priming": 0, "learning": 460}
    assert [phase.freezes for phase in schedule.phases] == [set(), {"learner_dense_delta"}]
    assert LearnerConfig(priming_epochs=0).schedule(10, 5).first_steps == {"learning": 0}
    assert LearnerConfig(priming_steps=7).schedule(None, None).first_steps == {"priming": 0, "learning": 7}
    assert LearnerConfig(priming_steps=0).schedule(10, None).first_steps == {"learning": 0}


def test_no_torch():
    """The module needs no torch."""
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('schedule', sys.argv[1]); "
        "m = u.module_from_spec(s); sys.modules['schedule'] = m; s.loader.exec_module(m); "
        "assert 'torch' not in sys.modules"
    )
    import peft_learners.phases.schedule as module

    subprocess.run([sys.executable, "-c", code, module.__file__], check=True)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_advised_priming_fits(total, per_epoch):
    """The value that the error of a priming without an end advises leaves steps to prime and to learn."""
    config = LearnerConfig(priming_epochs=1_000_000)
    with pytest.raises(ScheduleError, match=r"for example LearnerConfig\(priming_epochs=") as error:
        config.schedule(total, per_epoch)
    advised = float(str(error.value).partition("LearnerConfig(priming_epochs=")[2].partition(")")[0])
    schedule = LearnerConfig(priming_epochs=advised).schedule(total, per_epoch)
    assert total == 1 or 0 < schedule.first_steps["learning"] < total
