"""Engines (DDP, FSDP2, DeepSpeed) in two gloo processes on a CPU, against one process on the joined batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from forks import Warm
from peft import PeftModel
from runs import wrapped_tiny
from runs.engine_cells import cells_of
from runs.engines_tiny import ENGINES, ONE_RUN, PLAN
from safetensors.torch import load_file

from scripts.docs.engines_table import cells

pytestmark = pytest.mark.slow
Values = dict[str, torch.Tensor]
CELLS = [(engine, f"{arch}-{case}") for engine, plan in PLAN.items() for arch, case in plan]
ONE = [cell for cell in CELLS if cell[0] == "ddp" or cell[1].partition("-")[2] in ONE_RUN]
TWO = [cell for cell in CELLS if cell not in ONE]


@pytest.fixture(scope="session")
def engines(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Gives an engine's folder and results; its runs are made when they are first asked for."""
    root, results = tmp_path_factory.mktemp("engines"), {}

    def of(engine: str) -> tuple[Path, dict]:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed: pip install peft-learners[deepspeed]")
        if engine == "fsdp2-sharded":
            of("fsdp2-full")
        if engine not in results:
            out = root / engine
            own = {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {}
            results[engine] = warm.results("runs.engines_tiny:main", out, 2, engine, **own)
            job = warm.start("runs.engines_tiny:alone", str(out), engine, log=out / "alone.log")
            assert job.wait() == 0, job.output()[-3000:]
        return root / engine, results[engine]

    return of


def values(folder: Path, cell: str, run: str, rank: int = 0) -> list[Values]:
    """After each step."""
    return torch.load(folder / cell / f"{run}-{rank}.pt")


def assert_close(ours: Values, theirs: Values, limit: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")


def assert_as_alone(folder: Path, cell: str, run: str, limit: float = 1e-5) -> None:
    """After each step the values are those of one process, and they move."""
    ours, theirs = values(folder, cell, run), values(folder / "alone", cell, run)
    assert len(ours) == len(theirs) >= 3
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, limit)
    assert any((ours[0][key] - value).abs().max() > 10 * limit for key, value in ours[1].items() if value.numel())


def assert_resumed(folder: Path, cell: str, run: str, step: int) -> None:
    """A resumed run ends as the unbroken one, bit for bit."""
    whole, resumed = values(folder, cell, run)[-1], values(folder, cell, f"{run}-{step}")[-1]
    assert_close(resumed, whole, 0.0)


def assert_saved(folder: Path, cell: str, last: Values) -> None:
    """The adapter is one file, which loads in one process."""
    again = PeftModel.from_pretrained(zoo.build(cell.partition("-")[0]), folder / cell / "final")
    loaded = {key: value for key, value in again.state_dict().items() if key in last}
    assert_close(loaded, last, 0.0)


@pytest.mark.parametrize(("engine", "cell"), ONE)
def test_one_run(engines, engine, cell):
    """A run across the boundary computes what one process computes; resumed on either side, and reloaded, too."""
    folder, results = engines(engine)
    kinds = {"d": "DistributedDataParallel", "f": "FSDP", "z": "DeepSpeedEngine"}
    assert results[cell]["run"]["kind"].startswith(kinds[engine[0]])
    assert_as_alone(folder, cell, "run", 1e-6 if engine == "ddp" and "fold" not in cell else 1e-5)
    for step in (2, 5):
        assert_resumed(folder, cell, "run", step)
    assert_saved(folder, cell, values(folder, cell, "run")[-1])


@pytest.mark.parametrize(("engine", "cell"), TWO)
def test_two_runs(engines, engine, cell):
    """What can't cross a boundary under the engine is refused before the first step, and trains in two runs."""
    folder, results = engines(engine)
    name = {"f": "FSDP", "z": "DeepSpeed"}[engine[0]]
    assert f"which {name} can't follow in one run" in results[cell]["refused"]
    assert "PhaseCallback(stop_at_boundary=True)" in results[cell]["refused"]
    for run in ("first", "second"):
        assert_as_alone(folder, cell, run)
        assert_resumed(folder, cell, run, 2)
    assert_saved(folder, cell, values(folder, cell, "second")[-1])


@pytest.mark.parametrize(("engine", "cell"), [cell for cell in TWO if "nas" in cell[1]])
def test_scores(engines, engine, cell):
    """A search's scores, gathered from the engine's own gradients, are those of one process."""
    folder, _ = engines(engine)
    path = Path(cell) / "first" / "checkpoint-2" / "adapter_model.safetensors"
    files = load_file(folder / path), load_file(folder / "alone" / path)
    ours, theirs = ({key: value for key, value in held.items() if "_scores" in key} for held in files)
    assert ours.keys() <= theirs.keys() and any(value.any() for value in ours.values())
    for key, value in theirs.items():
        torch.testing.assert_close(ours.get(key, torch.zeros_like(value)), value, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name in ("ddp", "zero2")])
