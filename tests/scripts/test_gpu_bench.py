"""`scripts/bench/gpu.sh` where there is no GPU: a rehearsal of all that runs, and faults that the checks must find."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_learners.nas_lora import budget
from peft_learners.phases.driver import PhaseDriver
from peft_learners.phases.schedule import ScheduleError
from peft_learners.tuner import PhasedModel
from scripts.bench import gpu
from scripts.bench.settings import random_rows
from scripts.glue import run_record

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("bf16_autocast", "bf16_weights", "fp16_scaler", "fused_adamw", "memory", "reloaded", "trainer")


@pytest.fixture(scope="module")
def run() -> gpu.Run:
    return gpu.Run(torch.device("cpu"), small=True)


def command(out: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Records of the command line's run by name; it must succeed."""
    line = ["bash", "scripts/bench/gpu.sh", "--device", "cpu", "--small", "--out", str(out), *words]
    subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, check=True)
    records = {path.stem: run_record.read_json(path) for path in out.iterdir()}
    assert all(record["name"] == name for name, record in records.items())
    return records


@pytest.mark.slow
def test_rehearsal(run, tmp_path):
    """Each check leaves a record: passed, or it needs a GPU."""
    methods = ["lora", "learner_folded", "nas_structured"]
    only = [part for part in gpu.PARTS if part != "compiled"]
    records = command(tmp_path, "--only", *only, "--methods", *methods)
    assert list(gpu.jobs(run, only, methods)) == sorted(records, key=list(gpu.jobs(run)).index)
    for name, record in records.items():
        assert record["device"]["type"] == "cpu" and record["versions"]["torch"] == torch.__version__
        needs_gpu = name.startswith(("default_device", "cuda_graphs"))
        assert record["passed"] is (None if needs_gpu else True), record
        assert not needs_gpu or record["skipped"] == "needs a GPU"
    for kind in ("bert-large", "decoder-1b"):
        for rank in gpu.RANKS:
            methods = records[f"speed-{kind}-r{rank}"]["numbers"]["methods"]
            assert list(methods) == list(gpu.TIMED) and not any("skipped" in row for row in methods.values())
            assert methods["lora"]["to"]["lora"]["time"]["step"]["median"] == 1
            trained = {name: row["trained_parameters"] for name, row in methods.items()}
            # What is folded is of a lower rank where the update itself is.
            assert trained["learner_folded"] <= trained["learner_kept"] < trained["learner_priming"]
            assert trained["far_reconfigured"] < trained["far_priming"]
            assert all(row["median_step"] > 0 < row["bytes"]["stored"] for row in methods.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "learner_kept"])
def test_compiled(run, method):
    """A boundary costs one compilation, and LoRA has none after the first."""
    graphs = gpu.compiled(run, "block", method)["graphs_after_step"]
    assert graphs == [1] * gpu.BOUNDARY + [1 + (method != "lora")] * (gpu.STEPS - gpu.BOUNDARY)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "learner_kept"])
def test_fsdp2(run, method):
    """Sharded over one process."""
    assert "difference" in gpu.fsdp2(run, "encoder", method)


@pytest.mark.parametrize("method", ["learner_folded", "far", "nas_structured"])
def test_fsdp2_refused(run, method):
    """What changes shapes at a boundary is refused before the first step."""
    assert "which FSDP can't follow" in gpu.fsdp2(run, "encoder", method)["refused"]


def test_fsdp2_refusal(run, monkeypatch):
    """A refusal before the first step is an answer, one at the boundary is none."""

    def refuse(*_: object, **__: object) -> None:
        raise ScheduleError("not so")

    with monkeypatch.context() as patch:
        sharded = iter((False, True))
        start = PhaseDriver.start
        patch.setattr(PhaseDriver, "start", lambda *a, **k: refuse() if next(sharded) else start(*a, **k))
        assert gpu.fsdp2(run, "encoder", "far") == {"refused": "not so"}
    monkeypatch.setattr(PhaseDriver, "update", refuse)
    with pytest.raises(ScheduleError):
        gpu.fsdp2(run, "encoder", "far")


@pytest.mark.parametrize("method", ["learner_folded", "nas_unstructured"])
def test_decoder(run, method):
    """The checks of two models are of the decoder too."""
    for check in QUICK[:-1]:
        getattr(gpu, check)(run, "decoder", method)


def test_default_device(run):
    assert gpu.default_device(run, "encoder", "far")["difference"] == 0
    assert torch.get_default_device().type == "cpu"


# -- what the checks must find ---------------------------------------------------------------------------------------


def test_moved_part_found(run, monkeypatch):
    """What froze and moves on."""
    step = gpu.Training.step

    def nudging(training: gpu.Training, spoil: bool = False) -> float:
        loss = step(training, spoil)
        with torch.no_grad():
            for name, value in training.model.state_dict().items():
                if "dense_delta" in name:
                    value.add_(1e-6)
        return loss

    monkeypatch.setattr(gpu.Training, "step", nudging)
    with pytest.raises(AssertionError, match=r"does not train has moved: .*learner_dense_delta"):
        gpu.bf16_autocast(run, "encoder", "learner_kept")


