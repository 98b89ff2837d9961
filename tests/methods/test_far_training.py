"""FAR in real Trainer runs, in files, and under PEFT's verbs that the contract does not reach."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from training import KEEP_BEST, Rows, TightTrainer, adapter_values, arguments, far, sgd, trainer
from transformers import Trainer
from zoo import logits_of

from peft_learners import FARConfig, PhaseCallback, ScheduleError

FILE = "adapter_model.safetensors"
#: DistilBERT of the zoo: 32 hidden units 16 wide in each of 2 layers, 8 of them kept.
FROZEN = 2 * 24 * (16 + 16 + 1)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"retention_ratio": 1.5}, "`retention_ratio` must be a number from 0 to 1, got 1.5.*retention_ratio=0.1"),
        ({"retention_ratio": "10%"}, "`retention_ratio` must be .* got '10%'"),
        ({"priming_ratio": -0.1}, "`priming_ratio` must be a number from 0 to 1"),
        ({"priming_steps": 2.5}, "`priming_steps` must be None or a whole number"),
        ({"priming_epochs": -1}, "`priming_epochs` must be None or a number of at least 0"),
        ({"priming_steps": 1, "priming_epochs": 1}, "give priming in one unit, got priming_steps=1 and"),
        ({"priming_ratio": 0}, "`priming_ratio` must be above 0 with selection='l1'.*selection='random'"),
        ({"priming_steps": 0}, "`priming_steps` must be above 0"),
        ({"granularity": "row"}, r"`granularity` must be one of \('hidden_unit', 'output_node'\), got 'row'"),
        ({"selection": "l3"}, "`selection` must be one of"),
        ({"seed": 0.5}, "`seed` must be a whole number from 0"),
        ({"discard_unkept": 1}, "`discard_unkept` must be True or False"),
        ({"train_norms": None}, "`train_norms` must be True or False"),
        ({"ffn_modules": ["lin1", "lin2"]}, r"`ffn_modules` must be None or a list of lists.*\[\['fc_in'"),
        ({"ffn_modules": []}, "`ffn_modules` must be"),
    ],
)  # fmt: skip
def test_bad_values(settings, words):
    """Bad values are named."""
    with pytest.raises(ValueError, match=f"FARConfig: .*{words}"):
        FARConfig(**settings)
    with pytest.raises(TypeError, match="'retention'.*Did you mean 'retention_ratio'"):
        FARConfig(retention=0.1)


def test_config_round_trip(tmp_path: Path):
    config = FARConfig(
        retention_ratio=0.3, granularity="output_node", selection="random", seed=4, ffn_modules=[["a", "b"]],
        train_embeddings=False, reconfigured=True, completed_phases=["priming"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


def starts(run: Trainer) -> list[tuple[str, int, int]]:
    logs = [log for log in run.state.log_history if "phase_first_step" in log]
    return [(log["phase"], log["step"], log["trained_parameters"]) for log in logs]


def test_trainer(tmp_path: Path):
    """Trainer crosses the boundary, and counts fall."""
    model = far()
    total = sum(p.numel() for p in zoo.build("distilbert").parameters())
    run = trainer(model, arguments(tmp_path))
    run.train()
    assert starts(run) == [("priming", 0, total), ("reconfigured", 2, total - FROZEN)]
    losses = [log["trained_parameters"] for log in run.state.log_history if "loss" in log]
    assert losses == [total] * 2 + [total - FROZEN] * 4


@pytest.mark.parametrize(
    "settings,boundary",
    [
        ({"priming_ratio": 0.01}, 1),  # 1 % of 6 steps is less than one: at least one; no warm-up then
        ({"priming_ratio": 0.5}, 3),
        ({"priming_steps": 4}, 4),
        ({"priming_epochs": 1.5}, 3),  # 2 steps per epoch
    ],
)
def test_priming_length(tmp_path: Path, settings, boundary):
    """Priming is given as a share, in steps or in epochs."""
    args = arguments(tmp_path, warmup_steps=0)
    run = trainer(far(**{"priming_epochs": None, **settings}), args)
    run.train()
    assert [step for _, step, _ in starts(run)] == [0, boundary]


def test_zero_learning_rate(tmp_path: Path):
    """One step of priming that a warm-up would swallow is refused before it; two steps are not."""
    run = trainer(far(priming_ratio=0.01, priming_epochs=None), arguments(tmp_path, warmup_steps=1))
    with pytest.raises(ScheduleError, match=r"the warm-up makes the learning rate of that step 0.*priming_steps=10"):
        run.train()
    assert run.state.global_step == 0
    for settings in ({"priming_steps": 2}, {"priming_steps": 1, "selection": "random"}):
        trainer(far(priming_epochs=None, **settings), arguments(tmp_path, warmup_steps=1)).train()


@pytest.mark.parametrize("known", [True, False], ids=["schedule-first", "schedule-later"])
def test_zero_learning_rate_in_a_loop(known):
    """A loop is told before the first step; where its schedule was made after `set_schedule`, at the boundary."""
    model = far(priming_epochs=None, priming_steps=1)
    optimizer, inputs = sgd(model), zoo.inputs_of("distilbert", model)
    if known:
        LambdaLR(optimizer, lambda step: step / 4)
        with pytest.raises(ScheduleError, match="the warm-up makes the learning rate of that step 0"):
            model.base_model.set_schedule(6, optimizer=optimizer)
        return
    model.base_model.set_schedule(6, optimizer=optimizer)
    LambdaLR(optimizer, lambda step: step / 4)
    model(**inputs).logits.sum().backward()
    optimizer.step()
    with pytest.raises(ScheduleError, match="moved no FFN weight"):
        model.base_model.update_and_allocate(1)


@pytest.mark.parametrize("settings", [{"priming_steps": 6}, {"priming_ratio": 1.0}], ids=["steps", "ratio"])
def test_priming_whole_training(tmp_path: Path, settings):
    """Priming as long as the training is refused."""
    with pytest.raises(ScheduleError, match="priming needs 6 of the training's 6 optimizer steps"):
        trainer(far(priming_epochs=None, **settings), arguments(tmp_path)).train()


def test_priming_too_long(tmp_path: Path):
    """Priming longer than the training is refused."""
    with pytest.raises(ScheduleError, match="priming needs 7 optimizer steps, but training has only 6"):
        trainer(far(priming_steps=7, priming_epochs=None), arguments(tmp_path)).train()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_optimizers(tmp_path: Path, optim):
    """Optimizers go on over the boundary."""
    model = far()
    run = trainer(model, arguments(tmp_path, optim=optim))
    run.train()
    assert model.peft_config["default"].reconfigured
    trained = {p for p in model.parameters() if p.requires_grad}
    assert set(run.optimizer.state) <= trained or optim == "adafactor"


def test_best_from_priming(tmp_path: Path):
    """Loading the best model from priming undoes the selection."""
    scores = iter(range(10))
    model = far(priming_epochs=2)
    run = trainer(
        model,
        arguments(
            tmp_path, **KEEP_BEST, metric_for_best_model="worse", greater_is_better=False,
        ),
        compute_metrics=lambda prediction: {"worse": next(scores)},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="still in its phase 'priming'"):
        run.train()
    config = model.peft_config["default"]
    assert config.completed_phases == [] and not config.reconfigured
    theirs = load_file(tmp_path / "checkpoint-1" / FILE)
    ours = {n.replace(".default", "").replace(".modules_to_save", ""): v for n, v in adapter_values(model).items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[n]) for n, v in ours.items())
    again = trainer(model, arguments(tmp_path / "again"))
    again.train()  # a new training primes again
    assert [phase for phase, _, _ in starts(again)] == ["priming", "reconfigured"]


def test_auto_find_batch_size(tmp_path: Path):
    """`auto_find_batch_size` begins the phases again."""
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 16}
    run = TightTrainer(far(), arguments(tmp_path, **settings), train_dataset=Rows(24), callbacks=[PhaseCallback()])
    run.train()
    assert [phase for phase, _, _ in starts(run)] == ["priming", "reconfigured"]
    assert run.state.global_step == 3 * -(-24 // run._train_batch_size)


def test_second_training(tmp_path: Path):
    """A second training goes on, and a restarted one begins again."""
    model = far()
    run = trainer(model, arguments(tmp_path))
    run.train()
    run.train()  # the same trainer, with its optimizer
    assert starts(run)[-1][0] == "reconfigured"
    model.base_model.restart_phases()
    run.train()
    assert [phase for phase, _, _ in starts(run)][-2:] == ["priming", "reconfigured"]
    other = trainer(model, arguments(tmp_path))
    other.train()
    assert [phase for phase, _, _ in starts(other)] == ["reconfigured"]


def test_weight_decay(tmp_path: Path):
    """Small deltas are exempt from weight decay, and cut ones aren't."""
    run = trainer(far(), arguments(tmp_path))
    run.create_optimizer()
    names = {p: n for n, p in run.model.named_parameters()}
    decayed = {names[p] for group in run.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    exempt = {names[p] for group in run.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all("far_delta" in n or n.endswith("weight") for n in decayed)
    assert {n.split(".far_")[1] for n in exempt if ".far_" in n} == {
        "bias_delta.default.bias",
        "layernorm_delta.default.weight",
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained")
    model = far()
    trainer(model, arguments(out)).train()
    model.save_pretrained(out / "adapter")
    inputs = zoo.inputs_of("distilbert", model)
    return model, out / "adapter", inputs, logits_of(model, inputs)


def test_cut_file(trained, tmp_path: Path):
    """Cut weights are saved as values and indices. Float values of an adapter: as many as the model's own (each node
    once); without the unkept, FROZEN fewer."""
    _, path, _, _ = trained
    total = sum(p.numel() for p in zoo.build("distilbert").parameters())
    small = far(discard_unkept=True)
    trainer(small, arguments(tmp_path)).train()
    small.save_pretrained(tmp_path / "small")
    for folder, expected in ((path, total), (tmp_path / "small", total - FROZEN)):
        values = load_file(folder / FILE)
        assert sum(v.numel() for v in values.values() if v.is_floating_point()) == expected
        indices = {n: v for n, v in values.items() if n.endswith("far_kept")}
        assert len(indices) == 4 and all(v.shape == (8,) and v.dtype == torch.int64 for v in indices.values())
    in_priming = far()
    in_priming.save_pretrained(tmp_path / "priming")
    assert not [n for n in load_file(tmp_path / "priming" / FILE) if "kept" in n or "rest" in n]


@pytest.mark.parametrize("how", ["in-place", "second"])
@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "half cut"])
def test_damaged_file(trained, tmp_path: Path, damage, how):
    """A damaged file is refused, and leaves the model as it was."""
    _, path, inputs, _ = trained
    values = load_file(path / FILE)
    name = next(n for n in values if n.endswith("lin2.far_delta.weight"))
    (tmp_path / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    if damage == "missing":
        del values[name]
    elif damage == "unknown":
        values[name.replace("lin2", "lin3")] = values[name].clone()
    elif damage == "shape":
        values[name] = values[name][:, :1].contiguous()
    else:
        del values[next(n for n in values if n.endswith("far_kept"))]
    save_file(values, tmp_path / FILE)
    model = far(init_weights=False)
    logits = logits_of(model, inputs)
    with pytest.raises(ValueError, match="does not fit the adapter.*Nothing was loaded"):
        model.load_adapter(tmp_path, "default" if how == "in-place" else "second")
    torch.testing.assert_close(logits_of(model, inputs), logits, rtol=1e-6, atol=1e-6)


def test_transformers_verbs(trained):
    """transformers' own verbs work."""
    _, path, inputs, logits = trained
    model = zoo.build("distilbert")
    model.load_adapter(str(path), adapter_name="mine")
    assert torch.equal(logits_of(model, inputs), logits)


def test_mixed_batch(trained):
    """Mixed batches work on a transformers model."""
    _, path, inputs, logits = trained
    model = PeftModel.from_pretrained(zoo.build("distilbert"), path)
    torch.manual_seed(3)
    model.add_adapter("other", FARConfig(init_weights=False, task_type="SEQ_CLS"))
    model.set_adapter("other")
    other = logits_of(model, inputs)
    with model.disable_adapter():
        base = logits_of(model, inputs)
    model.set_adapter("default")
    mixed = logits_of(model, {**inputs, "adapter_names": ["default", "__base__", "other"]})
    for row, expected in enumerate((logits, base, other)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-5)


@pytest.mark.verb(
    "adapter_names=",
    tuners=["FAR"],
    limit="not where the model computes trained relative positions once for the batch (T5)",
)
def test_relative_positions():
    """Relative positions can't differ within a batch."""
    model = far("t5", init_weights=False).eval()
    inputs = {**zoo.inputs_of("t5", model), "adapter_names": ["default", "__base__", "default"]}
    with pytest.raises(ValueError, match=r"exclude_modules=\['relative_attention_bias'\]"):
        model(**inputs)
    model = far("t5", init_weights=False, exclude_modules=["relative_attention_bias"]).eval()
    model(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(trained, dtype):
    """A base in half precision gets an adapter in float32."""
    _, path, inputs, logits = trained
    model = PeftModel.from_pretrained(zoo.build("distilbert").to(dtype), path)
    assert {p.dtype for n, p in model.named_parameters() if ".far_" in n} == {torch.float32}
    assert logits_of(model, inputs).dtype == dtype
    torch.testing.assert_close(logits_of(model, inputs).float(), logits, rtol=0, atol=0.05)
    many = {k: torch.cat([v] * 9) for k, v in inputs.items()}  # the path that forms W + D
    torch.testing.assert_close(logits_of(model, many)[:3].float(), logits, rtol=0, atol=0.05)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits_of(merged, inputs).float(), logits, rtol=0, atol=0.05)


@pytest.mark.parametrize("settings", [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
], ids=["reentrant", "non-reentrant"])  # fmt: skip
def test_trainer_options(tmp_path: Path, settings):
    """Trainer's options change no more than rounding."""
    models = {}
    for name, options in {"with": settings, "without": {}}.items():
        models[name] = far()
        trainer(models[name], arguments(tmp_path, **options)).train()
    theirs = adapter_values(models["without"])
    for name, value in adapter_values(models["with"]).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def test_silent_save_and_merge(tmp_path: Path, trained):
    """A fresh or a driven adapter is saved and merged in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        far().save_pretrained(tmp_path / "fresh")
        model = copy.deepcopy(trained[0])
        model.save_pretrained(tmp_path / "driven")
        model.merge_and_unload()
    saved = json.loads((tmp_path / "driven" / "adapter_config.json").read_text())
    assert saved["reconfigured"] and saved["ffn_modules"] == [["lin1", "lin2"]]


def test_missing_callback_told(tmp_path: Path):
    """Training without the callback is told."""
    model = far()
    trainer(model, arguments(tmp_path), callbacks=[]).train()
    with pytest.warns(UserWarning, match="its phases were never driven"):
        model.save_pretrained(tmp_path)
