"""Which training runs a sweep makes, and in which order. What there is to train stands in variants.yaml.

A *variant* is a method with its settings, a *protocol* is a recipe, a *run* is a variant trained on a task by a
protocol with one learning rate and one seed. The order is one of an *anytime* design: whatever prefix of it is
finished is balanced. All variants are trained on the smallest tasks with the first seed before any gets a second
seed, and the main variants (`core`) come before the others.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml


@dataclass(frozen=True)
class Protocol:
    """A recipe; `search_epochs` is the number of epochs of a method that searches first and then trains again."""

    label: str
    epochs: float
    search_epochs: float
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A method with its settings; variants.yaml says what the fields mean."""

    label: str
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lrs: Sequence[float] = ()
    nas_lr: Optional[float] = None
    core: bool = False
    attempt: bool = False

    def is_in(self, protocol: str) -> bool:
        """Whether the protocol trains it."""
        return self.nas_lr is not None if protocol == "nas" else bool(self.lrs)

    @property
    def searches(self) -> bool:
        """Whether it searches for an architecture before it trains."""
        return self.method == "nas_lora"


_DATA = yaml.safe_load((Path(__file__).parent / "variants.yaml").read_text(encoding="utf-8"))
TASKS: Sequence[Sequence[str]] = _DATA["tasks"]
ALL_TASKS = [task for group in TASKS for task in group]
LADDER: Sequence[float] = _DATA["ladder"]
PROTOCOLS = {name: Protocol(**entry) for name, entry in _DATA["protocols"].items()}
VARIANTS = {name: Variant(**entry) for name, entry in _DATA["variants"].items()}
#: Of the runs that a learning rate is chosen among.
GRID_SEED = 0
#: Variants with a budget in parameters of one model.
MINILM_ONLY = tuple(name for name, variant in VARIANTS.items() if variant.arguments.get("parameter_budget", 0) > 1)
#: Score on held-out rows by finished run; None where nothing is held out, minus infinity where training diverged.
Scores = Mapping["Run", Optional[float]]


@dataclass(frozen=True, order=True)
class Run:
    """One training run: protocol, task, variant, learning rate and seed."""

    protocol: str
    task: str
    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What it is called in files."""
        return f"{self.protocol}-{self.task}-{self.variant}-lr{self.lr:g}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Optional["Run"]:
        """The run of that name; None if it is no name of a run."""
        match = re.fullmatch(r"([a-z]+)-([a-z0-9]+)-(\w+)-lr([0-9.e+-]+)-seed(\d+)", name)
        if not match or match[1] not in PROTOCOLS or match[3] not in VARIANTS:
            return None
        run = cls(match[1], match[2], match[3], float(match[4]), int(match[5]))
        return run if run.name == name else None


def settings(run: Run) -> dict[str, Any]:
    """What tells the run from others, by the names of scripts.glue.train's arguments; its record must say the same."""
    protocol, variant = PROTOCOLS[run.protocol], VARIANTS[run.variant]
    epochs = protocol.search_epochs if variant.searches else protocol.epochs
    own = {"learning_rate": run.lr, "num_train_epochs": float(epochs), "seed": run.seed}
    return {**_DATA["common"], **protocol.arguments, **variant.arguments, **own}


# -- the order -----------------------------------------------------------------------------------------------------


def planned(
    scores: Scores,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    tasks: Optional[Collection[str]] = None,
    variants: Optional[Collection[str]] = None,
    protocols: Optional[Collection[str]] = None,
) -> list[Run]:
    """All runs in their order, finished ones too, as far as the finished ones tell which come.

    The learning rates of other seeds are known once the grid of `GRID_SEED` is finished.

    Args:
        scores: of the finished runs.
        seeds: in their order; grids are those of `GRID_SEED`.
        tasks, variants, protocols: only these; None: all.
    """
    return [
        run
        for run in dict.fromkeys(_in_order(scores, seeds))
        if (tasks is None or run.task in tasks)
        and (variants is None or run.variant in variants)
        and (protocols is None or run.protocol in protocols)
    ]


