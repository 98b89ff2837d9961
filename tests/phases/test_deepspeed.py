"""DeepSpeed refuses a boundary ahead before the first step; adapters of one phase train, and those saved at theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import zoo
from peft import PeftModel
from training import adapter_values, arguments, bottleneck, far, learner, nas, trainer

from peft_learners import PhaseCallback, ScheduleError

RUN = """
import sys
from accelerate.state import PartialState
own = PartialState._prepare_backend
# transformers names no backend beside DeepSpeed, and on a CPU accelerate then counts one process.
PartialState._prepare_backend = lambda self, *a, **k: ("gloo", own(self, *a, **k)[1])
import torch, training, zoo
from peft import PeftModel
kind, config, out, *saved = sys.argv[1:]
if saved:
    model = PeftModel.from_pretrained(zoo.build("distilbert"), saved[0], is_trainable=True)
else:
    model = training.learner(priming_epochs=0 if kind == "one" else 1)
options = {"deepspeed": config, "use_cpu": False, "ddp_backend": "gloo", "max_steps": 3}
run = training.trainer(model, training.arguments(out, per_device_train_batch_size=4, **options))
run.train()
run.save_model(out + "/final")
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
    """An adapter with a boundary ahead does not begin."""
    model = make()
    optimizer = wrap(Zero([p for p in model.parameters() if p.requires_grad], lr=0.1))
    with pytest.raises(ScheduleError, match=r"can't follow.*DistributedDataParallel.*stop_at_boundary=True.*from_pre"):
        model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer)


@pytest.mark.parametrize("make", [bottleneck, lambda: learner(priming_epochs=0)], ids=["bottleneck", "unprimed"])
def test_one_phase(make):
    """An adapter of one phase begins."""
    model = make()
    optimizer = Zero([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer)
    assert start.first_step == 0


#: Whose boundary is behind them, after a run of 3 steps.
SAVED = {
    "learner": lambda: learner(priming_steps=3),
    "fold": lambda: learner(priming_steps=3, after_priming="fold"),
    "far": lambda: far(priming_epochs=None, priming_steps=3),
    "nas": lambda: nas(search_steps=3),
}


def saved_at_boundary(name: str, folder: Path) -> Path:
    run = trainer(SAVED[name](), arguments(folder / "run"), callbacks=[PhaseCallback(stop_at_boundary=True)])
    run.train()
    assert run.state.global_step == 3
    run.model.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("name", SAVED)
def test_behind_the_boundary(name, tmp_path: Path):
    """An adapter that was saved at its last boundary begins, and its phase is the last one."""
    folder = saved_at_boundary(name, tmp_path)
    model = PeftModel.from_pretrained(zoo.build("distilbert"), folder, is_trainable=True)
    optimizer = Zero([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (start,) = model.base_model.set_schedule(total_steps=6, steps_per_epoch=2, optimizer=optimizer)
    assert start.phase == model.peft_config["default"].phase_names[-1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_real_engine(tmp_path: Path, stage):
    """In Trainer with ZeRO: a boundary is refused in one sentence; what is behind it trains as in one process."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 100000}
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {**dict.fromkeys(names, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({**settings, "zero_force_ds_cpu_optimizer": False}))
    (tmp_path / "run.py").write_text(RUN)

    def run(kind: str, *saved: str) -> subprocess.CompletedProcess:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, str(tmp_path / "run.py"), kind, str(config), str(tmp_path / kind), *saved]
        environment = processes.environment(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)

    refused = run("refused")
    assert "which DeepSpeed can't follow" in refused.stderr and "steps" not in refused.stdout
    for name in ("one", *SAVED):
        saved = saved_at_boundary(name, tmp_path / f"{name}-first") if name in SAVED else None
        done = run(name, *([str(saved)] if saved else []))
        assert done.returncode == 0 and done.stdout.count("steps 3") == 2, done.stderr[-3000:]
        base = zoo.build("distilbert")
        model = PeftModel.from_pretrained(base, saved, is_trainable=True) if saved else learner(priming_epochs=0)
        alone = trainer(model, arguments(tmp_path / f"{name}-alone", per_device_train_batch_size=8, max_steps=3))
        alone.train()
        again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / name / "final")
        ours, theirs = adapter_values(again), adapter_values(alone.model)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(
                value, theirs[key], rtol=0, atol=1e-5, msg=lambda m, k=f"{name} {key}": f"{k}: {m}"
            )
