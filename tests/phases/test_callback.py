"""PhaseCallback in real Trainer runs: what happens at the boundary, in the log, and with Trainer's options."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from training import (
    KEEP_BEST,
    Rows,
    TightTrainer,
    adapter_values,
    arguments,
    dense_parameters,
    far,
    learner,
    nas,
    trainer,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from peft_learners import LearnerConfig, PhaseCallback, ScheduleError
from peft_learners.phases.optimizer import raw_optimizer

PRIMED, UNPRIMED = 4498, 2450  # 8 dense deltas of 16 x 16 make the difference of 2048


def phase_starts(run: Trainer) -> list[tuple[str, int, int]]:
    return [
        (log["phase"], log["step"], log["trained_parameters"])
        for log in run.state.log_history
        if "phase_first_step" in log
    ]


class Grads(TrainerCallback):
    """Per optimizer step: whether the dense deltas have a gradient when the optimizer steps, and the clip norm's."""

    def __init__(self) -> None:
        self.dense: list[bool] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.dense.append(all(p.grad is not None for p in dense_parameters(model)))


def test_boundary(tmp_path: Path):
    """The boundary lies between two steps. Two steps per epoch, one epoch of priming: steps 1 and 2 are whole, step 3
    has no gradient of what froze."""
    grads = Grads()
    run = trainer(learner(), arguments(tmp_path), callbacks=[PhaseCallback(), grads])
    run.train()
    assert grads.dense == [True, True, False, False, False, False]
    assert phase_starts(run) == [("priming", 0, PRIMED), ("learning", 2, UNPRIMED)]


def test_state_freed(tmp_path: Path):
    """Optimizer state and gradients of what froze are freed."""
    model = learner()
    run = trainer(model, arguments(tmp_path))
    run.train()
    trained = {p for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained) == UNPRIMED
    assert set(raw_optimizer(run.optimizer).state) == trained
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_frozen_deltas_kept(tmp_path: Path):
    """Frozen deltas keep what priming gave them, in spite of weight decay."""
    at_boundary = {}

    class Capture(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                at_boundary.update({n: v.clone() for n, v in model.state_dict().items() if "dense_delta" in n})

    model = learner()
    trainer(model, arguments(tmp_path, weight_decay=0.5), callbacks=[PhaseCallback(), Capture()]).train()
    assert len(at_boundary) == 8
    for name, value in model.state_dict().items():
        if name in at_boundary:
            assert torch.equal(value, at_boundary[name]) and value.any()


def test_weight_decay(tmp_path: Path):
    """Norm and bias deltas are exempt from weight decay."""
    model = learner()
    run = trainer(model, arguments(tmp_path))
    decayed = set(run.get_decay_parameter_names(model))
    names = [n for n, p in model.named_parameters() if p.requires_grad and ".learner_" in n]
    assert {n.split(".learner_")[1].split(".")[0] for n in names if n in decayed} == {"P1", "P2", "dense_delta"}
    assert {n.split(".learner_")[1].split(".")[0] for n in names if n not in decayed} == {
        "bias_delta",
        "layernorm_delta",
    }


def test_trainer_logs(tmp_path: Path):
    """Trainer's logs carry phase and trained parameters of the step."""
    run = trainer(learner(), arguments(tmp_path))
    run.train()
    logs = [(log["step"], log["phase"], log["trained_parameters"]) for log in run.state.log_history if "loss" in log]
    assert logs == [(s, "priming", PRIMED) for s in (1, 2)] + [(s, "learning", UNPRIMED) for s in (3, 4, 5, 6)]


@pytest.mark.parametrize(
    "settings,boundary",
    [
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 3),  # 6 batches, 3 steps per epoch
        ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}, 2),  # 6 batches: 4 and a rest of 2
        ({"max_steps": 5}, 2),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 7}, 3),  # 24 rows: 3 whole batches
        ({"per_device_train_batch_size": 7}, 4),
    ],
)
def test_epochs_to_steps(tmp_path: Path, settings, boundary):
    """Epochs become optimizer steps as Trainer counts them."""
    run = trainer(learner(), arguments(tmp_path, **settings))
    run.train()
    assert phase_starts(run)[1][1] == boundary


def test_fractional_epochs(tmp_path: Path):
    run = trainer(learner(priming_epochs=1.5), arguments(tmp_path))
    run.train()
    assert phase_starts(run)[1][1] == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["checkpointing", "checkpointing-reentrant", "bf16", "evaluation"],
)
def test_trainer_options(tmp_path: Path, settings):
    """Trainer's options behave."""
    model = learner()
    run = trainer(model, arguments(tmp_path, **settings))
    run.train()
    assert phase_starts(run) == [("priming", 0, PRIMED), ("learning", 2, UNPRIMED)]
    assert run.state.global_step == 6
    assert all(p.any() for p in dense_parameters(model))


