"""FSDP2 in two gloo processes on a CPU, against one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from forks import Warm
from peft import PeftModel
from runs import fsdp_tiny
from training import adapter_values, arguments, trainer

from peft_learners import PhaseCallback

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    folder = tmp_path_factory.mktemp("fsdp")
    for name, make in fsdp_tiny.REFUSED.items():  # the first of two runs, in one process
        run = trainer(make(), arguments(folder / f"{name}-run"), callbacks=[PhaseCallback(stop_at_boundary=True)])
        run.train()
        assert run.state.global_step == 3
        run.model.save_pretrained(folder / f"{name}-first")
    two, one = (warm.results("runs.fsdp_tiny:main", folder / name, n) for name, n in (("two", 2), ("one", 1)))
    return folder, two, one


def assert_same(folder: Path, name: str, limit: float = 1e-5) -> None:
    """After each step the values are those of one process."""
    two, one = torch.load(folder / "two" / f"{name}.pt"), torch.load(folder / "one" / f"{name}.pt")
    assert len(two) == len(one) > 0
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", [*fsdp_tiny.MODELS, *fsdp_tiny.SETTINGS])
def test_one_run(runs, name):
    """A run across the boundary computes what one process computes."""
    folder, two, _ = runs
    assert two["cases"][name]["kind"].startswith("FSDP")
    assert_same(folder, name)


@pytest.mark.parametrize("name", fsdp_tiny.MODELS)
def test_state_as_in_one_process(runs, name):
    """The optimizer's state, over all ranks, is that of one process: what froze is let go of."""
    _, two, one = runs
    assert two["cases"][name]["state"] == one["cases"][name]["state"]
    state = two["cases"]["learner"]["state"]
    assert state[2] < state[0] and len(set(state[2:])) == 1


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("name", ["learner", *fsdp_tiny.SETTINGS])
def test_resumed(runs, name, step):
    """A resumed run, after the boundary with an adapter that was loaded in its phase, ends as the unbroken one."""
    folder, *_ = runs
    whole, resumed = (torch.load(folder / "two" / f"{case}.pt")[-1] for case in (name, f"{name}-{step}"))
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", [*fsdp_tiny.MODELS, *fsdp_tiny.SETTINGS])
def test_saved_as_one_file(runs, name):
    """The adapter that a sharded run saves is one file, which loads in one process."""
    folder, *_ = runs
    again = PeftModel.from_pretrained(zoo.build("distilbert"), folder / "two" / name / "final")
    last = torch.load(folder / "two" / f"{name}.pt")[-1]
    values = {n: v for n, v in again.state_dict().items() if n in last} if name == "lora" else adapter_values(again)
    assert values and all(torch.equal(value, last[key]) for key, value in values.items())


@pytest.mark.parametrize("name", fsdp_tiny.REFUSED)
def test_two_runs(runs, name):
    """What can't cross a boundary in shards is refused before the first step, and trains on behind it."""
    folder, two, one = runs
    assert one["said"] == {} and "which FSDP can't follow" in two["said"][name]
    assert "PhaseCallback(stop_at_boundary=True)" in two["said"][name]
    assert_same(folder, f"{name}-second")
