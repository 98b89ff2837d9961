"""Phases under DeepSpeed are refused before the first step; adapters of one phase train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from training import bottleneck, far, learner, nas

from peft_learners import ScheduleError

RUN = """
import sys
from accelerate.state import PartialState
own = PartialState._prepare_backend
# transformers names no backend beside DeepSpeed, and on a CPU accelerate then counts one process.
PartialState._prepare_backend = lambda self, *a, **k: ("gloo", own(self, *a, **k)[1])
import training
model = getattr(training, sys.argv[1])(**({"priming_epochs": 0} if sys.argv[2] == "one" else {}))
options = {"deepspeed": sys.argv[3], "use_cpu": False, "ddp_backend": "gloo", "max_steps": 2}
run = training.trainer(model, training.arguments(sys.argv[4], **options))
run.train()
print("steps", run.state.global_step)
"""


class Zero(torch.optim.SGD):
    """Is called as DeepSpeed's own optimizers are."""


Zero.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


class Wrapper:
    """As accelerate's around an optimizer of DeepSpeed's."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("make", [learner, far, nas])
@pytest.mark.parametrize("wrap", [Wrapper, lambda optimizer: optimizer], ids=["accelerate", "bare"])
def test_phases_refused(make, wrap):
    """An adapter with a boundary does not begin, nor one that was loaded behind it."""
    model = make()
    optimizer = wrap(Zero([p for p in model.parameters() if p.requires_grad], lr=0.1))
    with pytest.raises(ScheduleError, match=r"can't follow.*DistributedDataParallel.*priming_epochs=0"):
        model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer)


@pytest.mark.parametrize("make", [bottleneck, lambda: learner(priming_epochs=0)], ids=["bottleneck", "unprimed"])
def test_one_phase(make):
    """An adapter of one phase begins."""
    model = make()
    optimizer = Zero([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer)
    assert start.first_step == 0


@pytest.mark.slow
def test_real_engine(tmp_path: Path):
    """In Trainer with ZeRO's second stage: a Learner is refused in one sentence, an unprimed one makes its steps."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    zero = {"stage": 2, "overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 100000}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {**dict.fromkeys(names, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config = tmp_path / "zero2.json"
    config.write_text(json.dumps({**settings, "zero_force_ds_cpu_optimizer": False}))
    (tmp_path / "run.py").write_text(RUN)

    def run(method: str, phases: str) -> subprocess.CompletedProcess:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, str(tmp_path / "run.py"), method, phases, str(config), str(tmp_path / method / phases)]
        environment = processes.environment(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)

    refused, trained = run("learner", "all"), run("learner", "one")
    assert "which DeepSpeed can't follow" in refused.stderr and "steps" not in refused.stdout
    assert trained.returncode == 0 and trained.stdout.count("steps 2") == 2, trained.stderr[-3000:]