@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "steps", "eval_steps": 1}], ids=["plain", "evaluated"])
def test_options_change_nothing(tmp_path: Path, settings):
    """Checkpointing and evaluation change no value."""
    reference, other = learner(), learner()
    trainer(reference, arguments(tmp_path)).train()
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer(other, arguments(tmp_path, **(settings or more))).train()
    theirs = adapter_values(other)
    assert all(torch.equal(value, theirs[name]) for name, value in adapter_values(reference).items())


@pytest.mark.slow
def test_torch_compile(tmp_path: Path):
    model = learner()
    run = trainer(model, arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager"))
    run.train()
    plain = learner()
    trainer(plain, arguments(tmp_path)).train()
    assert phase_starts(run) == [("priming", 0, PRIMED), ("learning", 2, UNPRIMED)]
    theirs = adapter_values(plain)
    for name, value in adapter_values(model).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def test_best_from_priming(tmp_path: Path):
    """`load_best_model_at_end` from priming says so, and corrects the record. The best checkpoint is forced to be the
    first, by a metric that only grows worse."""
    scores = iter(range(10))
    model = learner(priming_epochs=2)
    run = trainer(
        model,
        arguments(
            tmp_path, **KEEP_BEST, metric_for_best_model="worse", greater_is_better=False,
        ),
        compute_metrics=lambda prediction: {"worse": next(scores)},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="still in its phase 'priming', which lasts until step 4"):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert model.peft_config["default"].completed_phases == []
    saved = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / "checkpoint-1")
    theirs = adapter_values(saved)
    assert all(torch.equal(value, theirs[name]) for name, value in adapter_values(model).items())


