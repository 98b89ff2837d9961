"""Folding: at the boundary a primed layer's whole update becomes the nearest product of a rank."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import nn
from training import Rows, learner

from peft_learners import LearnerConfig, ScheduleError
from peft_learners.export import save_as_lora

FILE = "adapter_model.safetensors"
#: A program without this package.
ELSEWHERE = """
import sys
sys.modules["peft_learners"] = None  # an import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

folder = sys.argv[1]
rows, wanted = torch.load(f"{folder}/wanted.pt")
base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base")
with torch.no_grad():
    found = PeftModel.from_pretrained(base, f"{folder}/lora").eval()(**rows).logits
torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
"""


def folded(steps: int = 6, at: int = 3, lr: float = 1e-2, **config: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A Learner after some steps of a loop, with the boundary at `at` (two steps to an epoch)."""
    settings = {"priming_epochs": at / 2, "priming_lr_scale": 0.5, "scaling": 2.0, "after_priming": "fold"}
    model = learner(**{**settings, **config})
    return model, go_on(model, range(steps), lr=lr)


def go_on(
    model: nn.Module, steps: range, optimizer: torch.optim.Optimizer | None = None, lr: float = 1e-2
) -> torch.optim.Optimizer:
    rows = torch.utils.data.default_collate([Rows()[i] for i in range(12)])
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        model.base_model.set_schedule(8, 2, optimizer=optimizer)
    model.train()
    for step in steps:
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step + 1)
    return optimizer


def linears(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "learner_P1")}


def primed(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in linears(model).items() if m.learner_primed["default"]}


def logits(model: nn.Module) -> torch.Tensor:
    rows = torch.utils.data.default_collate([Rows()[i] for i in range(4)])
    with torch.no_grad():
        return model.eval()(**rows).logits


def update_by_hand(layer: Any) -> np.ndarray:
    """`2 P2 P1 + 0.5 theta` in float64 (scaling and priming_lr_scale of `folded`)."""
    p1, p2, theta = (
        getattr(layer, f"learner_{part}")["default"].weight.detach().double().numpy()
        for part in ("P1", "P2", "dense_delta")
    )
    return 2 * p2 @ p1 + 0.5 * theta


@pytest.mark.parametrize("rank", [None, 2, 6])
def test_nearest_product(rank):
    """The factors of each primed layer become the nearest product of the rank, balanced; their energy is recorded."""
    model, _ = folded(steps=2, fold_rank=rank)
    before = {name: update_by_hand(layer) for name, layer in primed(model).items()}
    others = {n: m.learner_P1["default"].weight.clone() for n, m in linears(model).items() if n not in before}
    assert len(before) == 8
    # The boundary alone, without a step: what forward computes is compared with the SVD in float64.
    model.base_model.update_and_allocate(3)
    r = rank or 4
    for name, layer in primed(model).items():
        u, s, vt = np.linalg.svd(before[name])
        best = (u[:, :r] * s[:r]) @ vt[:r]
        np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), best, atol=2e-6)
        a, b = (getattr(layer, f"learner_{part}")["default"].weight.detach() for part in ("P1", "P2"))
        assert a.shape == (r, layer.in_features) and b.shape == (layer.out_features, r)
        np.testing.assert_allclose(a.norm(dim=1).numpy(), np.sqrt(s[:r] / 2), rtol=1e-4)  # |2 b_i| |a_i| = s_i
        np.testing.assert_allclose(b.norm(dim=0).numpy(), np.sqrt(s[:r] / 2), rtol=1e-4)
        share = model.peft_config["default"].kept_energy[name.removeprefix("base_model.model.")]
        assert share == pytest.approx((s[:r] ** 2).sum() / (s**2).sum(), abs=1e-5)
    assert all(torch.equal(linears(model)[n].learner_P1["default"].weight, value) for n, value in others.items())


