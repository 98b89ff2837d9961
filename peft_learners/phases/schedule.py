"""Phases and steps: pure integers, no torch.

A method is a list of phases. This module turns epochs into optimizer steps once, and says in which phase a step lies.
Everything else (layers, optimizers, processes) lives elsewhere and asks here.

Steps are counted as *finished optimizer steps*: `global_step` 0 is before the first step, and a phase with
`first_step == k` owns the steps that start when k steps are finished. A boundary therefore lies between two steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


class ScheduleError(ValueError):
    """The phases of a method can't be laid over the training that was asked for."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: the phase's name, as it appears in logs and in `completed_phases` of the adapter's config.
        first_step: number of optimizer steps that are finished when the phase begins.
        freezes: names of the adapter's parts (containers of a tuner layer) that don't train in it.
        begins_anew: whether it is a training of its own: all values have been rewound, so the optimizer has no state
            and the learning rate goes through its whole schedule again.
    """

    name: str
    first_step: int
    freezes: frozenset[str] = frozenset()
    begins_anew: bool = False


@dataclass(frozen=True)
class Schedule:
    """Phases in order. The first begins at step 0, and each later one strictly after the one before.

    Raises:
        ScheduleError: no phase, a first phase that does not begin at 0, first steps that do not increase, or two
            phases of one name.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ScheduleError("A schedule needs at least one phase, got none.")
        steps = [phase.first_step for phase in self.phases]
        if steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ScheduleError(f"The first steps of the phases must begin at 0 and increase, got {steps}.")
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ScheduleError(f"The names of the phases must differ, got {names}.")

    def index_at(self, global_step: int) -> int:
        """Index of the phase that owns the step which begins when `global_step` steps are finished."""
        return sum(phase.first_step <= global_step for phase in self.phases) - 1

    def phase_at(self, global_step: int) -> Phase:
        """The phase that owns the step which begins when `global_step` steps are finished."""
        return self.phases[self.index_at(global_step)]

    def completed(self, global_step: int) -> list[str]:
        """Names of the phases that are over when `global_step` steps are finished."""
        return [phase.name for phase in self.phases[: self.index_at(global_step)]]

    @property
    def first_steps(self) -> dict[str, int]:
        """`{phase name: first step}`, in order; a checkpoint keeps it, so that a resumed run has the same boundary."""
        return {phase.name: phase.first_step for phase in self.phases}

    def last_only(self) -> Schedule:
        """The schedule of an adapter whose earlier phases are complete: its last phase from step 0 on."""
        return Schedule((replace(self.phases[-1], first_step=0),))

    def with_first_steps(self, first_steps: Mapping[str, int]) -> Schedule:
        """The same parts on recorded boundaries (a resumed run).

        Raises:
            ScheduleError: a recorded phase that this method does not have.
        """
        known = {phase.name: phase for phase in self.phases}
        unknown = set(first_steps) - set(known)
        if unknown:
            raise ScheduleError(
                f"The recorded phases {sorted(unknown)} are not phases of this adapter, which has {sorted(known)}: "
                "was the checkpoint written with another configuration?"
            )
        ordered = sorted(first_steps.items(), key=lambda item: item[1])
        return Schedule(tuple(replace(known[name], first_step=step) for name, step in ordered))


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Optimizer steps in `epochs` epochs: rounded half up, and at least 1 for any positive number of epochs.

    Raises:
        ScheduleError: `steps_per_epoch` below 1, or `epochs` negative or not finite.
    """
    if steps_per_epoch < 1:
        raise ScheduleError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}.")
    if not (math.isfinite(epochs) and epochs >= 0):
        raise ScheduleError(f"epochs must be a finite number of at least 0, got {epochs}.")
    if epochs == 0:
        return 0
    return max(1, math.floor(epochs * steps_per_epoch + 0.5))


def ratio_to_steps(ratio: float, total_steps: int) -> int:
    """Optimizer steps in a share of all: rounded half up, and at least 1 for any positive ratio.

    Raises:
        ScheduleError: `ratio` outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ScheduleError(f"A share of the training must lie in [0, 1], got {ratio}.")
    return 0 if ratio == 0 else max(1, math.floor(ratio * total_steps + 0.5))


def lay_out(
    lengths: Sequence[tuple[str, int | None]],
    total_steps: int | None,
    advice: str = "",
    begin_anew: bool = False,
    freezes: Mapping[str, frozenset[str]] | None = None,
) -> Schedule:
    """Put phases of given lengths one behind the other.

    Args:
        lengths: `(name, number of optimizer steps)`; a length of 0 leaves the phase out, and only the last may be
            None (whatever is left).
        total_steps: optimizer steps of the whole training; None if unknown (then nothing can be checked).
        advice: what the user can do when the steps don't suffice; ends the error's sentence.
        begin_anew: whether each phase is a training of its own.
        freezes: parts that don't train, by the phase's name.

    Raises:
        ScheduleError: the phases before the last need more steps than training has.
    """
    phases, step = [], 0
    for name, length in lengths:
        if length == 0:
            continue
        phases.append(Phase(name, step, (freezes or {}).get(name, frozenset()), begin_anew))
        step += length or 0
    if total_steps is not None and step > total_steps:
        raise ScheduleError(
            f"{' and '.join(phase.name for phase in phases[:-1])} needs {step} optimizer steps, but training has only "
            f"{total_steps}. {advice}".rstrip()
        )
    return Schedule(tuple(phases))
