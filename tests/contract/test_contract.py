"""One contract for all tuners, over all architectures: train through the boundaries, save, reload, merge, go back.

The promises are those of docs/design.md, "Contract".
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trained import Trained, trained, trained_once
from training import sgd
from tuners import TUNERS, refuses_to_merge
from zoo import logits_of

from peft_learners.structure.attention import attention_names
from peft_learners.structure.modules import linear_names, new_head, norm_names

CASES = [(tuner, arch) for tuner in TUNERS for arch in zoo.ZOO]


cases = {"params": CASES, "ids": "-".join}


@pytest.fixture(**cases)
def run(request: pytest.FixtureRequest) -> Trained:
    """A trained model of its own for each test (training is done once per case)."""
    return trained(*request.param)


@pytest.fixture(**cases)
def shared_run(request: pytest.FixtureRequest) -> Trained:
    """A trained model that the test only looks at."""
    return trained_once(*request.param)


def test_structure(shared_run):
    """The model's attention, linear layers, norms and head are found."""
    entry = zoo.ZOO[shared_run.arch]
    linears = linear_names(shared_run.base)
    assert len(linears) == entry.linears
    assert len(attention_names(shared_run.base, linears)) == entry.attention
    assert len(norm_names(shared_run.base)) == entry.norms
    assert tuple(new_head(shared_run.base)) == entry.head


@pytest.mark.verb("get_peft_model", limit={"NAS-LoRA": "a fresh adapter changes the function, unless init='lora'"})
def test_fresh_adapter(shared_run):
    """A fresh adapter leaves the function as it is, unless its tuner says otherwise."""
    assert torch.equal(shared_run.fresh_logits, shared_run.base_logits) == TUNERS[shared_run.tuner].fresh_is_identity


@pytest.mark.verb("get_peft_model")
def test_phases(shared_run):
    """Training goes through all phases and changes the function."""
    assert tuple(shared_run.phases) == TUNERS[shared_run.tuner].phases
    assert shared_run.model.peft_config["default"].completed_phases == list(TUNERS[shared_run.tuner].phases[:-1])
    assert not torch.allclose(shared_run.logits, shared_run.base_logits, atol=1e-2)


def test_gradients(shared_run):
    """All that trains gets a gradient, and nothing else moves."""
    assert shared_run.without_gradient == []
    assert shared_run.frozen_moved == []


def test_optimizer_state(shared_run):
    """The optimizer holds state for exactly what trains."""
    assert shared_run.state_matches
    assert all(p.grad is None for p in shared_run.model.parameters() if not p.requires_grad)


def test_base_untouched(shared_run):
    """The base's weights are never written to."""
    original = dict(shared_run.base.named_parameters())
    inside = {
        name.replace(".base_layer.", "."): p
        for name, p in shared_run.model.base_model.model.named_parameters(remove_duplicate=False)
    }
    for name, value in original.items():
        heads = zoo.ZOO[shared_run.arch].head
        places = (name, *(name.replace(f"{head}.", f"{head}.original_module.", 1) for head in heads))
        (place,) = {p for p in places if p in inside}
        assert torch.equal(inside[place], value), name


@pytest.mark.verb("disable_adapter")
def test_disable_adapter(run):
    """A disabled adapter gives the base back, bit for bit."""
    with run.model.disable_adapter():
        assert torch.equal(logits_of(run.model, run.inputs), run.base_logits)
    assert torch.equal(logits_of(run.model, run.inputs), run.logits)


@pytest.mark.verb("add_adapter")
@pytest.mark.verb("delete_adapter")
@pytest.mark.verb("set_requires_grad")
def test_stays_frozen(run):
    """What a boundary froze stays frozen, whatever verb is called."""
    model = run.model
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        pass
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    model.add_adapter("other", TUNERS[run.tuner].config(task_type=zoo.ZOO[run.arch].task_type))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    model.set_adapter("other")
    model.set_adapter("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    model.set_requires_grad("default", True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    model.delete_adapter("other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert torch.equal(logits_of(model, run.inputs), run.logits)


@pytest.mark.verb("PeftModel.from_pretrained")
@pytest.mark.verb("low_cpu_mem_usage=True")
def test_reload(run, tmp_path: Path):
    """A reloaded adapter gives the same logits, bit for bit."""
    run.model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits_of(again, run.inputs), run.logits)
        assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.verb("save_pretrained")
