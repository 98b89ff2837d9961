"""What a user of Trainer sees of a boundary: one line on the console, and what reporters receive."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from training import arguments, far, learner, nas, trainer
from transformers import TrainerCallback

from peft_learners import PhaseCallback
from peft_learners.phases.driver import PhaseStart
from peft_learners.phases.optimizer import raw_optimizer
from peft_learners.phases.report import tell

PRIMED, UNPRIMED = 4498, 2450


class State(TrainerCallback):
    """Bytes of the optimizer's state right before and right after the boundary's `on_step_end` of PhaseCallback."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def look(self, optimizer) -> None:
        state = raw_optimizer(optimizer).state.values()
        self.bytes.append(sum(v.nbytes for values in state for v in values.values() if hasattr(v, "nbytes")))

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.look(optimizer)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.look(optimizer)


@pytest.mark.parametrize("bar", [True, False], ids=["bar", "disable_tqdm"])
def test_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, bar):
    """At a boundary one line stands on the console, whatever the log level, and none in the log beside it."""
    seen = State()
    logging.getLogger("peft_learners").setLevel(logging.INFO if bar else logging.CRITICAL)
    try:
        args = arguments(tmp_path, disable_tqdm=not bar, logging_strategy="no")
        trainer(learner(), args, callbacks=[PhaseCallback(), seen]).train()
    finally:
        logging.getLogger("peft_learners").setLevel(logging.NOTSET)
    before, after = seen.bytes[3], seen.bytes[4]  # at the end of step 2, at the beginning of step 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "phase" in line]
    assert lines == [
        f"step 2, adapter 'default': phase 'learning' begins; trained parameters {PRIMED:,} -> {UNPRIMED:,}; "
        f"optimizer state {before / 1e3:.1f} kB -> {after / 1e3:.1f} kB"
    ]
    assert before > after > 8 * UNPRIMED  # AdamW's two moments, and its steps
    assert not [record for record in caplog.records if record.name == "peft_learners"]


@pytest.mark.parametrize("make,phase", [(far, "reconfigured"), (nas, "retraining")])
def test_other_methods(tmp_path: Path, capsys: pytest.CaptureFixture, make, phase):
    """The same of other methods; a phase that begins anew has no optimizer state. Who keeps copies of parameters, by
    name or in a list, is told that they are others now."""
    trainer(make(), arguments(tmp_path, logging_strategy="no")).train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"phase {phase!r} begins" in line]
    own, _, stale = line.rpartition("; ")
    assert own.endswith("-> 0 B") == (make is nas)
    assert stale == "copies of parameters kept elsewhere (an EMA) are stale"


def test_energy_of_a_fold(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The line of a fold has the least and the median share of the energy that was kept."""
    model = learner(after_priming="fold", fold_rank=4)
    trainer(model, arguments(tmp_path, logging_strategy="no")).train()
    shares = model.peft_config["default"].kept_energy
    least = min(shares, key=shares.get)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "phase 'learning' begins" in line]
    middle = sorted(shares.values())[3:5]
    assert f"8 layers folded, kept energy: least {shares[least]:.4f} ({least}), median {sum(middle) / 2:.4f}" in line


def test_resumed(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A resumed run does not tell a boundary again that it had behind it."""
    settings = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "no"}
    trainer(learner(), arguments(tmp_path, **settings)).train()
    capsys.readouterr()
    for checkpoint, lines in ((1, 1), (2, 0), (4, 0)):
        trainer(learner(), arguments(tmp_path, **settings)).train(
            resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}")
        )
        assert capsys.readouterr().out.count("phase 'learning'") == lines


def test_other_ranks(capsys: pytest.CaptureFixture):
    """Other ranks than the first print nothing."""
    start = PhaseStart("default", "learning", 2, 10, 5, step=2)
    for bar in (True, False):
        tell([start], SimpleNamespace(disable_tqdm=not bar), SimpleNamespace(is_world_process_zero=False))
    assert capsys.readouterr().out == ""
    tell([start], SimpleNamespace(disable_tqdm=True), SimpleNamespace(is_world_process_zero=True))
    assert "phase 'learning' begins; trained parameters 10 -> 5\n" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    """Of two processes one prints the line, beside its bar."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = (str(processes.TESTS / "runs" / "train_tiny.py"), str(tmp_path), "--tuner", "learner")
    settings = ("--set", 'save_strategy="no"', 'logging_strategy="no"', "disable_tqdm=false")
    done = subprocess.run([*torchrun, *run, *settings], env=processes.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("phase 'learning' begins") == 1
    assert "trained parameters 4,498 -> 2,450" in done.stdout


# -- reporters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "given"])
def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how):
    """TensorBoard's event files have the phase and the trained parameters of each step, once its reporter comes after
    PhaseCallback."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    if how == "moved":
        run = trainer(learner(), arguments(tmp_path, report_to=["tensorboard"]))
        run.add_callback(run.pop_callback(TensorBoardCallback))
    else:
        callbacks = [PhaseCallback(), TensorBoardCallback()]
        run = trainer(learner(), arguments(tmp_path), callbacks=callbacks)
    run.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    trained = [(event.step, event.value) for event in events.Scalars("train/trained_parameters")]
    assert trained == [(step, PRIMED if step < 3 else UNPRIMED) for step in range(1, 7)]
    texts = events.Tensors("train/phase/text_summary")
    phases = [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts]
    assert phases == [(step, "priming" if step < 3 else "learning") for step in range(1, 7)]


def test_reporters_as_they_stand(tmp_path: Path):
    """A reporter that Trainer makes itself is called before, and gets neither: the reason for the line above."""

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    for moved in (False, True):
        seen: list[set[str]] = []
        run = trainer(learner(), arguments(tmp_path), callbacks=[Reporter(), PhaseCallback()])
        if moved:
            run.add_callback(run.pop_callback(Reporter))
        run.train()
        losses = [keys for keys in seen if "loss" in keys]
        assert len(losses) == 6 and all(({"phase", "trained_parameters"} <= keys) == moved for keys in losses)
