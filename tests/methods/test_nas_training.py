"""NAS-LoRA under Trainer and in loops: scores against hand-written training, schedules, best models, files."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from searches import adam, searched
from torch import Tensor, nn
from training import KEEP_BEST, Rows, TightTrainer, adapter_values, arguments, nas, trainer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from zoo import logits_of

from peft_learners import PhaseCallback, ScheduleError, get_phased_scheduler

FILE = "adapter_model.safetensors"


def starts(run: Trainer) -> list[tuple[str, int]]:
    return [(log["phase"], log["phase_first_step"]) for log in run.state.log_history if "phase_first_step" in log]


def full_batch(rows: int = 24) -> dict[str, Tensor]:
    return torch.utils.data.default_collate([Rows(rows)[i] for i in range(rows)])


def scores_of(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """What a search has gathered so far, by module and part."""
    root = model.base_model.model
    return {
        (name, part): scores.clone()
        for name, layer in root.named_modules()
        for part, scores in getattr(layer, "nas_lora_scores", {}).get("default", {}).items()
    }


def by_hand(model: nn.Module, steps: int, clip: float | None, lr: float) -> dict[tuple[str, str], Tensor]:
    """Full-batch Adam written out in float64, with `-theta * gradient` summed over its steps."""
    model = copy.deepcopy(model).double().train()
    inputs = full_batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = searched(model)
    scores = {key: torch.zeros_like(p) for key, p in own.items()}
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(1, steps + 1):
        gradients = list(torch.autograd.grad(model(**inputs).loss, parameters))
        if clip is not None:
            norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(())))
            gradients = [g * min(1.0, clip / (norm.item() + 1e-6)) for g in gradients]
        by_parameter = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
        for key, p in own.items():
            scores[key] -= p.detach() * by_parameter[id(p)]
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return scores


def assert_same_scores(ours: dict[tuple[str, str], Tensor], theirs: dict[tuple[str, str], Tensor]) -> None:
    assert ours and ours.keys() <= theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    for key, value in ours.items():
        torch.testing.assert_close(
            value.double(), theirs[key], rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k} {m}"
        )


class Capture(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step, self.scores = step, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.scores = scores_of(model)


@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("granularity", ["structured", "unstructured"])
def test_scores(tmp_path: Path, clip, accumulation, granularity):
    """Scores are those of a loop by hand. A batch of all rows in each step, whole or in three parts; gradients as they
    are after clipping."""
    model = nas("bert", granularity=granularity)
    model.base_model.model.accepts_loss_kwargs = False  # its loss is a mean over its own batch, whatever it is told
    expected = by_hand(model, steps=3, clip=clip, lr=1e-2)
    capture = Capture(step=3)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation,
        "max_steps": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.0, "max_grad_norm": clip or 0.0,
    }  # fmt: skip
    trainer(model, arguments(tmp_path, **settings), callbacks=[capture, PhaseCallback()]).train()
    assert_same_scores(capture.scores, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    """Scores are of unscaled gradients, and of no skipped step. A GradScaler scales by a power of two, which changes
    no bit, and skips a step whose gradients overflow."""
    reference, model = nas("bert"), nas("bert")
    inputs = full_batch()

    def optimizer_for(m: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in m.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=fused)

    plain = optimizer_for(reference)
    reference.base_model.set_schedule(total_steps=20, optimizer=plain)
    reference.train()
    for step in range(3):
        reference(**inputs).loss.backward()
        plain.step()
        plain.zero_grad()
        reference.base_model.update_and_allocate(step + 1)

    optimizer, scaler = optimizer_for(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.base_model.set_schedule(total_steps=20, optimizer=optimizer)
    model.train()
    for step in range(4):
        scaler.scale(model(**inputs).loss).backward()
        if step == 1:
            next(iter(searched(model).values())).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step + 1)
    ours, theirs = scores_of(model), scores_of(reference)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-9)


def learning_rates(run: Trainer) -> list[float]:
    return [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log]


def test_schedule_per_phase(tmp_path: Path):
    """Each phase has a whole learning-rate schedule of its own. Linear, warm-up of a quarter: 4 steps of search and 5
    of retraining have 1 and 2 (rounded up) steps of it."""
    settings = {"max_steps": 9, "warmup_steps": 0.25, "learning_rate": 1.0, "logging_steps": 1}
    run = trainer(nas(search_steps=4), arguments(tmp_path, **settings))
    run.train()
    search = [0, 1, 2 / 3, 1 / 3]
    retraining = [0, 1 / 2, 1, 2 / 3, 1 / 3]
    assert learning_rates(run) == pytest.approx([*search, *retraining])


@pytest.mark.parametrize("kind", ["cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_schedule_kinds(tmp_path: Path, kind):
    """A schedule of any kind begins again at the boundary."""
    settings = {"max_steps": 8, "warmup_steps": 1, "lr_scheduler_type": kind, "logging_steps": 1}
    run = trainer(nas(), arguments(tmp_path, **settings))
    run.train()
    rates = learning_rates(run)
    assert rates[:4] == pytest.approx(rates[4:]) and max(rates) == pytest.approx(run.args.learning_rate)


@pytest.mark.parametrize(
    "kind,settings",
    [
        ("cosine_with_min_lr", {"min_lr": 1e-3}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-3}),
        ("polynomial", {"lr_end": 1e-3}),
        ("cosine_with_restarts", {"num_cycles": 2}),
    ],
)
def test_schedule_values(tmp_path: Path, kind, settings):
    """Each piece is transformers' own schedule."""
    from transformers import get_scheduler

    given = {"max_steps": 8, "warmup_steps": 1, "lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}
    run = trainer(nas(), arguments(tmp_path, **given, logging_steps=1))
    run.train()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = get_scheduler(kind, optimizer, 1, 4, settings)
    expected = []
    for _ in range(4):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert learning_rates(run) == pytest.approx([*expected, *expected])


def test_long_warmup_told(tmp_path: Path):
    """A warm-up longer than a phase is told."""
    with pytest.warns(UserWarning, match="warm-up of 5 steps is as long as a phase of 4 steps"):
        trainer(nas(), arguments(tmp_path, max_steps=8, warmup_steps=5)).train()


def test_plateau_refused(tmp_path: Path):
    """A schedule that is no function of the step is refused."""
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    with pytest.raises(ScheduleError, match="'reduce_lr_on_plateau' can't begin anew"):
        trainer(nas(), arguments(tmp_path, **settings)).train()


def test_own_scheduler(tmp_path: Path):
    """A scheduler of the user's own is left alone, with a warning."""
    model = nas()
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run = trainer(model, arguments(tmp_path, logging_steps=1), optimizers=(optimizer, schedule))
    with pytest.warns(UserWarning, match="goes on across the phase boundary"):
        run.train()
    assert learning_rates(run)[-1] == pytest.approx(1e-2 / 6)


def test_phased_scheduler():
    """Loops get a scheduler that begins again."""
    model = nas()
    optimizer = adam(model, lr=1.0)
    with pytest.raises(ScheduleError, match="set_schedule"):
        get_phased_scheduler("linear", optimizer, model)
    model.base_model.set_schedule(total_steps=8, optimizer=optimizer)
    scheduler = get_phased_scheduler("linear", optimizer, model, warmup_steps=0.25)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 1, 2 / 3, 1 / 3] * 2)


