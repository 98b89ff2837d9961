"""Loops without Trainer: the example script as it stands, and update_and_allocate by hand."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import zoo
from forks import Warm
from peft import PeftConfig, PeftModel
from training import Rows, adapter_values, dense_parameters, learner

from peft_learners import ScheduleError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts.demo.accelerate_loop"


def in_one_process(out: Path, warm: Warm) -> str:
    run = f"import runpy; runpy.run_module({SCRIPT!r}, run_name='__main__')"
    return warm.python(run, "--output_dir", str(out), log=out.with_name("log"))


def in_two_processes(out: Path, warm: Warm) -> str:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, *torchrun, "-m", SCRIPT, "--output_dir", str(out)]
    done = subprocess.run(command, env=processes.environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("start", [in_one_process, in_two_processes])
def test_accelerate_example(tmp_path: Path, warm: Warm, start):
    """The Accelerate example goes through its phases."""
    out = start(tmp_path / "adapter", warm)
    trained = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters trained", out)]
    # the boundary at the end of the second epoch takes the dense deltas of 8 layers of 32 x 32
    assert trained[0] - trained[1] == 8 * 32 * 32 and trained[1] == trained[2] == trained[3]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0]
    assert PeftConfig.from_pretrained(tmp_path / "adapter").completed_phases == ["priming"]


def test_example_lines():
    """The example marks at most three lines."""
    assert len(re.findall(r"  # \d: ", (ROOT / f"{SCRIPT.replace('.', '/')}.py").read_text())) == 3


def by_hand(model, steps):
    rows = torch.utils.data.default_collate([Rows()[i] for i in range(12)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(steps, 2, optimizer=optimizer)
    model.train()
    for step in range(steps):
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step + 1)
    return optimizer


def test_resumed_loop(tmp_path: Path):
    """A hand-written loop that is resumed from a saved adapter keeps its boundary. The steps per epoch have changed,
    but the boundary recorded in the adapter's config stays."""
    model = learner(priming_epochs=2)  # 2 steps per epoch: the boundary is step 4
    model.base_model.set_schedule(8, 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
    again.base_model.set_schedule(80, 20, global_step=3)
    assert not again.base_model.update_and_allocate(3)
    (start,) = again.base_model.update_and_allocate(4)
    assert (start.phase, start.first_step) == ("learning", 4)


def test_priming_lr_scale():
    """The scaled learning rate holds by hand, and means this for SGD. D = s theta: plain SGD moves D by s^2 lr g, as
    its gradient and its step are both scaled."""
    scale, lr = 0.25, 0.1
    deltas = {}
    for s in (1.0, scale):
        model = learner(priming_lr_scale=s)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
        rows = torch.utils.data.default_collate([Rows()[i] for i in range(12)])
        model(**rows).loss.backward()
        optimizer.step()
        deltas[s] = [s * p.detach() for p in dense_parameters(model)]
    for one, scaled in zip(deltas[1.0], deltas[scale], strict=True):
        torch.testing.assert_close(scaled, scale**2 * one)


def test_missing_schedule():
    """An update without a schedule says what to call."""
    with pytest.raises(ScheduleError, match=r"before the adapter 'default' had a schedule.*set_schedule\(total_steps"):
        learner().base_model.update_and_allocate(1)


def test_priming_steps():
    """An update without a schedule works where priming is given in steps."""
    model = learner(priming_steps=3)
    assert not [s for step in (1, 2) for s in model.base_model.update_and_allocate(step) if s.phase == "learning"]
    assert [s.phase for s in model.base_model.update_and_allocate(3)] == ["learning"]


def test_skipped_steps():
    """Updates are idempotent, and may skip steps."""
    model = learner(priming_epochs=1)
    model.base_model.set_schedule(10, 4)
    assert model.base_model.update_and_allocate(3) == []
    assert len(model.base_model.update_and_allocate(9)) == 1
    assert model.base_model.update_and_allocate(9) == []


def test_active_adapters():
    """Only active adapters are driven."""
    model = learner(priming_epochs=1)
    other = learner(priming_epochs=2).peft_config["default"]
    model.add_adapter("other", other)
    model.base_model.set_schedule(8, 2)
    model.base_model.update_and_allocate(8)
    assert model.peft_config["default"].completed_phases == ["priming"]
    assert model.peft_config["other"].completed_phases == []
    before = adapter_values(model)
    model.set_adapter("other")
    dense = {n: p.requires_grad for n, p in model.named_parameters() if "learner_dense_delta" in n}
    assert len(dense) == 8 and all(flag and ".other." in n for n, flag in dense.items())
    assert sum("learner_dense_delta.default." in n for n, _ in model.named_buffers()) == 8
    assert all(torch.equal(v, before[n]) for n, v in adapter_values(model).items())


def test_optimizer_state():
    """An optimizer by hand keeps state for what trains only."""
    model = learner(priming_epochs=1)
    optimizer = by_hand(model, 5)
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}


def test_log(caplog: pytest.LogCaptureFixture):
    """A loop has no console of ours: each phase that begins is a line in the log."""
    model = learner()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    batch = torch.utils.data.default_collate([Rows()[i] for i in range(4)])
    with caplog.at_level(logging.INFO, logger="peft_learners"):
        model.base_model.set_schedule(4, 2, optimizer=optimizer)
        for step in range(1, 4):
            model(**batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
    lines = [record.getMessage() for record in caplog.records if record.name == "peft_learners"]
    assert lines == [
        "step 0, adapter 'default': phase 'priming' begins; trained parameters 4,498",
        "step 2, adapter 'default': phase 'learning' begins; trained parameters 4,498 -> 2,450; "
        f"optimizer state {4 * 4498 / 1e3:.1f} kB -> {4 * 2450 / 1e3:.2f} kB",
    ]