def test_ranks_equal(engines, engine):
    """Where each rank has the whole adapter, they have the same, after each step."""
    folder, results = engines(engine)
    for cell in results:
        for run in ("run",) if "run" in results[cell] else ("first", "second"):
            for one, other in zip(values(folder, cell, run), values(folder, cell, run, 1), strict=True):
                assert_close(one, other, 0.0)


def test_partitioned_base(warm: Warm, tmp_path: Path):
    """A base model of which ZeRO-3 holds parts before it gets its adapter trains as one that was loaded whole."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install peft-learners[deepspeed]")
    zoo.build("distilbert").save_pretrained(tmp_path / "base")
    held, files = {}, {}
    for name, partitioned in (("parts", True), ("whole", False)):
        out = tmp_path / name
        held[name] = warm.results("runs.zero_init:main", out, 2, partitioned, DS_ACCELERATOR="cpu")
        files[name] = load_file(out / "final" / "adapter_model.safetensors")
    assert held["whole"] == [0] and min(held["parts"]) > 0
    assert_close(files["parts"], files["whole"], 1e-6)


@pytest.mark.parametrize("engine", ["fsdp2-full", "zero2", "zero3"])
def test_costs_after_boundary(engines, engine):
    """After the boundary a rank exchanges what trains, and under FSDP2 it holds optimizer state of no more."""
    _, results = engines(engine)
    run, unprimed = results["distilbert-learner"]["run"], results["distilbert-unprimed"]["run"]
    assert run["sent"][0] > run["sent"][-1] == unprimed["sent"][-1] > 0
    if engine == "fsdp2-full":
        assert run["state"][0] > run["state"][-1] == unprimed["state"][-1]
    else:  # DeepSpeed keeps what it was set up with
        assert run["state"][0] == run["state"][-1] > unprimed["state"][-1]


@pytest.mark.parametrize("engine", ["fsdp2-full", "zero2", "zero3"])
def test_forgotten(engines, engine):
    """A run without PhaseCallback trains and saves, as in one process."""
    folder, results = engines(engine)
    assert "forgotten" in results["distilbert-nas"]
    assert (folder / "distilbert-nas" / "forgotten" / "checkpoint-2" / "adapter_config.json").exists()


def test_sharded_first_run(engines):
    """A first run whose checkpoints would hold no adapter is refused."""
    _, results = engines("fsdp2-sharded")
    assert "Take 'FULL_STATE_DICT'" in results["distilbert-far"]["refused"]


@pytest.mark.parametrize("engine", ["fsdp2-full", "zero2", "zero3"])
def test_saves_alone(engines, engine):
    """The one rank that saves asks the others for nothing."""
    _, results = engines(engine)
    runs = [run for cell in results.values() for run in cell.values() if isinstance(run, dict)]
    assert runs and all(run["collectives_in_saves"] == 0 for run in runs)


@pytest.mark.parametrize("engine", ["fsdp2-full", "zero2", "zero3"])
def test_trained_parameters(engines, engine):
    """The log tells how many parameters train, over all ranks: float32, two moments of Adam on two ranks."""
    _, results = engines(engine)
    for case in ("learner", "unprimed"):
        run = results[f"distilbert-{case}"]["run"]
        assert run["trained"][-1] == results["distilbert-unprimed"]["run"]["sent"][-1] // 4 > 0
        assert run["trained"][0] == run["sent"][0] // 4


@pytest.mark.parametrize("engine", ENGINES)
def test_table(engines, engine):
    """The table in docs/distributed.md is made of what these runs show."""

    def told(found):
        # Which single entries are kept, and how many bytes those have, depends on the last digits of their scores.
        bytes_of = {"state_bytes", "gradient_bytes"}
        kept = [{k: v for k, v in c.items() if k not in bytes_of or c["case"] != "nas"} for c in found]
        return [{k: v for k, v in cell.items() if k != "difference"} for cell in kept]

    assert told(cells_of(engines(engine)[0], engine)) == told([c for c in cells() if c["engine"] == engine])


def test_wrap_policy(warm: Warm, tmp_path: Path):
    """The policy that PEFT gives FSDP for LoRA wraps each part of our adapters, which compute what they do alone."""
    results = warm.results("runs.wrapped_tiny:main", tmp_path / "wrapped", 2, ACCELERATE_TORCH_DEVICE="cpu")
    assert results.keys() == {f"{name}-{version}" for name in wrapped_tiny.MAKE for version in (1, 2)}
    for name, found in results.items():
        # 12 linear layers have two factors, and 8 of them a dense delta: more units than blocks.
        assert found["units"] > (12 if "bottleneck" in name else 30)
        assert found["logits"] < 1e-6 and found["gradients"] < 1e-6
