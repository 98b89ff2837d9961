"""The order of a sweep's runs and the choice of learning rates: no torch, no files."""

from __future__ import annotations

import pytest

from scripts.sweep import plan as sweep_plan
from scripts.sweep.plan import PROTOCOLS, TASKS, VARIANTS, Run, best_rate, missing_rates, planned, settings

CORE = [name for name, variant in VARIANTS.items() if variant.core]
SMALL = TASKS[0]


def tuned(lr: float, variant: str = "lora64", task: str = "rte", seed: int = 0) -> Run:
    return Run("tuned", task, variant, lr, seed)


def grids(scores: list[float], **changes: str) -> dict[Run, float]:
    """The scores of LoRA's grid on RTE, ascending by learning rate."""
    return {tuned(lr, **changes): score for lr, score in zip(VARIANTS["lora64"].lrs, scores, strict=True)}


def all_finished(score: float = 50.0) -> dict[Run, float]:
    """All grids with their best in the middle."""
    return {
        tuned(lr, name, task): score + (lr == variant.lrs[1])
        for name, variant in VARIANTS.items()
        for task in (*TASKS[0], *TASKS[1])
        for lr in variant.lrs
    }


def test_grid_neighbours():
    """Grids are three neighbours on the ladder."""
    for variant in VARIANTS.values():
        indices = [sweep_plan.LADDER.index(lr) for lr in variant.lrs]
        assert not indices or indices == [indices[0], indices[0] + 1, indices[0] + 2]


def test_names_are_read_back():
    for run in planned(all_finished()):
        assert Run.parse(run.name) == run
    for name in ("", "paper-rte-lora64", "paper-rte-nothing-lr2e-05-seed0", "paper-rte-lora64-lr0.00002-seed0"):
        assert Run.parse(name) is None


def test_no_run_comes_twice():
    runs = planned(all_finished())
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})


def test_settings_distinct():
    """Settings tell all variants of a method apart."""
    seen = {}
    for name, variant in VARIANTS.items():
        key = (variant.method, tuple(sorted(variant.arguments.items(), key=str)))
        assert seen.setdefault(key, name) == name


def test_the_required_runs_come_first():
    """RTE and MRPC with seed 0: seven main methods in both protocols, and two searches at two budgets."""
    methods = {"full", "lora64", "bitfit", "freeze_ffns", "learner64_p0", "learner64_p2", "far10"}
    searches = {f"{kind}_bitfit{percent}" for kind in "us" for percent in (9, 18)}
    first = planned({})[: 7 * 2 + (4 + 2) * 2 + 7 * 3 * 2]
    assert {(r.variant, r.task) for r in first if r.protocol == "paper"} == {(m, t) for m in methods for t in SMALL}
    assert {(r.variant, r.task) for r in first if r.protocol == "nas"} == {
        (m, t) for m in searches | {"full", "bitfit"} for t in SMALL
    }
    assert {(r.variant, r.task, r.lr) for r in first if r.protocol == "tuned"} == {
        (m, t, lr) for m in methods for t in SMALL for lr in VARIANTS[m].lrs
    }


def test_variants_first():
    """Every variant is trained on the small tasks before any second seed."""
    runs = planned(all_finished())
    second = next(i for i, run in enumerate(runs) if run.seed != 0)
    before = {(run.variant, run.task) for run in runs[:second]}
    assert before >= {(name, task) for name in VARIANTS for task in SMALL}
    assert {run.task for run in runs[:second]} == {*SMALL}


def test_second_seeds():
    """Main methods get a second seed before other tasks are begun."""
    runs = planned(all_finished())
    elsewhere = next(i for i, run in enumerate(runs) if run.task not in SMALL)
    again = {(run.protocol, run.variant, run.task) for run in runs[:elsewhere] if run.seed == 1}
    assert again >= {
        (p, name, task) for p in ("paper", "tuned") for name in CORE if VARIANTS[name].lrs for task in SMALL
    }