def test_saved_tensors(shared_run, tmp_path: Path):
    """Everything that contributes is saved, and nothing else."""
    shared_run.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    added = {
        name.replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in shared_run.model.state_dict().items()
        if (f".{TUNERS[shared_run.tuner].prefix}" in name or ".modules_to_save." in name) and p.numel()
    }
    assert saved.keys() == added.keys()
    assert all(torch.equal(saved[name], added[name]) for name in saved)
    assert all(value.any() for value in saved.values() if value.is_floating_point())


@pytest.mark.verb("PeftModel.from_pretrained(is_trainable=True)")
def test_reload_trainable(run, tmp_path: Path):
    """An adapter loaded for training goes on in its last phase."""
    run.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path, is_trainable=True)
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    starts = again.base_model.set_schedule(total_steps=1, steps_per_epoch=1)
    assert [s.phase for s in starts] == [TUNERS[run.tuner].phases[-1]]
    again.base_model.restart_phases()
    starts = again.base_model.set_schedule(total_steps=4, steps_per_epoch=2, optimizer=sgd(again))
    assert [s.phase for s in starts] == [TUNERS[run.tuner].phases[0]]


@pytest.mark.verb("merge_and_unload", no={"bottleneck": "refused, since no weight can hold what is not linear"})
def test_merge_and_unload(run):
    """The merged model agrees to 1e-5, and is a plain model."""
    if refuses_to_merge(run.tuner, run.model):
        assert torch.equal(logits_of(run.model, run.inputs), run.logits)
        return
    merged = run.model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(run.base)
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in run.base.named_modules()]
    assert merged.state_dict().keys() == run.base.state_dict().keys()
    assert not hasattr(merged, "peft_config") and not [k for k in vars(merged) if "learner" in k]
    error = (logits_of(merged, run.inputs) - run.logits).abs().max() / run.logits.abs().max()
    assert error < 1e-5


@pytest.mark.verb(
    "merge_adapter, unmerge_adapter", no={"bottleneck": "refused, since no weight can hold what is not linear"}
)
def test_merge_unmerge(run):
    """Merging in place keeps the function, and so does unmerging."""
    if refuses_to_merge(run.tuner, run.model):
        assert torch.equal(logits_of(run.model, run.inputs), run.logits)
        return
    run.model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits_of(run.model, run.inputs), run.logits, rtol=1e-5, atol=1e-5)
    run.model.unmerge_adapter()
    torch.testing.assert_close(logits_of(run.model, run.inputs), run.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.verb("unload")
def test_unload(run):
    """`unload` gives the original back, bit for bit."""
    back = run.model.unload()
    assert type(back) is type(run.base)
    ours, theirs = back.state_dict(), run.base.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits_of(back, run.inputs), run.base_logits)


@pytest.mark.verb("add_adapter")
@pytest.mark.verb("set_adapter")
@pytest.mark.verb("load_adapter")
@pytest.mark.verb("delete_adapter")
def test_two_adapters(run, tmp_path: Path):
    """Two adapters live on one base and switch."""
    run.model.save_pretrained(tmp_path)
    model = run.model
    model.load_adapter(tmp_path, "twin")
    torch.manual_seed(7)
    settings = {"task_type": zoo.ZOO[run.arch].task_type, "init_weights": False, "r": 2}
    model.add_adapter("other", TUNERS[run.tuner].config(**settings))
    model.set_adapter("other")
    other = logits_of(model, run.inputs)
    assert not torch.allclose(other, run.logits, atol=1e-3)
    for name, expected in (("twin", run.logits), ("other", other), ("default", run.logits), ("other", other)):
        model.set_adapter(name)
        assert torch.equal(logits_of(model, run.inputs), expected)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits_of(model, run.inputs), run.logits)


@pytest.mark.verb("load_adapter in place", limit="the weights alone: the config, phases included, stays as it is")
def test_load_in_place(run, tmp_path: Path):
    """`load_adapter` puts another adapter's weights into one that is there."""
    run.model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    settings = {"task_type": zoo.ZOO[run.arch].task_type, "init_weights": False}
    model = get_peft_model(copy.deepcopy(run.base), TUNERS[run.tuner].config(**settings))
    assert not torch.allclose(logits_of(model, run.inputs), run.logits, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits_of(model, run.inputs), run.logits)
