"""Learning-rate schedules that begin anew where a phase does: each such phase has its own warm-up and decay."""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler

from .driver import PhaseDriver
from .optimizer import raw_optimizer
from .schedule import ScheduleError

Factor = Callable[[int], float]


def _factor_of(name: str, lr: float, warmup_steps: int, steps: int, settings: Mapping[str, Any] | None) -> Factor:
    """The factor of transformers' schedule `name` over `steps` optimizer steps.

    Args:
        lr: the optimizer's own rate, which kinds with an absolute end value divide by.
    """
    scratch = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device="cpu"))], lr=lr)
    scheduler = get_scheduler(name, scratch, warmup_steps, steps, dict(settings or {}))
    if not isinstance(scheduler, LambdaLR):
        raise ScheduleError(
            f"lr_scheduler_type={str(getattr(name, 'value', name))!r} can't begin anew at a phase boundary: it "
            "is no function of the step. Choose one that is: 'linear', 'cosine', 'constant', ..."
        )
    return scheduler.lr_lambdas[0]


def _restarting(
    name: str,
    lr: float,
    warmup: Callable[[int], int],
    first_steps: Sequence[int],
    total_steps: int,
    settings: Mapping[str, Any] | None,
) -> Factor:
    """The factor of a schedule in pieces, one after the other, each with its own warm-up.

    Args:
        warmup: steps of warm-up in a piece of so many steps.
        first_steps: of the pieces; ascending, the first is 0.
    """
    ends = [*first_steps[1:], total_steps]
    lengths = [end - first for first, end in zip(first_steps, ends, strict=True)]
    if any(warmup(length) >= length for length in lengths):
        warnings.warn(
            f"The warm-up of {max(warmup(length) for length in lengths)} steps is as long as a phase of "
            f"{min(lengths)} steps, each of which has its own: the learning rate never reaches its peak there. Give "
            "the warm-up as a share of the steps (warmup_steps=0.06).",
            stacklevel=3,
        )
    pieces = [_factor_of(name, lr, warmup(length), length, settings) for length in lengths]

    # A function, and no object that can be called: LambdaLR would save an object's values into checkpoints.
    def factor(step: int) -> float:
        index = bisect.bisect_right(first_steps, step) - 1
        return pieces[index](step - first_steps[index])

    return factor


def restart_schedule(scheduler: Any, args: Any, first_steps: Sequence[int], total_steps: int) -> None:
    """Let Trainer's own schedule, made for the whole run, begin anew at each of `first_steps`.

    The scheduler stays the same object, so a resumed run, which loads its state, finds it as it was. A scheduler that
    the user gave to Trainer is left alone, with a warning.

    Args:
        scheduler: what Trainer steps.
        args: Trainer's arguments, from which it was made.
        first_steps: ascending, the first is 0.
        total_steps: optimizer steps of the whole run.

    Raises:
        ScheduleError: a kind of schedule that is no function of the step.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    name, settings = args.lr_scheduler_type, args.lr_scheduler_kwargs
    optimizer = raw_optimizer(getattr(scheduler, "optimizer", None))
    lr = float(optimizer.defaults["lr"]) if optimizer is not None else args.learning_rate
    whole = _factor_of(name, lr, args.get_warmup_steps(total_steps), total_steps, settings)
    if not isinstance(scheduler, LambdaLR) or not all(_is_kind(own, whole) for own in scheduler.lr_lambdas):
        warnings.warn(
            "The learning-rate scheduler that was given to Trainer goes on across the phase boundary: only those that "
            "Trainer makes from lr_scheduler_type begin anew there. Make yours with "
            "peft_learners.get_phased_scheduler(...), or leave it to Trainer.",
            stacklevel=2,
        )
        return
    factor = _restarting(name, lr, args.get_warmup_steps, first_steps, total_steps, settings)
    scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)
    rates = [base * factor(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def _is_kind(own: Any, whole: Any) -> bool:
    """Whether a factor is ours, or of the same function as `whole`."""
    functions = [getattr(factor, "func", factor) for factor in (own, whole)]
    own_name, name = [(getattr(f, "__module__", None), getattr(f, "__qualname__", None)) for f in functions]
    return own_name[1] is not None and (own_name == name or own_name == (__name__, "_restarting.<locals>.factor"))


def get_phased_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    warmup_steps: float = 0.0,
    settings: Mapping[str, Any] | None = None,
) -> LambdaLR:
    """`transformers.get_scheduler` for loops without Trainer: the schedule begins anew where the phases of `model` do.

    Call its `step()` once per optimizer step. Leave it out of `accelerator.prepare`, which would call it once per
    process.

    Args:
        name: "linear", "cosine", "constant", ... of transformers.
        optimizer: the optimizer.
        model: a model whose schedule has been set, by `set_schedule(total_steps=...)`.
        warmup_steps: of each phase: a number of steps, or a share below 1 of its steps.
        settings: further arguments of that kind of schedule.

    Raises:
        ScheduleError: no schedule was set, its number of steps is unknown, or the kind is no function of the step.
    """
    driver = PhaseDriver.find(model)
    if driver is None or not driver.schedules or driver.total_steps is None:
        raise ScheduleError(
            "get_phased_scheduler() needs to know the phases: call model.base_model.set_schedule(total_steps=..., "
            "steps_per_epoch=...) before."
        )

    def warmup(steps: int) -> int:
        return int(warmup_steps) if warmup_steps >= 1 else math.ceil(steps * warmup_steps)

    lr = float(optimizer.defaults["lr"])
    factor = _restarting(name, lr, warmup, driver.fresh_starts(), driver.total_steps, settings)
    return LambdaLR(optimizer, factor)
