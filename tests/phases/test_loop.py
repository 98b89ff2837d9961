"""Loops without Trainer: the example script as it stands, and update_and_allocate by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftConfig, PeftModel
from training import Rows, adapter_values, dense_parameters, learner

from peft_learners import ScheduleError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "demo" / "accelerate_loop.py"


def run_script(out: Path, *prefix: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*prefix, "-m", "scripts.demo.accelerate_loop", "--output_dir", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_accelerate_example_goes_through_its_phases(tmp_path: Path, processes):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    out = run_script(tmp_path / "adapter", sys.executable, *(torchrun if processes == 2 else ()))
    trained = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters trained", out)]
    # the boundary at the end of the second epoch takes the dense deltas of 8 layers of 32 x 32
    assert trained[0] - trained[1] == 8 * 32 * 32 and trained[1] == trained[2] == trained[3]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0]
    assert PeftConfig.from_pretrained(tmp_path / "adapter").completed_phases == ["priming"]


def test_the_example_marks_at_most_three_lines():
    assert len(re.findall(r"  # \d: ", SCRIPT.read_text())) == 3


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


def test_a_hand_written_loop_resumed_from_a_saved_adapter_keeps_its_boundary(tmp_path: Path):
    """The steps per epoch have changed, but the boundary recorded in the adapter's config stays."""
    model = learner(priming_epochs=2)  # 2 steps per epoch: the boundary is step 4
    model.base_model.set_schedule(8, 2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
    again.base_model.set_schedule(80, 20, global_step=3)
    assert not again.base_model.update_and_allocate(3)
    (start,) = again.base_model.update_and_allocate(4)
    assert (start.phase, start.first_step) == ("learning", 4)


def test_scaled_learning_rate_holds_by_hand_and_means_this_for_sgd():
    """D = s theta: plain SGD moves D by s^2 lr g, as its gradient and its step are both scaled."""
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


def test_update_without_a_schedule_says_what_to_call():
    with pytest.raises(ScheduleError, match=r"before the adapter 'default' had a schedule.*set_schedule\(total_steps"):
        learner().base_model.update_and_allocate(1)


def test_update_without_a_schedule_works_where_priming_is_given_in_steps():
    model = learner(priming_steps=3)
    assert not [s for step in (1, 2) for s in model.base_model.update_and_allocate(step) if s.phase == "learning"]
    assert [s.phase for s in model.base_model.update_and_allocate(3)] == ["learning"]


def test_updates_are_idempotent_and_may_skip_steps():
    model = learner(priming_epochs=1)
    model.base_model.set_schedule(10, 4)
    assert model.base_model.update_and_allocate(3) == []
    assert len(model.base_model.update_and_allocate(9)) == 1
    assert model.base_model.update_and_allocate(9) == []


def test_only_active_adapters_are_driven():
    model = learner(priming_epochs=1)
    other = learner(priming_epochs=2).peft_config["default"]
    model.add_adapter("other", other)
    model.base_model.set_schedule(8, 2)
    model.base_model.update_and_allocate(8)
    assert model.peft_config["default"].completed_phases == ["priming"]
    assert model.peft_config["other"].completed_phases == []
    before = adapter_values(model)
    model.set_adapter("other")
    assert all(p.requires_grad for n, p in model.named_parameters() if "learner_dense_delta.other" in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "learner_dense_delta.default" in n)
    assert all(torch.equal(v, before[n]) for n, v in adapter_values(model).items())


def test_optimizer_by_hand_keeps_state_for_what_trains_only():
    model = learner(priming_epochs=1)
    optimizer = by_hand(model, 5)
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
