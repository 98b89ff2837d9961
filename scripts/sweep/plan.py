"""Which training runs a sweep makes, and in which order. Pure: no torch, no files.

A *variant* is a method with its settings, a *protocol* is a recipe, a *run* is a variant trained on a task by a
protocol with one learning rate and one seed. The order is one of an *anytime* design: whatever prefix of it is
finished is balanced. All variants are trained on the smallest tasks with the first seed before any gets a second
seed, and the main variants (`core`) come before the others.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

#: Share of the train rows on which the tuned protocol chooses a learning rate.
HOLDOUT_SHARE = 0.1
PAPER_LR = 2e-5
#: Of the runs that a learning rate is chosen among.
GRID_SEED = 0
#: Smallest first: a run of one of the first two takes a third of the time of one of the others.
TASKS = (("rte", "mrpc"), ("cola", "stsb"))
#: Learning rates of the tuned protocol lie on a ladder of half decades; a grid whose best is at its end goes on there.
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Protocol:
    """A recipe. `arguments` are those of scripts.glue.train; `search_epochs` is the number of epochs of a method that
    searches first and then trains again."""

    label: str
    epochs: float
    search_epochs: float
    arguments: Mapping[str, Any] = field(default_factory=dict)


#: Batches of rows of similar length: less padding, so more runs in the time there is.
_GROUPED = {"train_sampling_strategy": "group_by_length"}
PROTOCOLS: dict[str, Protocol] = {
    # arXiv 2208.02070, section 5.
    "paper": Protocol("paper's recipe: 2e-5, 5 epochs", 5, 5),
    "tuned": Protocol(
        "each at the best of its learning rates, 5 epochs", 5, 5, {"holdout_share": HOLDOUT_SHARE, **_GROUPED}
    ),
    # arXiv 2305.16597, section 4.1, with fewer epochs.
    "nas": Protocol("6 % warm-up, 3 epochs; search and 3 more for NAS-LoRA", 3, 6, {"warmup_steps": 0.06}),
    # Four times the steps of the others and compared with none of them, so in the faster arithmetic.
    "curves": Protocol("paper's recipe over 20 epochs, in bfloat16", 20, 20, {"bf16": True, **_GROUPED}),
}


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        label: for tables.
        method: of `--method`.
        arguments: its arguments, all that tell it from other variants.
        lrs: grid of the tuned protocol, three neighbours on `LADDER`; empty: the variant is in neither the paper's nor
            the tuned one.
        nas_lr: learning rate in the NAS paper's recipe; None: not in it.
        core: whether it is one of the main ones, which are trained first.
        attempt: whether it is an attempt to better a main one, or the peer that such an attempt must be held against;
            only in the tuned protocol and on the smallest tasks.
    """

    label: str
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lrs: tuple[float, ...] = ()
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


_WHOLE = (3e-5, 1e-4, 3e-4)
_LOW_RANK = (1e-4, 3e-4, 1e-3)
_ADDED = (3e-4, 1e-3, 3e-3)
#: About the parameters of LoRA of rank 64, as in arXiv 2208.02070, Table 1.
_SEQUENTIAL = {"mode": "sequential", "bottleneck_dim": 256}
_PARALLEL = {"mode": "parallel", "bottleneck_dim": 512}
_FEW = (1e-3, 3e-3, 1e-2)
_FAR = {
    "retention_ratio": 0.1,
    "priming_ratio": 0.01,
    "granularity": "hidden_unit",
    "selection": "l1",
    "discard_unkept": False,
    "train_embeddings": True,
}
_NAS = {
    "search_epochs": None,
    "rounds": 1,
    "init": "kaiming",
    "criterion": "importance",
    "averaging": "mean",
    "rewind": "initial",
    "train_biases": True,
}


