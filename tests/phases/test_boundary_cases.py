"""Moments at which a phase boundary could go wrong, one by one; most were found by a reviewer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from training import Around, Rows, adapter_values, arguments, bottleneck, dense_parameters, far, learner, nas, trainer
from transformers import TrainerCallback

from peft_learners import LearnerConfig, ScheduleError


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


PRIMED, UNPRIMED = 4498, 2450


def finished(tmp_path: Path, **config) -> PeftModel:
    model = learner(**config)
    trainer(model, arguments(tmp_path)).train()
    return model


def test_stray_update(tmp_path: Path):
    """A stray update after training changes nothing."""
    model = finished(tmp_path)
    assert [s.phase for s in model.base_model.update_and_allocate(1)] == ["learning"]
    assert trained(model) == UNPRIMED and model.peft_config["default"].completed_phases == ["priming"]


def test_backwards_refused():
    """Steps that go backwards are refused."""
    model = learner()
    model.base_model.set_schedule(6, 2)
    model.base_model.update_and_allocate(3)
    with pytest.raises(ScheduleError, match=r"update_and_allocate\(1\) came after update_and_allocate\(3\)"):
        model.base_model.update_and_allocate(1)


def test_complete_stays_frozen(tmp_path: Path):
    """Training and evaluating leave a complete adapter frozen."""
    model = finished(tmp_path)
    run = trainer(model, arguments(tmp_path))
    run.evaluate()
    run.train()
    assert trained(model) == UNPRIMED
    run.evaluate()
    assert trained(model) == UNPRIMED


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_resume_after_evaluation(tmp_path: Path, verb):
    """A run is resumed after an evaluation. The optimizer's groups must hold what the checkpoint's do, also if the
    adapter is loaded in its last phase."""
    model = learner()
    trainer(model, arguments(tmp_path, save_strategy="steps", save_steps=4)).train()
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / "checkpoint-4", is_trainable=True)
    run = trainer(again, arguments(tmp_path))
    run.evaluate() if verb == "evaluate" else run.predict(Rows())
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trained(again) == UNPRIMED
    values, theirs = adapter_values(again), adapter_values(model)
    assert values.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in values.items())


@pytest.mark.parametrize("make", [learner, far, nas, bottleneck])
def test_inside_module(tmp_path: Path, make):
    """An adapter inside another module is driven."""
    around, alone = Around(make()), make()
    trainer(around, arguments(tmp_path)).train()
    trainer(alone, arguments(tmp_path)).train()
    config = around.encoders[0].peft_config["default"]
    assert config.phase_first_steps == alone.peft_config["default"].phase_first_steps
    assert trained(around.encoders[0]) == trained(alone) and trained(around.head) == 6


def test_inside_module_resumed(tmp_path: Path):
    """A Learner inside another module is resumed. Trainer's checkpoint holds the whole module then."""
    ends = []
    for step in (None, 2, 4):
        torch.manual_seed(0)
        around = Around(learner())
        checkpoint = step and str(tmp_path / f"checkpoint-{step}")
        settings = {} if step else {"save_strategy": "steps", "save_steps": 2}
        trainer(around, arguments(tmp_path, **settings)).train(resume_from_checkpoint=checkpoint)
        ends.append(around.state_dict())
    assert all(torch.equal(value, end[name]) for end in ends[1:] for name, value in ends[0].items())


def test_two_parts_refused(tmp_path: Path):
    """Adapters of two parts aren't driven together."""
    with pytest.raises(ValueError, match="several parts of it with adapters"):
        trainer(Around(learner(), learner()), arguments(tmp_path))


def test_finish_phases(tmp_path: Path):
    """A loop that ends early says so, and saves in the type for saving."""
    model = learner(save_dtype="bfloat16", priming_epochs=0)
    model.base_model.set_schedule(9, 3)
    model.base_model.update_and_allocate(4)

    def types() -> set[torch.dtype]:
        model.save_pretrained(tmp_path)
        values = load_file(tmp_path / "adapter_model.safetensors")
        return {value.dtype for name, value in values.items() if "learner_" in name}

    assert types() == {torch.float32}
    model.base_model.finish_phases()
    assert types() == {torch.bfloat16}


def test_metrics_are_numbers(tmp_path: Path):
    """Evaluation metrics hold numbers only."""
    model = learner()
    run = trainer(model, arguments(tmp_path, eval_strategy="epoch"))
    run.train()
    for logs in [run.evaluate(), *(log for log in run.state.log_history if "eval_loss" in log)]:
        assert all(isinstance(value, (int, float)) for value in logs.values())


def test_missing_updates_told(tmp_path: Path):
    """A schedule without updates is told at save and merge."""
    model = learner()
    model.base_model.set_schedule(6, 2)
    inputs = zoo.inputs_of("distilbert", model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        model(**inputs).loss.backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="about to be saved, but its phases were never driven"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="about to be merged, but its phases were never driven"):
        model.merge_and_unload()


def test_inactive_at_boundary():
    """An adapter that is inactive at its boundary is recorded all the same."""
    model = learner()
    model.add_adapter("other", LearnerConfig(r=2, priming_epochs=0, task_type="SEQ_CLS"))
    model.base_model.set_schedule(6, 2)
    model.set_adapter("other")
    model.base_model.update_and_allocate(2)
    assert model.peft_config["default"].completed_phases == ["priming"]
    model.set_adapter("default")
    assert not any(p.requires_grad for p in dense_parameters(model))