def test_prefixes_are_balanced():
    """Within a protocol and a seed no main method is two runs ahead of another on the same task."""
    runs = [run for run in planned({}) if run.variant in CORE and run.task in SMALL and run.protocol == "tuned"]
    names = {run.variant for run in runs}
    for end in range(len(runs)):
        for task in SMALL:
            counts = [sum((r.variant, r.task) == (name, task) for r in runs[:end]) for name in names]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "scores,best,missing",
    [
        ([60.0, 62.0, 61.0], 3e-4, []),
        ([60.0, 61.0, 62.0], 1e-3, [3e-3]),
        ([63.0, 61.0, 62.0], 1e-4, [3e-5]),
        ([60.0, 62.0, 62.0], 1e-3, [3e-3]),  # the higher of two equal ones
        ([60.0, 60.0, 59.0], 3e-4, []),
        ([50.0, 50.0, 50.0], 1e-3, [3e-5, 3e-3]),  # nothing is learned: too low or too high
        ([60.0, float("-inf"), 59.0], 1e-4, [3e-5]),
        ([float("-inf")] * 3, None, [3e-5]),  # all diverged
    ],
)
def test_grid_goes_on(scores, best, missing):
    """A grid goes on beyond an end that is best."""
    found = grids(scores)
    assert best_rate(found, "rte", "lora64") == best
    assert missing_rates(found, "rte", "lora64") == missing
    assert [run for run in planned(found, protocols=["tuned"]) if run == tuned(3e-3)] == (
        [tuned(3e-3)] * (3e-3 in missing)
    )


@pytest.mark.parametrize(
    "beyond,missing", [((55.0, 50.0), [1e-5]), ((50.0, 55.0), [1e-2]), ((50.0, 50.0), []), ((50.0,), [3e-3])]
)
def test_flat_grid(beyond, missing):
    """A grid whose rates are all equal is looked at from both ends."""
    found = {**grids([50.0, 50.0, 50.0]), **dict(zip([tuned(3e-5), tuned(3e-3)], beyond, strict=False))}
    assert missing_rates(found, "rte", "lora64") == missing


def test_grid_stops():
    """A grid stops once the step beyond is worse."""
    found = {**grids([60.0, 61.0, 62.0]), tuned(3e-3): 61.5}
    assert best_rate(found, "rte", "lora64") == 1e-3
    assert missing_rates(found, "rte", "lora64") == []
    assert tuned(3e-3) in planned(found)  # what is finished stays in the plan


def test_further_seeds():
    """Further seeds take the rate that the first seed chose."""
    found = grids([60.0, 62.0, 61.0])
    runs = [run for run in planned(found, tasks=["rte"], variants=["lora64"]) if run.protocol == "tuned"]
    assert [(run.lr, run.seed) for run in runs] == [
        (3e-4, 0),
        (1e-4, 0),
        (1e-3, 0),
        *((3e-4, s) for s in (1, 2, 3, 4)),
    ]
    unfinished = dict(list(found.items())[:2])
    assert all(run.seed == 0 for run in planned(unfinished, protocols=["tuned"]))


def test_dev_scores_choose_nothing():
    """Scores are of held-out rows alone; a run that held out none has none."""
    found = dict.fromkeys(grids([0.0, 0.0, 0.0]))
    assert best_rate(found, "rte", "lora64") is None


def test_the_recipes():
    assert settings(Run("paper", "rte", "full", 2e-5, 3))["num_train_epochs"] == 5
    assert settings(Run("nas", "rte", "u_bitfit9", 3e-3, 0))["num_train_epochs"] == 6
    assert settings(Run("nas", "rte", "bitfit", 3e-3, 0))["num_train_epochs"] == 3
    assert {settings(Run(p, "rte", "full", 1e-4, 0))["holdout_share"] for p in PROTOCOLS if p != "tuned"} == {0.0}
    assert {p for p in PROTOCOLS if settings(Run(p, "rte", "full", 2e-5, 0))["bf16"]} == {"curves"}
    assert settings(tuned(1e-4))["holdout_share"] == 0.1


def test_rate_off_ladder():
    """A rate off the ladder is a rate."""
    found = {**grids([60.0, 61.0, 62.0]), tuned(2e-3): 63.0}
    assert best_rate(found, "rte", "lora64") == 2e-3
    assert missing_rates(found, "rte", "lora64") == [3e-3]


def test_grid_without_seed():
    """Without its seed a grid is not trained and its choice holds."""
    found = grids([60.0, 62.0, 61.0])
    runs = planned(found, [1, 2], ["rte"], ["lora64"], ["tuned"])
    assert runs == [tuned(3e-4, seed=1), tuned(3e-4, seed=2)]