def _in_order(scores: Scores, seeds: Sequence[int]) -> Iterator[Run]:
    core = [name for name, variant in VARIANTS.items() if variant.core]
    attempts = [name for name, variant in VARIANTS.items() if variant.attempt]
    rest = [name for name in VARIANTS if name not in (*core, *attempts)]
    (small, large), (first, *further) = TASKS, seeds

    def trained(group: Sequence[str], tasks: Sequence[str], seed: int) -> Iterator[Run]:
        yield from _fixed_rates("paper", group, tasks, seed)
        yield from _fixed_rates("nas", group, tasks, seed)
        yield from _tuned(scores, group, tasks, seed)

    yield from trained(core, small, first)
    yield from _tuned(scores, attempts, small, first)
    yield from _fixed_rates("curves", core, small, first)
    yield from trained(rest, small, first)
    # From here on in turn: what says how sure a difference is, and what says on which tasks it holds.
    for seed in further[:1]:
        yield from trained(core, small, seed)
    yield from trained(core, large, first)
    for seed in further[1:]:
        yield from trained(core, small, seed)
    for seed in further:
        yield from _tuned(scores, attempts, small, seed)
        yield from trained(rest, small, seed)
    yield from trained(rest, large, first)
    for seed in further:
        yield from trained([*core, *rest], large, seed)


def _fixed_rates(protocol: str, group: Iterable[str], tasks: Iterable[str], seed: int) -> Iterator[Run]:
    for name in group:
        lr = VARIANTS[name].nas_lr if protocol == "nas" else _DATA["paper_lr"]
        if VARIANTS[name].is_in(protocol):
            yield from (Run(protocol, task, name, lr, seed) for task in tasks)


def _tuned(scores: Scores, group: Sequence[str], tasks: Sequence[str], seed: int) -> Iterator[Run]:
    """The grids: the middle rate of all, then their other rates, then what goes beyond a grid whose best is at its
    end; of other seeds than theirs, the rates that they chose."""
    cells = [(name, task) for name in group if VARIANTS[name].lrs for task in tasks]
    if seed == GRID_SEED:
        for index in (1, 0, 2):
            yield from (Run("tuned", task, name, VARIANTS[name].lrs[index], seed) for name, task in cells)
    for name, task in cells:
        missing = missing_rates(scores, task, name)
        if seed == GRID_SEED:
            tried = [lr for lr in (*rates(scores, task, name), *missing) if lr not in VARIANTS[name].lrs]
            yield from (Run("tuned", task, name, lr, seed) for lr in tried)
        elif not missing and (best := best_rate(scores, task, name)) is not None:
            yield Run("tuned", task, name, best, seed)


# -- learning rates ------------------------------------------------------------------------------------------------


def rates(scores: Scores, task: str, variant: str) -> list[float]:
    """Learning rates of the grid's finished runs, those beyond its ends too, ascending."""
    key = ("tuned", task, variant, GRID_SEED)
    return sorted(run.lr for run in scores if (run.protocol, run.task, run.variant, run.seed) == key)


def best_rate(scores: Scores, task: str, variant: str) -> Optional[float]:
    """The finished learning rate with the best score on the held-out rows; None if all diverged. Of two equal ones the
    higher: they are equal mostly where nothing was learned yet."""
    found = {lr: scores[Run("tuned", task, variant, lr, GRID_SEED)] for lr in rates(scores, task, variant)}
    known = {lr: score for lr, score in found.items() if score is not None and score > float("-inf")}
    return max(known, key=lambda lr: (known[lr], lr)) if known else None


def missing_rates(scores: Scores, task: str, variant: str) -> list[float]:
    """Rates that the search still needs: those of the grid, then one beyond its end as long as that is best, and one
    below it as long as all diverged. Where all of the grid are equal, too low and too high look alike (a model that
    predicts one class), so one beyond either end; if those are equal too, the search is over."""
    grid, tried = VARIANTS[variant].lrs, rates(scores, task, variant)
    if missing := [lr for lr in grid if lr not in tried]:
        return missing
    best = best_rate(scores, task, variant)
    below, beyond = [lr for lr in LADDER if lr < tried[0]][-1:], [lr for lr in LADDER if lr > tried[-1]][:1]
    if best is not None and len({scores[Run("tuned", task, variant, lr, GRID_SEED)] for lr in tried}) == 1:
        return [*(below if tried[0] == grid[0] else []), *(beyond if tried[-1] == grid[-1] else [])]
    if best is None or best == tried[0]:
        return below
    return beyond if best == tried[-1] else []