def test_best_model(tmp_path: Path):
    """The best model is one of the retraining. The search scored best of all, but what is loaded at the end is the
    best of what is kept. (The third evaluation is that of the rewound adapter.)"""
    scores = iter([9.0, 8.0, 10.0, 1.0, 3.0, 2.0])
    model = nas()
    run = trainer(
        model,
        arguments(tmp_path, **KEEP_BEST, metric_for_best_model="good", greater_is_better=True),
        compute_metrics=lambda prediction: {"good": next(scores)},
    )
    run.train()
    assert run.state.best_global_step == 5 and run.state.best_metric == 3.0
    assert model.peft_config["default"].completed_phases == ["search"]
    theirs = load_file(tmp_path / "checkpoint-5" / FILE)
    ours = {n.replace(".default", "").replace(".modules_to_save", ""): v for n, v in adapter_values(model).items()}
    assert all(torch.equal(v, theirs[n]) for n, v in ours.items() if v.numel())
    assert model.base_model.architecture().kept == model.base_model.architecture().budget


def test_early_stopping(tmp_path: Path):
    """Early stopping in the search is told, and begins anew after it."""

    def stopped_at(values: list[float], patience: int) -> Trainer:
        scores = iter(values)
        run = trainer(
            nas(),
            arguments(tmp_path / str(patience), **KEEP_BEST, metric_for_best_model="good", greater_is_better=True),
            compute_metrics=lambda prediction: {"good": next(scores)},
            callbacks=[PhaseCallback(), EarlyStoppingCallback(early_stopping_patience=patience)],
        )
        run.train()
        return run

    with pytest.warns(UserWarning, match="still in its phase 'search'.*'retraining' never began"):
        assert stopped_at([5.0, 4.0, 3.0], patience=1).state.global_step == 2
    # Two evaluations below the search's best, but the first of the retraining is its best: patience is not used up.
    run = stopped_at([9.0, 8.0, 1.0, 2.0, 3.0, 4.0], patience=2)
    assert run.state.global_step == 6 and run.state.best_global_step == 6


def test_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The log says what is kept, and that the head isn't counted."""
    model = nas(parameter_budget=100)
    space = model.base_model.architecture().space
    with caplog.at_level(logging.INFO, logger="peft_learners"):
        run = trainer(model, arguments(tmp_path))
        run.train()
    lines = [record.getMessage() for record in caplog.records if record.name == "peft_learners"]
    assert (
        f"adapter 'default': 100 of {space} parameters of the search space are kept (budget 100; the head is not "
        in (" ".join(lines))
    )
    assert starts(run) == [("search", 0), ("retraining", 3)]