def test_best_from_last_phase(tmp_path: Path):
    """`load_best_model_at_end` from the last phase leaves the adapter complete."""
    scores = iter(range(10))
    model = learner()
    run = trainer(
        model,
        arguments(
            tmp_path, **KEEP_BEST, metric_for_best_model="better", greater_is_better=True,
        ),
        compute_metrics=lambda prediction: {"better": next(scores)},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*still in its phase.*")
        run.train()
    assert model.peft_config["default"].completed_phases == ["priming"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == UNPRIMED


def test_early_stopping_told(tmp_path: Path):
    """Early stopping in priming is told."""
    model = learner(priming_epochs=3)
    run = trainer(
        model,
        arguments(
            tmp_path, **KEEP_BEST, num_train_epochs=4, metric_for_best_model="flat", greater_is_better=True,
        ),
        compute_metrics=lambda prediction: {"flat": 0.5},
        callbacks=[PhaseCallback(), EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the phase 'learning' never began"):
        run.train()
    assert run.state.global_step == 3


def test_auto_find_batch_size(tmp_path: Path):
    """`auto_find_batch_size` begins the phases again. Out of memory after the boundary: Trainer starts over with a
    smaller batch, and so do the phases."""

    model = learner()
    run = TightTrainer(
        model,
        arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16),
        train_dataset=Rows(24),
        callbacks=[PhaseCallback()],
    )
    run.train()
    # 16 rows at once: 2 steps per epoch; after the restart with 14 (0.9 x) it is still 2, so look at the batch size
    assert run._train_batch_size < 16
    steps = -(-24 // run._train_batch_size)
    assert phase_starts(run) == [("priming", 0, PRIMED), ("learning", steps, UNPRIMED)]
    assert run.state.global_step == 3 * steps


def test_second_training(tmp_path: Path):
    """A second training doesn't prime again unless asked."""
    model = learner()
    trainer(model, arguments(tmp_path)).train()
    second = trainer(model, arguments(tmp_path))
    second.train()
    assert phase_starts(second) == [("learning", 0, UNPRIMED)]
    model.base_model.restart_phases()
    third = trainer(model, arguments(tmp_path))
    third.train()
    assert phase_starts(third) == [("priming", 0, PRIMED), ("learning", 2, UNPRIMED)]


def test_second_train_call(tmp_path: Path):
    """A second call of `train` goes on in the last phase."""
    model = learner()
    run = trainer(model, arguments(tmp_path))
    run.train()
    dense = [p.detach().clone() for p in dense_parameters(model)]
    run.train()
    assert phase_starts(run) == [("learning", 0, UNPRIMED)]
    assert all(torch.equal(a, b) for a, b in zip(dense, dense_parameters(model), strict=True))


def test_loaded_trainable(tmp_path: Path):
    """An adapter loaded for training doesn't prime again."""
    model = learner()
    trainer(model, arguments(tmp_path)).train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / "adapter", is_trainable=True)
    run = trainer(again, arguments(tmp_path))
    run.train()
    assert phase_starts(run) == [("learning", 0, UNPRIMED)]
    assert set(raw_optimizer(run.optimizer).state) == {p for p in again.parameters() if p.requires_grad}


def test_config_reused(tmp_path: Path):
    """A config object can be used for the next model."""
    config = LearnerConfig(r=4, priming_epochs=1, task_type="SEQ_CLS")
    first = get_peft_model(zoo.build("distilbert"), config)
    trainer(first, arguments(tmp_path)).train()
    second = get_peft_model(zoo.build("bert"), config)
    assert second.peft_config["default"].completed_phases == []
    assert first.peft_config["default"].completed_phases == ["priming"]
    run = trainer(second, arguments(tmp_path))
    run.train()
    assert [start[0] for start in phase_starts(run)] == ["priming", "learning"]


def test_transformers_add_adapter(tmp_path: Path):
    """An adapter of transformers' own `add_adapter` is driven too."""
    model = zoo.build("distilbert")
    model.add_adapter(LearnerConfig(r=4, priming_epochs=1))
    run = trainer(model, arguments(tmp_path))
    run.train()
    assert phase_starts(run) == [("priming", 0, PRIMED), ("learning", 2, UNPRIMED)]


# -- what checkpoints keep ------------------------------------------------------------------------------------------


def kept_in(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["PhaseCallback"]


def test_checkpoint_boundaries(tmp_path: Path):
    """Checkpoints keep the boundaries beside the log, and tell which files they have."""
    run = trainer(learner(scaling=0.5), arguments(tmp_path, save_strategy="steps", save_steps=3))
    run.train()
    expected = {
        "first_steps": {"default": {"priming": 0, "learning": 2}},
        "fixed": {"default": {"scaling": 0.5, "priming_lr_scale": 0.1, "after_priming": "keep"}},
        "learned": {"default": {"kept_energy": None}},
        "saved": {"output_dir": str(tmp_path), "files": ["optimizer.pt", "scheduler.pt", "rng_state.pth"]},
    }
    for name in ("checkpoint-3", "checkpoint-6"):
        assert kept_in(tmp_path / name) == {"args": {"stop_at_boundary": False}, "attributes": expected}
    assert all(set(log) & {"loss", "phase_first_step", "train_runtime"} for log in run.state.log_history)


@pytest.mark.parametrize("make,callbacks,restored", [(learner, 1, False), (learner, 2, False), (nas, 2, True)])
def test_resume_keeps_boundary(tmp_path: Path, make, callbacks, restored):
    """With half the batch the boundary would be step 4, or NAS-LoRA's 6. With `restored`, Trainer makes the callbacks
    anew; with two of them, it keeps a list."""

    def run(**settings) -> Trainer:
        own = [PhaseCallback() for _ in range(callbacks)]
        settings = {"restore_callback_states_from_checkpoint": restored, "save_steps": 1, **settings}
        return trainer(make(), arguments(tmp_path, save_strategy="steps", **settings), callbacks=own)

    whole = run()
    whole.train()
    boundary = phase_starts(whole)[1][1]
    again = run(per_device_train_batch_size=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [start[1] for start in phase_starts(again)] == [0, boundary] and again.state.global_step == 12
    kept = kept_in(tmp_path / "checkpoint-12")["attributes"]["first_steps"]["default"]
    assert sorted(kept.values()) == [0, boundary]


@pytest.mark.parametrize("restored", [False, True], ids=["by-default", "restored"])
def test_resume_bit_equal(tmp_path: Path, restored):
    """A resumed run ends bit for bit as the whole one."""
    settings = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": restored}
    whole, again = far(), far()
    trainer(whole, arguments(tmp_path, **settings)).train()
    trainer(again, arguments(tmp_path, **settings)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    ours = adapter_values(again)
    assert all(torch.equal(ours[name], value) for name, value in adapter_values(whole).items())


def test_resume_from_foreign_checkpoint(tmp_path: Path):
    """A checkpoint that was written without the callback can be resumed with it."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(learner(), arguments(tmp_path, **settings), callbacks=[]).train()
    run = trainer(learner(), arguments(tmp_path, **settings))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [start[1] for start in phase_starts(run)] == [1, 2]
    assert kept_in(tmp_path / "checkpoint-6")["attributes"]["first_steps"] == {
        "default": {"priming": 0, "learning": 2}
    }


# -- told before training starts --------------------------------------------------------------------------------------


def test_too_few_steps(tmp_path: Path):
    """Fewer steps than priming needs are told."""
    run = trainer(learner(priming_epochs=4), arguments(tmp_path))
    with pytest.raises(ScheduleError, match=r"priming needs 8 optimizer steps, but training has only 6\. "
                                            r"priming_epochs=4 at 2 steps per epoch is too long: set it lower, "
                                            r"for example LearnerConfig\(priming_epochs=1\.5\)"):  # fmt: skip
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("after_priming", ["keep", "fold"])
@pytest.mark.parametrize("epochs,advised", [(2, 1), (1, 0.5)])
def test_priming_whole_training(tmp_path: Path, epochs, advised, after_priming):
    """Priming to the last step is refused before the first, by default too, and the advised value trains."""
    run = trainer(
        learner(priming_epochs=epochs, after_priming=after_priming), arguments(tmp_path, num_train_epochs=epochs)
    )
    with pytest.raises(ScheduleError, match="which leaves none for learning") as error:
        run.train()
    assert run.state.global_step == 0
    assert f"for example LearnerConfig(priming_epochs={advised})" in str(error.value)
    run = trainer(
        learner(priming_epochs=advised, after_priming=after_priming), arguments(tmp_path, num_train_epochs=epochs)
    )
    run.train()
    assert [start[0] for start in phase_starts(run)] == ["priming", "learning"]


def test_priming_steps_whole_training(tmp_path: Path):
    """The same of priming that is given in steps."""
    run = trainer(learner(priming_epochs=0, priming_steps=6), arguments(tmp_path))
    with pytest.raises(ScheduleError, match="leaves none for learning. Set priming_steps to at most 5, or train"):
        run.train()
    run = trainer(learner(priming_epochs=0, priming_steps=5), arguments(tmp_path))
    run.train()
    assert phase_starts(run)[1] == ("learning", 5, UNPRIMED)


def test_model_without_attention(tmp_path: Path):
    model = learner(target_modules=["lin1", "lin2"])
    run = trainer(model, arguments(tmp_path))
    with pytest.raises(ScheduleError, match="none of its layers belongs to an attention.*priming_epochs=0"):
        run.train()


def test_iterable_dataset(tmp_path: Path):
    """Data without a length are taken."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Rows(24))

    args = arguments(tmp_path, max_steps=6)
    run = Trainer(learner(), args, train_dataset=Stream(), callbacks=[PhaseCallback()])
    with pytest.raises(ScheduleError, match=r"Give priming in steps: LearnerConfig\(priming_steps=\.\.\.\)"):
        run.train()
    run = Trainer(learner(priming_steps=2), args, train_dataset=Stream(), callbacks=[PhaseCallback()])
    run.train()
    assert phase_starts(run)[1] == ("learning", 2, UNPRIMED)


def test_callback_without_an_adapter(tmp_path: Path):
    with pytest.raises(ValueError, match="PhaseCallback found no adapter of peft_learners"):
        trainer(zoo.build("distilbert"), arguments(tmp_path))


def test_missing_callback_told(tmp_path: Path):
    """Training without the callback is told at save and merge."""
    model = learner()
    trainer(model, arguments(tmp_path), callbacks=[]).train()
    with pytest.warns(UserWarning, match=r"about to be saved, but its phases were never driven.*PhaseCallback\(\)"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="about to be merged, but its phases were never driven"):
        model.merge_and_unload()


def test_silent_save_and_merge(tmp_path: Path):
    """A fresh or a driven adapter is saved and merged in silence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never driven.*")
        learner().save_pretrained(tmp_path / "fresh")
        model = learner()
        trainer(model, arguments(tmp_path)).train()
        model.save_pretrained(tmp_path / "trained")
        PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / "trained").merge_and_unload()


def test_priming_lr_scale(tmp_path: Path):
    """The learning rate of primed deltas is scaled without parameter groups. The first Adam step moves every entry by
    lr * g / (|g| + eps'), so by lr, and D by priming_lr_scale * lr."""
    scale, lr = 0.25, 1e-3
    model = learner(priming_lr_scale=scale)
    settings = {"max_steps": 1, "learning_rate": lr, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    run = trainer(model, arguments(tmp_path, **settings, num_train_epochs=1), callbacks=[])
    run.train()
    assert len(run.optimizer.param_groups) == 2  # Trainer's own: with and without decay
    layer = model.base_model.model.distilbert.transformer.layer[0].attention.v_lin
    before = model.base_model.model.distilbert.transformer.layer[0].attention.v_lin.learner_P2["default"].weight
    dense = layer.get_delta_weight("default") - before @ layer.learner_P1["default"].weight
    moved = dense.abs()
    assert moved.max() <= scale * lr * (1 + 1e-3)
    assert moved.median() > 0.9 * scale * lr