def _learner(rank: int, priming_epochs: float, core: bool = False) -> Variant:
    arguments = {"r": rank, "priming_epochs": priming_epochs, "priming_lr_scale": 1.0, "dropout": 0.0}
    return Variant(f"Learner, r = {rank}, p = {priming_epochs:g}", "learner", arguments, _LOW_RANK, core=core)


def _attempt(start: Variant, change: str, **more: Any) -> Variant:
    arguments = {**start.arguments, **more}
    return Variant(f"{start.label}, {change}", start.method, arguments, start.lrs, attempt=True)


def _slow(start: Variant) -> Variant:
    return _attempt(start, "primed weights at a tenth of the rate", priming_lr_scale=0.1)


def _warm(start: Variant) -> Variant:
    return _attempt(start, "6 % warm-up", warmup_steps=0.06)


def _lora(rank: int, core: bool = False) -> Variant:
    return Variant(f"LoRA, r = {rank}", "lora", {"r": rank, "dropout": 0.0}, _LOW_RANK, core=core)


def _far(label: str, core: bool = False, **more: Any) -> Variant:
    return Variant(label, "far", {**_FAR, **more}, _WHOLE, core=core)


def _nas(label: str, rank: int, budget: float, granularity: str, lr: float, core: bool = False) -> Variant:
    arguments = {"r": rank, "parameter_budget": budget, "nas_granularity": granularity, **_NAS}
    return Variant(label, "nas_lora", arguments, nas_lr=lr, core=core)


def _bias_search(name: str, percent: int, core: bool = False) -> Variant:
    granularity = {"U": "unstructured", "S": "structured"}[name]
    return _nas(f"{name}-BitFit, {percent} % of the biases", 0, percent / 100, granularity, 3e-3, core)


def _rank_search(name: str, percent: int, budget: int) -> Variant:
    granularity = {"U": "unstructured", "S": "structured"}[name]
    return _nas(f"{name}-MaM, {percent} % of MaM's parameters", 16, budget, granularity, 1e-3)


#: Parameters of MaM (rank 8) on MiniLM-L6, without the head: the budget of U-MaM and S-MaM, as in the paper.
MAM_BUDGET = 321_024