def test_dense_goes():
    """theta is gone from parameters, state dict, optimizer state and file; the factors' state begins anew."""
    model, optimizer = folded(steps=3)
    assert not [n for n in model.state_dict() if "dense_delta" in n]
    layers = primed(model)
    for name, layer in linears(model).items():
        for part in (layer.learner_P1, layer.learner_P2):
            assert (part["default"].weight in optimizer.state) == (name not in layers)
    go_on(model, range(3, 5), optimizer)
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    assert all(optimizer.state[layer.learner_P1["default"].weight]["step"] == 2 for layer in layers.values())


def test_same_as_unprimed(tmp_path: Path):
    """After the boundary an adapter has an unprimed Learner's parameters and its file, to the config."""
    model, _ = folded()
    plain = learner(priming_epochs=0)
    shapes = [{n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (model, plain)]
    assert shapes[0] == shapes[1]
    model.save_pretrained(tmp_path / "folded")
    plain.save_pretrained(tmp_path / "plain")
    sizes = [(tmp_path / name / FILE).stat().st_size for name in ("folded", "plain")]
    assert sizes[0] == sizes[1]


def test_energy_within_bound():
    """A share of the energy asks for the least ranks that keep it, within the parameters of rank r."""
    model, _ = folded(steps=2, r=4, fold_rank=0.5)
    before = {name: update_by_hand(layer) for name, layer in primed(model).items()}
    model.base_model.update_and_allocate(3)
    ranks = {name: layer.learner_r["default"] for name, layer in primed(model).items()}
    for name, update in before.items():
        energy = np.linalg.svd(update, compute_uv=False) ** 2
        assert ranks[name] == 1 + int((energy.cumsum() / energy.sum() < 0.5).sum())
    assert len(set(ranks.values())) > 1 or max(ranks.values()) <= 4

    model, _ = folded(steps=2, r=4, fold_rank=0.999999)
    model.base_model.update_and_allocate(3)
    ranks = {name: layer.learner_r["default"] for name, layer in primed(model).items()}
    # All primed layers are 16 x 16 in this model: rank 4 allows 8 * 4 ranks in all.
    assert 8 * 4 - 8 < sum(ranks.values()) <= 8 * 4 and max(ranks.values()) > min(ranks.values())
    shares = model.peft_config["default"].kept_energy.values()
    assert max(shares) - min(shares) < 0.2 and 0.3 < min(shares) < 0.999999


def test_reload(tmp_path: Path):
    """A folded adapter of other ranks reloads to the same bits, and trains on as it did."""
    model, _ = folded(fold_rank=0.7)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["completed_phases"] == ["priming"] and len(saved["kept_energy"]) == 8 and saved["rank_pattern"]
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
    assert torch.equal(logits(model), logits(again))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("state", ["primed", "folded"])
def test_load_in_place(tmp_path: Path, state):
    """A file of either form loads into an adapter of either form."""
    source, _ = folded(steps=2 if state == "primed" else 5, fold_rank=2)
    source.save_pretrained(tmp_path)
    for steps in (0, 2, 5):
        model, _ = folded(steps=steps, fold_rank=2)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(logits(model), logits(source))
        assert not [n for n, v in model.state_dict().items() if not v.numel()]
        assert model.peft_config["default"].completed_phases == source.peft_config["default"].completed_phases


@pytest.mark.parametrize("scaling", [1.0, 3.0, 0.3])
def test_export_exact(tmp_path: Path, scaling):
    """The export of a folded adapter has its factors bit for bit, and loads in a process without this package."""
    model, _ = folded(scaling=scaling, train_biases=scaling == 1)
    model.save_pretrained(tmp_path / "own")
    save_as_lora(tmp_path / "lora", model)
    own, lora = load_file(tmp_path / "own" / FILE), load_file(tmp_path / "lora" / FILE)
    names = [n.removesuffix(".learner_P1.weight") for n in own if n.endswith(".learner_P1.weight")]
    assert len(names) == 12
    for name in names:
        assert torch.equal(lora[f"{name}.lora_A.weight"], own[f"{name}.learner_P1.weight"])
        assert torch.equal(lora[f"{name}.lora_B.weight"], own[f"{name}.learner_P2.weight"])
    base = zoo.build("distilbert")
    base.save_pretrained(tmp_path / "base")
    rows = torch.utils.data.default_collate([Rows()[i] for i in range(4)])
    torch.save((rows, logits(model)), tmp_path / "wanted.pt")
    if scaling == 3.0:
        subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], check=True, timeout=300)
    stock = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert stock.peft_config["default"].peft_type.value == "LORA"
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)