def test_deleted_adapter():
    """A deleted adapter leaves no mark on the next of its name."""
    model = learner()
    model.add_adapter("other", LearnerConfig(r=2, priming_epochs=0, task_type="SEQ_CLS"))
    model.base_model.set_schedule(6, 2)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.base_model.update_and_allocate(2)
    model.add_adapter("default", LearnerConfig(r=4, priming_epochs=1, task_type="SEQ_CLS"))
    model.set_adapter("default")
    assert len(dense_parameters(model)) == 8 and all(p.requires_grad for p in dense_parameters(model))


def test_merged_refused(tmp_path: Path):
    """A merged adapter isn't trained."""
    model = learner()
    model.merge_adapter()
    with pytest.raises(ScheduleError, match="'default' is merged and can't train"):
        trainer(model, arguments(tmp_path)).train()


def test_last_checkpoint_dtype(tmp_path: Path):
    """The last checkpoint keeps full precision too."""
    model = learner(save_dtype="bfloat16")
    trainer(model, arguments(tmp_path, save_strategy="steps", save_steps=1)).train()
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_complete_by_name_told(tmp_path: Path):
    """A config that only says that it is complete is told."""
    config = copy.deepcopy(finished(tmp_path).peft_config["default"])
    model = get_peft_model(zoo.build("distilbert"), config)
    with pytest.warns(UserWarning, match="says that priming is complete, but the adapter has nothing of it"):
        trainer(model, arguments(tmp_path)).train()


@pytest.mark.parametrize(("field", "default"), [("priming_lr_scale", 0.1), ("scaling", 1.0)])
def test_rescaled_resume_refused(tmp_path: Path, field, default):
    """A resume that would rescale the adapter is refused."""
    trainer(learner(), arguments(tmp_path, save_strategy="steps", save_steps=1)).train()
    run = trainer(learner(**{field: 0.5}), arguments(tmp_path))
    told = f"trained with {field}={default}, but the adapter 'default' has {field}=0.5"
    with pytest.raises(ScheduleError, match=told):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_inference_refused(tmp_path: Path):
    """An adapter loaded for inference isn't trained."""
    learner().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"active and trained\. Load it with .*is_trainable=True"):
        trainer(model, arguments(tmp_path)).train()


def test_interrupted(tmp_path: Path):
    """An interrupted training goes on where it stood."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    model = learner()
    run = trainer(model, arguments(tmp_path))
    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.pop_callback(Stop)
    run.train()
    starts = [(log["phase"], log["step"]) for log in run.state.log_history if "phase_first_step" in log]
    assert starts == [("learning", 0)] and trained(model) == UNPRIMED


class InPlace(nn.Module):
    """Writes into a view of a linear layer's output, as DeBERTa and Swin v2 do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.lin(x)
        out.view(-1, 8).mul_(2)
        out += 1
        return out


def test_output_written():
    """Outputs may be written to in place."""
    torch.manual_seed(0)
    base, x = InPlace(), torch.randn(2, 9, 8, requires_grad=True)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, LearnerConfig(r=2, priming_epochs=0))
    model(x).sum().backward()
    ours, x.grad = x.grad, None
    plain(x).sum().backward()
    torch.testing.assert_close(ours, x.grad)


class ReadsWeight(nn.Module):
    """Reads a projection's weight without calling it, as WavLM's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.attention["q_proj"].weight.t() + self.attention["v_proj"](x)


def test_unmoved_layers_told():
    """Layers that priming couldn't move are named."""
    model = get_peft_model(ReadsWeight(), LearnerConfig(r=2, priming_steps=1))
    model.base_model.set_schedule(3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(3, 8)).pow(2).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"Priming moved nothing in 1 layers .*first: attention\.q_proj"):
        model.base_model.update_and_allocate(1)


def test_zero_learning_rate(tmp_path: Path):
    """Priming at a learning rate of zero accuses no layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Priming moved nothing.*")
        trainer(learner(), arguments(tmp_path, learning_rate=0.0)).train()


@pytest.mark.parametrize("arch,names", [("llama", ["norm"]), ("roberta", ["dense"]), ("bert", ["LayerNorm"])])
def test_modules_to_save_names(arch, names):
    """`modules_to_save` may have any name. PEFT matches them by endings, so no container of ours, and no layer of
    ours, may answer to one."""
    model = get_peft_model(zoo.build(arch), LearnerConfig(r=2, modules_to_save=names))
    inputs = zoo.inputs_of(arch, model)
    model(**inputs).loss.backward()
    whole = [n for n, p in model.named_parameters() if ".modules_to_save." in n and p.requires_grad]
    assert any(f"{names[0]}.modules_to_save.default." in n for n in whole)
    assert not [n for n in whole if "learner_" in n]


def test_nothing_to_adapt_told():
    """Nothing left to adapt is told."""
    with pytest.raises(ValueError, match=r"No linear layer of the backbone is left to adapt with .*\[7\]"):
        learner(layers_to_transform=[7])
    with pytest.warns(UserWarning, match=r"exclude_modules=\['nowhere'\] match no module"):
        learner(exclude_modules=["nowhere"])


def test_wrong_input_dtype():
    """A wrong input type is refused as by the plain layer."""
    model = get_peft_model(InPlace(), LearnerConfig(r=2, priming_epochs=0))
    for rows in (1, 50):
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.randn(rows, 8, dtype=torch.bfloat16))


def test_copy_in_training(tmp_path: Path):
    """A copy and a pickle of a model in training stand alone."""
    model = learner()
    model.base_model.set_schedule(6, 2)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    model.base_model.update_and_allocate(2)
    for other in (twin, loaded):
        assert trained(other) == PRIMED and other.peft_config["default"].completed_phases == []
        other.base_model.set_schedule(6, 2)
        other.base_model.update_and_allocate(2)
        assert trained(other) == UNPRIMED
    assert all(torch.equal(v, adapter_values(twin)[n]) for n, v in adapter_values(model).items())