VARIANTS: dict[str, Variant] = {
    "full": Variant("full fine-tuning", "full", {}, _WHOLE, nas_lr=1e-4, core=True),
    "lora64": _lora(64, core=True),
    "learner64_p2": _learner(64, 2.0, core=True),
    "learner64_p0": _learner(64, 0.0, core=True),
    "far10": _far("FAR, 10 %", core=True),
    "bitfit": Variant("BitFit", "bitfit", {}, _FEW, nas_lr=3e-3, core=True),
    "freeze_ffns": Variant("FREEZE FFNs", "freeze_ffns", {}, _WHOLE, core=True),
    "u_bitfit9": _bias_search("U", 9, core=True),
    "s_bitfit9": _bias_search("S", 9, core=True),
    "u_bitfit18": _bias_search("U", 18, core=True),
    "s_bitfit18": _bias_search("S", 18, core=True),
    "far10_random": _far("FAR, 10 %, random nodes", selection="random"),
    "far10_output_node": _far("FAR, 10 %, by output node", granularity="output_node"),
    "learner64_p1": _learner(64, 1.0),
    "learner8_p2": _learner(8, 2.0),
    "learner8_p0": _learner(8, 0.0),
    "lora8": _lora(8),
    "adapter_sequential": Variant("sequential adapters, 256", "bottleneck", _SEQUENTIAL, _ADDED),
    "adapter_parallel": Variant("parallel adapters, 512", "bottleneck", _PARALLEL, _ADDED),
    "adalora64": Variant("AdaLoRA, r = 64", "adalora", {"r": 64}, _ADDED),
    "shira64": Variant("SHiRA, r = 64", "shira", {"r": 64}, _ADDED),
    "prompt20": Variant("prompt tuning, 20 tokens", "prompt_tuning", {"num_virtual_tokens": 20}, (3e-3, 1e-2, 3e-2)),
    "mam8": Variant("MaM, r = 8", "mam", {"r": 8, "dropout": 0.0}, _LOW_RANK, nas_lr=1e-3),
    "u_mam100": _rank_search("U", 100, MAM_BUDGET),
    "s_mam100": _rank_search("S", 100, MAM_BUDGET),
    "u_mam25": _rank_search("U", 25, MAM_BUDGET // 4),
    "s_mam25": _rank_search("S", 25, MAM_BUDGET // 4),
    "learner128_p2": _learner(128, 2.0),
    "learner128_p0": _learner(128, 0.0),
    "learner8_p1": _learner(8, 1.0),
    "learner128_p1": _learner(128, 1.0),
    "u_bitfit37": _bias_search("U", 37),
    "s_bitfit37": _bias_search("S", 37),
    "learner64_p2_slow": _slow(_learner(64, 2.0)),
    "learner64_p2_slow_warm": _warm(_slow(_learner(64, 2.0))),
    "learner64_p4_slow": _slow(_learner(64, 4.0)),
    "lora64_warm": _warm(_lora(64)),
}


#: Variants with a budget in parameters of one model.
MINILM_ONLY = tuple(name for name, variant in VARIANTS.items() if variant.arguments.get("parameter_budget", 0) > 1)


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
        """Name of its results file, without `.json`."""
        return f"{self.protocol}-{self.task}-{self.variant}-lr{self.lr:g}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Optional["Run"]:
        """The run of that name; None if it is no name of a run."""
        match = re.fullmatch(r"([a-z]+)-([a-z0-9]+)-(\w+)-lr([0-9.e+-]+)-seed(\d+)", name)
        if not match or match[1] not in PROTOCOLS or match[3] not in VARIANTS:
            return None
        run = cls(match[1], match[2], match[3], float(match[4]), int(match[5]))
        return run if run.name == name else None


#: What no protocol and no variant changes.
COMMON: Mapping[str, Any] = {
    "warmup_steps": 0,
    "holdout_share": 0.0,
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "load_best_model_at_end": False,
    "bf16": False,
    "fp16": False,
    "max_length": 128,
    "pad_to_max_length": False,
    "max_train_samples": None,
    "max_eval_samples": None,
    "max_steps": -1,
}


def settings(run: Run) -> dict[str, Any]:
    """What tells the run from others, by the names of scripts.glue.train's arguments; its record must say the same."""
    protocol, variant = PROTOCOLS[run.protocol], VARIANTS[run.variant]
    epochs = protocol.search_epochs if variant.searches else protocol.epochs
    return {
        **COMMON,
        **protocol.arguments,
        **variant.arguments,
        "learning_rate": run.lr,
        "num_train_epochs": float(epochs),
        "seed": run.seed,
    }


def planned(
    scores: Mapping[Run, Optional[float]],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    tasks: Optional[Collection[str]] = None,
    variants: Optional[Collection[str]] = None,
    protocols: Optional[Collection[str]] = None,
) -> list[Run]:
    """All runs in their order, finished ones too, as far as the finished ones tell which come.

    The learning rates of other seeds are known once the grid of `GRID_SEED` is finished.

    Args:
        scores: held-out score of each finished run (None where nothing is held out).
        seeds: in their order; grids are those of `GRID_SEED`.
        tasks, variants, protocols: only these; None: all.
    """
    order = dict.fromkeys(_in_order(scores, seeds))
    return [
        run
        for run in order
        if (tasks is None or run.task in tasks)
        and (variants is None or run.variant in variants)
        and (protocols is None or run.protocol in protocols)
    ]


def _in_order(scores: Mapping[Run, Optional[float]], seeds: Sequence[int]) -> Iterator[Run]:
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


def _tuned(
    scores: Mapping[Run, Optional[float]], group: Sequence[str], tasks: Sequence[str], seed: int
) -> Iterator[Run]:
    """The grids; of other seeds than theirs, the rates that they chose."""
    if seed == GRID_SEED:
        yield from _grid(scores, group, tasks, seed)
        return
    for name in group:
        for task in tasks:
            best = best_rate(scores, task, name, GRID_SEED)
            if best is not None and VARIANTS[name].lrs and not missing_rates(scores, task, name, GRID_SEED):
                yield Run("tuned", task, name, best, seed)


def _fixed_rates(protocol: str, group: Iterable[str], tasks: Iterable[str], seed: int) -> Iterator[Run]:
    for name in group:
        lr = VARIANTS[name].nas_lr if protocol == "nas" else PAPER_LR
        if lr is not None and VARIANTS[name].is_in(protocol):
            yield from (Run(protocol, task, name, lr, seed) for task in tasks)


def _grid(
    scores: Mapping[Run, Optional[float]], group: Sequence[str], tasks: Sequence[str], seed: int
) -> Iterator[Run]:
    """The middle rate of all, then their other rates, then what goes beyond a grid whose best is at its end."""
    tuned = [name for name in group if VARIANTS[name].lrs]
    for index in (1, 0, 2):
        for name in tuned:
            yield from (Run("tuned", task, name, VARIANTS[name].lrs[index], seed) for task in tasks)
    for name in tuned:
        for task in tasks:
            tried = rates(scores, task, name, seed)
            yield from (
                Run("tuned", task, name, lr, seed)
                for lr in (*tried, *missing_rates(scores, task, name, seed))
                if lr not in VARIANTS[name].lrs
            )


def rates(scores: Mapping[Run, Optional[float]], task: str, variant: str, seed: int) -> list[float]:
    """Learning rates of the finished tuned runs, ascending."""
    key = ("tuned", task, variant, seed)
    return sorted(run.lr for run in scores if (run.protocol, run.task, run.variant, run.seed) == key)


def best_rate(scores: Mapping[Run, Optional[float]], task: str, variant: str, seed: int) -> Optional[float]:
    """The finished learning rate with the best score on the held-out rows; None if all diverged. Of two equal ones the
    higher: they are equal mostly where nothing was learned yet."""
    found = {lr: scores[Run("tuned", task, variant, lr, seed)] for lr in rates(scores, task, variant, seed)}
    known = {lr: score for lr, score in found.items() if score is not None and score > float("-inf")}
    return max(known, key=lambda lr: (known[lr], lr)) if known else None


def chosen_rates(scores: Mapping[Run, Optional[float]]) -> dict[tuple[str, str], float]:
    """Learning rate of the tuned protocol by task and variant: the best on held-out rows, of the finished ones."""
    cells = sorted({(run.task, run.variant) for run in scores if run.protocol == "tuned"})
    return {cell: rate for cell in cells if (rate := best_rate(scores, *cell, GRID_SEED)) is not None}


def missing_rates(scores: Mapping[Run, Optional[float]], task: str, variant: str, seed: int) -> list[float]:
    """Rates that the search still needs: those of the grid, then one beyond its end as long as that is best, and one
    below it as long as all diverged. Where all of the grid are equal, too low and too high look alike (a model that
    predicts one class), so one beyond either end; if those are equal too, the search is over."""
    grid, tried = VARIANTS[variant].lrs, rates(scores, task, variant, seed)
    if missing := [lr for lr in grid if lr not in tried]:
        return missing
    best = best_rate(scores, task, variant, seed)
    below, beyond = [lr for lr in LADDER if lr < tried[0]][-1:], [lr for lr in LADDER if lr > tried[-1]][:1]
    if best is not None and len({scores[Run("tuned", task, variant, lr, seed)] for lr in tried}) == 1:
        return [*(below if tried[0] == grid[0] else []), *(beyond if tried[-1] == grid[-1] else [])]
    if best is None or best == tried[0]:
        return below
    return beyond if best == tried[-1] else []