def test_converts_to_lora():
    """PEFT's own conversion keeps all of a folded adapter that has no biases and norms."""
    model, _ = folded(train_biases=False, train_norms=False)
    config, state = convert_to_lora(model, rank=4)
    update = {n: m.get_delta_weight("default").detach() for n, m in linears(model).items()}
    for name, value in update.items():
        a, b = (
            next(
                v
                for k, v in state.items()
                if f"{name}.lora_{part}." in f"base_model.model.{k}" or f"{name}.lora_{part}." in k
            )
            for part in "AB"
        )
        torch.testing.assert_close(b @ a * config.lora_alpha / config.r, value, rtol=0, atol=1e-5)


def test_merged():
    """Merged, a folded adapter computes what it computed."""
    model, _ = folded(fold_rank=2)
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=0, atol=1e-5)


def test_log_and_warning(caplog: pytest.LogCaptureFixture):
    """The log has the least and the median share; a warning names the layers under nine tenths."""
    model, _ = folded(steps=2, fold_rank=1)
    with caplog.at_level(logging.INFO, "peft_learners"), pytest.warns(UserWarning, match="less than 90%.*fold_rank=2"):
        model.base_model.update_and_allocate(3)
    shares = sorted(model.peft_config["default"].kept_energy.values())
    assert f"least {shares[0]:.4f}" in caplog.text
    assert f"median {(shares[3] + shares[4]) / 2:.4f}" in caplog.text


def test_restart():
    """Phases that are restarted prime again, from what was folded."""
    model, _ = folded()
    before = logits(model)
    model.base_model.restart_phases()
    assert torch.equal(logits(model), before)
    assert sum(p.requires_grad for n, p in model.named_parameters() if "dense_delta" in n) == 8
    assert model.peft_config["default"].kept_energy is None
    go_on(model, range(4))
    assert model.peft_config["default"].completed_phases == ["priming"]
    assert len(model.peft_config["default"].kept_energy) == 8