def test_kept_state_found(run, monkeypatch):
    """Optimizer state of what froze."""
    monkeypatch.setattr(PhaseDriver, "optimizer", None)
    with pytest.raises(AssertionError, match="State of .* values that do not train"):
        gpu.bf16_autocast(run, "encoder", "learner_kept")
    with pytest.raises(AssertionError, match="tensors is to be as counted"):
        gpu.memory(run, "encoder", "learner_kept")


def test_wrong_count_found(run, monkeypatch):
    """Bytes that are counted otherwise than they are held."""
    costs = PhasedModel.costs_by_phase
    monkeypatch.setattr(PhasedModel, "costs_by_phase", lambda self: costs(self)[:1] * 2)
    with pytest.raises(AssertionError, match="tensors is to be as counted"):
        gpu.memory(run, "encoder", "far")


def test_scaled_scores_found(run, monkeypatch):
    """Scores of scaled gradients, and of a step that is skipped."""
    monkeypatch.setattr(budget, "_unscaled", lambda optimizer, gradients: gradients)
    with pytest.raises(AssertionError, match="Scores differ by .* with a scaler"):
        gpu.fused_adamw(run, "encoder", "nas_structured")
    with pytest.raises(AssertionError, match="The skipped step was scored"):
        gpu.fp16_scaler(run, "encoder", "nas_structured")


def test_lost_values_found(run, monkeypatch):
    """A file that is not what was trained."""
    loaded = PeftModel.from_pretrained

    def losing(*args: Any, **kwargs: Any) -> PeftModel:
        model = loaded(*args, **kwargs)
        for name, value in model.state_dict().items():
            if "bias_delta" in name:
                value.zero_()
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", losing)
    with pytest.raises(AssertionError, match="Logits must be the trained ones"):
        gpu.reloaded(run, "encoder", "learner_kept")


# -- records ---------------------------------------------------------------------------------------------------------


def test_do():
    """A job that passes, fails, takes too long or does not run."""
    found = gpu.do(lambda: {"answer": 42}, 60)
    assert (found["passed"], found["numbers"]) == (True, {"answer": 42}) and found["seconds"] >= 0
    found = gpu.do(lambda: 1 / 0, 60)
    assert (found["passed"], found["error"]) == (False, "ZeroDivisionError: division by zero")
    assert "test_gpu_bench.py" in found["traceback"]
    start = time.monotonic()
    assert gpu.do(lambda: time.sleep(30), 0.1)["error"].startswith("TimeoutError") and time.monotonic() - start < 10
    assert gpu.do(lambda: {}, 0) == {"passed": None, "skipped": "the time was over"}
    assert gpu.do("needs a GPU", 60) == {"passed": None, "skipped": "needs a GPU"}


def test_lost_gpu(tmp_path, monkeypatch, capsys):
    """A failure that leaves the GPU unusable is recorded, and a new process goes on with what is left."""
    ran, calls = [], []

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    jobs = {"one": lambda: {}, "two": fail, "three": lambda: ran.append("three") or {}}
    monkeypatch.setattr(gpu, "jobs", lambda *_: jobs)
    monkeypatch.setattr(gpu, "is_lost", lambda device: True)

    def execv(path: str, words: list[str]) -> None:
        calls.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    words = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "2"]
    with pytest.raises(SystemExit):
        gpu.main(words)
    ((_, *module, resume, minutes, left),) = (call[:3] + call[-3:] for call in calls)
    assert module == ["-m", "scripts.bench.gpu"] and (resume, minutes) == ("--resume", "--minutes")
    assert 1.5 < float(left) <= 2 and not ran
    assert gpu.main([*words, "--resume"]) == 0 and ran == ["three"]
    assert {path.stem: run_record.read_json(path)["passed"] for path in tmp_path.iterdir()} == {
        "one": True,
        "two": False,
        "three": True,
    }
    (tmp_path / "two.json").unlink()
    monkeypatch.setattr(gpu, "is_lost", lambda device: False)
    assert gpu.main([*words, "--resume"]) == 1 and "1 failed: two" in capsys.readouterr().out


def test_nothing_lost():
    assert not gpu.is_lost(torch.device("cpu"))


def test_missing_gpu(monkeypatch, tmp_path, capsys):
    """A GPU that is not there is said at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "--device cuda must find a GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_rows_of_any_device(run, kind):
    """Models are made on the GPU, rows are drawn on the CPU."""
    work = run.models[kind]
    with torch.device("meta"):
        rows = random_rows(work.setting, work.base.config, torch.device("cpu"), work.seed)
    assert rows.keys() == work.rows.keys() and all(torch.equal(rows[name], work.rows[name]) for name in rows)