def test_weight_decay(tmp_path: Path):
    """Weight decay takes the factors, and no bias."""
    run = trainer(nas(), arguments(tmp_path))
    run.create_optimizer()
    names = {p: n for n, p in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        own = {names[p].split(".nas_lora_")[1] for p in group["params"] if ".nas_lora_" in names[p]}
        assert own == (
            {"U.default.weight", "V.default.weight"} if group["weight_decay"] > 0 else {"bias_delta.default.bias"}
        )


@pytest.mark.parametrize("granularity", ["structured", "unstructured"])
def test_second_training(tmp_path: Path, granularity):
    """A second training, a restarted one, and one that begins again with smaller batches."""
    config = {"granularity": granularity, "parameter_budget": 0.1}
    model = nas(**config)
    run = trainer(model, arguments(tmp_path))
    run.train()
    kept = model.base_model.architecture()
    run.train()  # the same trainer, with its optimizer
    assert starts(run)[-1][0] == "retraining" and model.base_model.architecture().counts == kept.counts
    model.base_model.restart_phases()
    run.train()
    assert [phase for phase, _ in starts(run)][-2:] == ["search", "retraining"]
    tight = TightTrainer(
        nas(**config),
        arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, num_train_epochs=2),
        train_dataset=Rows(24),
        callbacks=[PhaseCallback()],
    )
    tight.train()
    assert [phase for phase, _ in starts(tight)][-2:] == ["search", "retraining"]
    trained = {p for p in tight.model.parameters() if p.requires_grad}
    assert set(raw(tight).state) == trained
    assert sum(p.numel() for p in trained) - (16 * 16 + 16 + 16 * 2 + 2) == tight.model.base_model.architecture().kept


def raw(run: Trainer) -> torch.optim.Optimizer:
    return getattr(run.optimizer, "optimizer", run.optimizer)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_optimizers(tmp_path: Path, optim):
    """Optimizers begin afresh, and hold state for what is kept."""
    run = trainer(nas(parameter_budget=0.2), arguments(tmp_path, optim=optim))
    run.train()
    trained = {p for p in run.model.parameters() if p.requires_grad}
    assert set(raw(run).state) <= trained
    steps = {float(state["step"]) for state in raw(run).state.values() if "step" in state}
    assert steps <= {3.0}


@pytest.fixture(scope="module", params=["structured", "unstructured"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained")
    model = nas("bert", granularity=request.param, parameter_budget=0.1)
    trainer(model, arguments(out)).train()
    model.save_pretrained(out / "adapter")
    inputs = zoo.inputs_of("bert", model)
    return model, out / "adapter", inputs, logits_of(model, inputs)


def test_small_file(trained):
    """A small budget makes a small file."""
    model, path, _, _ = trained
    values = load_file(path / FILE)
    architecture = model.base_model.architecture()
    assert math.isclose(architecture.budget, 0.1 * architecture.space, abs_tol=1)
    assert sum(v.numel() for v in values.values() if v.is_floating_point()) == architecture.kept + 16 * 2 + 2
    assert {v.dtype for v in values.values()} == {torch.float32, torch.int32}
    config = json.loads((path / "adapter_config.json").read_text())
    assert sum(kept for parts in config["architecture"].values() for kept, _ in parts.values()) == architecture.kept


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_shapes_from_config(trained, low_cpu_mem_usage, tmp_path: Path):
    """The config alone builds the right shapes."""
    model, path, inputs, logits = trained
    again = PeftModel.from_pretrained(zoo.build("bert"), path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits_of(again, inputs), logits)
    assert again.base_model.architecture().counts == model.base_model.architecture().counts
    base = zoo.build("bert")
    base.save_pretrained(tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    again_by_class = AutoPeftModelForSequenceClassification
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    assert torch.equal(logits_of(again_by_class.from_pretrained(path), inputs), logits)
    (path / "adapter_config.json").write_text(json.dumps(config))


def test_transformers_verbs(trained):
    """transformers' own verbs work."""
    _, path, inputs, logits = trained
    base = zoo.build("bert")
    plain = logits_of(base, inputs)
    base.load_adapter(str(path), "nas")
    assert torch.equal(logits_of(base, inputs), logits)
    base.disable_adapters()
    assert torch.equal(logits_of(base, inputs), plain)
    base.enable_adapters()
    base.delete_adapter("nas")


def test_save_dtype(trained, tmp_path: Path):
    """The adapter is saved in half precision on request."""
    model, _, inputs, logits = trained
    config = model.peft_config["default"]
    config.save_dtype = "bfloat16"
    model.save_pretrained(tmp_path)
    config.save_dtype = None
    own = {k: v.dtype for k, v in load_file(tmp_path / FILE).items() if ".nas_lora_" in k}
    assert set(own.values()) == {torch.bfloat16, torch.int32}
    again = PeftModel.from_pretrained(zoo.build("bert"), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits, rtol=0, atol=0.02)