def test_resumed_unfolded(tmp_path: Path):
    """A loop that is resumed after the boundary with an adapter from before it is told so."""
    model, _ = folded(steps=2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
    with pytest.raises(Exception, match="is not folded yet"):
        again.base_model.set_schedule(8, 2, global_step=5)


@pytest.mark.parametrize("value", ["yes", None, True])
def test_bad_after_priming(value):
    """Other words are refused with those that are known."""
    with pytest.raises(ValueError, match=r"`after_priming` must be one of \('keep', 'fold'\)"):
        LearnerConfig(after_priming=value)


@pytest.mark.parametrize("value", [0, 1.0, 0.0, 1.5, "8", True])
def test_bad_fold_rank(value):
    """A rank or a share, and nothing else."""
    with pytest.raises(ValueError, match="`fold_rank` must be None, a rank of at least 1 or a share"):
        LearnerConfig(after_priming="fold", fold_rank=value)


def test_unused_layer():
    """A primed layer that nothing moved keeps its factors, and all of its energy of nothing."""
    model, _ = folded(steps=0)
    first = {n: m.learner_P1["default"].weight.clone() for n, m in primed(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.base_model.set_schedule(8, 2, optimizer=optimizer)
    model.base_model.update_and_allocate(3)
    assert set(model.peft_config["default"].kept_energy.values()) == {1.0}
    assert all(torch.equal(m.learner_P1["default"].weight, first[n]) for n, m in primed(model).items())


def test_half_precision():
    """Factors of a base in half precision are found in float32 (PEFT keeps adapters so)."""
    base = zoo.build("distilbert").to(torch.bfloat16)
    config = LearnerConfig(r=4, priming_steps=2, after_priming="fold", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    go_on(model, range(2))
    values = [m.learner_P1["default"].weight for m in primed(model).values()]
    assert {v.dtype for v in values} == {torch.float32} and len(config.kept_energy) == 8


def test_rank_is_kept():
    """An update of a lower rank is filled up with rows that train on, so that the rank is the one asked for."""
    model = learner(priming_steps=3, r=6, priming_lr_scale=1.0, after_priming="fold")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = torch.utils.data.default_collate([Rows()[0]])
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    model(**rows).loss.backward()
    optimizer.step()  # one row of six tokens: D has a rank of at most 6, P2 P1 adds what it has
    for layer in primed(model).values():
        with torch.no_grad():
            layer.learner_P2["default"].weight.zero_()
            layer.learner_dense_delta["default"].weight[:, 1:] = 0  # rank 1
    before = logits(model)
    model.base_model.update_and_allocate(3)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for layer in primed(model).values():
        a, b = layer.learner_P1["default"].weight, layer.learner_P2["default"].weight
        assert len(a) == 6 and bool(a.any(dim=1).all()) and not b[:, 1:].any()


def test_not_finite():
    """Diverged updates are named before any layer is folded."""
    model, _ = folded(steps=2)
    name, layer = list(primed(model).items())[5]
    with torch.no_grad():
        layer.learner_dense_delta["default"].weight[0, 0] = float("nan")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = name.removeprefix("base_model.model.")
    with pytest.raises(ScheduleError, match=rf"1 of its updates .first: {first}\).*priming_lr_scale=0\.05\)"):
        model.base_model.update_and_allocate(3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(), value.nan_to_num()) for key, value in before.items())


def test_needs_optimizer():
    """Folding drops optimizer state, so it asks for the optimizer; one that flattens parameters is refused."""
    model = learner(priming_steps=3, after_priming="fold")
    with pytest.raises(ScheduleError, match="folds its dense deltas at its boundary.*optimizer=optimizer"):
        model.base_model.set_schedule(6, 2)
    flat = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ScheduleError, match=r"which LBFGS can't follow.*stop_at_boundary=True"):
        model.base_model.set_schedule(6, 2, optimizer=flat)


def test_merged_at_boundary():
    """A boundary in merged weights is refused: what is merged could not be taken out again."""
    model, _ = folded(steps=2)
    model.merge_adapter()
    with pytest.raises(ScheduleError, match="is merged and can't train"):
        model.base_model.update_and_allocate(3)
    model.unmerge_adapter()
    assert model.base_model.update_and_allocate(3)


def test_primed_file_trains(tmp_path: Path):
    """A primed file that is loaded over a folded adapter is primed on: theta is a parameter before any optimizer."""
    source, _ = folded(steps=2)
    model, _ = folded(steps=5)
    source.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    dense = [layer.learner_dense_delta["default"].weight for layer in primed(model).values()]
    assert len(dense) == 8 and all(isinstance(p, nn.Parameter) and p.requires_grad for p in dense)
    assert model.peft_config["default"].kept_energy is None
    first = [p.detach().clone() for p in dense]
    go_on(model, range(1))
    assert not any(torch.equal(p, value) for p, value in zip(dense, first, strict=True))


@pytest.mark.parametrize("verb", ["restart", "prepare", "load"])
def test_copy_goes_on(verb, tmp_path: Path):
    """A copy of a folded model can do what the model can."""
    source, _ = folded(steps=2)
    source.save_pretrained(tmp_path)
    model = copy.deepcopy(folded()[0])
    if verb == "restart":
        model.base_model.restart_phases()
    elif verb == "prepare":
        model.base_model.prepare_optimizer()
    else:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    go_on(model, range(4))
    assert model.peft_config["default"].completed_phases == ["priming"]


def test_low_cpu_mem_usage(tmp_path: Path):
    """A primed adapter that was loaded late trains on, and can be primed again."""
    model, _ = folded(after_priming="keep")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))
    again.base_model.restart_phases()
    go_on(again, range(4))
    assert again.peft_config["default"].completed_phases == ["priming"]


def test_fold_rank_alone():
    """A rank to fold into without folding is a mistake."""
    with pytest.raises(ValueError, match="`fold_rank` must be None unless primed layers are folded, got 8"):
        LearnerConfig(fold_rank=8)
