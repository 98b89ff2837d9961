"""One contract for all tuners, over all architectures: train through the boundaries, save, reload, merge, go back.

The promises are those of docs/design.md, "Contract".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from training import sgd
from tuners import TUNERS, refuses_to_merge

from peft_learners.structure.attention import attention_names
from peft_learners.structure.modules import linear_names, new_head, norm_names

STEPS_PER_EPOCH, EPOCHS = 3, 2
CASES = [(tuner, arch) for tuner in TUNERS for arch in zoo.ZOO]


@dataclass
class Trained:
    tuner: str
    arch: str
    base: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    model: PeftModel
    base_logits: torch.Tensor
    fresh_logits: torch.Tensor
    logits: torch.Tensor
    phases: list[str]
    without_gradient: list[str]
    frozen_moved: list[str]
    state_matches: bool


def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def train(tuner: str, arch: str) -> Trained:
    base = zoo.build(arch)
    inputs = zoo.inputs_of(arch, base)
    base_logits = logits_of(base, inputs)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, TUNERS[tuner].config(task_type=zoo.ZOO[arch].task_type))
    fresh_logits = logits_of(model, inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    starts = model.base_model.set_schedule(
        total_steps=EPOCHS * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, optimizer=optimizer
    )
    phases, without, moved = [s.phase for s in starts], [], []
    model.train()
    for step in range(1, EPOCHS * STEPS_PER_EPOCH + 1):
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        model(**inputs).loss.backward()
        without += [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        moved += [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
        phases += [s.phase for s in model.base_model.update_and_allocate(step)]
    trained = {p for p in model.parameters() if p.requires_grad}
    return Trained(
        tuner, arch, untouched, inputs, model, base_logits, fresh_logits, logits_of(model, inputs), phases, without,
        moved, set(optimizer.state) == trained,
    )  # fmt: skip


_TRAINED: dict[tuple[str, str], Trained] = {}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def run(request: pytest.FixtureRequest) -> Iterator[Trained]:
    """A trained model of its own for each test (training is done once per case)."""
    case = request.param
    if case not in _TRAINED:
        _TRAINED[case] = train(*case)
    yield copy.deepcopy(_TRAINED[case])


def test_structure_is_found(run):
    entry = zoo.ZOO[run.arch]
    linears = linear_names(run.base)
    assert len(linears) == entry.linears
    assert len(attention_names(run.base, linears)) == entry.attention
    assert len(norm_names(run.base)) == entry.norms
    assert tuple(new_head(run.base)) == entry.head


@pytest.mark.verb("get_peft_model", limit={"NAS-LoRA": "a fresh adapter changes the function, unless init='lora'"})
def test_fresh_adapter_leaves_the_function_as_it_is(run):
    assert torch.equal(run.fresh_logits, run.base_logits) == TUNERS[run.tuner].fresh_is_identity


@pytest.mark.verb("get_peft_model")
def test_training_goes_through_all_phases_and_changes_the_function(run):
    assert tuple(run.phases) == TUNERS[run.tuner].phases
    assert run.model.peft_config["default"].completed_phases == list(TUNERS[run.tuner].phases[:-1])
    assert not torch.allclose(run.logits, run.base_logits, atol=1e-2)


def test_all_that_trains_gets_a_gradient_and_nothing_else_moves(run):
    assert run.without_gradient == []
    assert run.frozen_moved == []


def test_optimizer_holds_state_for_exactly_what_trains(run):
    assert run.state_matches
    assert all(p.grad is None for p in run.model.parameters() if not p.requires_grad)


def test_base_weights_are_never_written_to(run):
    original = dict(run.base.named_parameters())
    inside = {
        name.replace(".base_layer.", "."): p
        for name, p in run.model.base_model.model.named_parameters(remove_duplicate=False)
    }
    for name, value in original.items():
        heads = zoo.ZOO[run.arch].head
        places = (name, *(name.replace(f"{head}.", f"{head}.original_module.", 1) for head in heads))
        (place,) = {p for p in places if p in inside}
        assert torch.equal(inside[place], value), name


@pytest.mark.verb("disable_adapter")
def test_disabled_adapter_gives_the_base_back_bit_for_bit(run):
    with run.model.disable_adapter():
        assert torch.equal(logits_of(run.model, run.inputs), run.base_logits)
    assert torch.equal(logits_of(run.model, run.inputs), run.logits)


@pytest.mark.verb("add_adapter")
@pytest.mark.verb("delete_adapter")
@pytest.mark.verb("set_requires_grad")
def test_what_is_frozen_stays_frozen(run):
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
def test_reloaded_adapter_gives_the_same_logits_bit_for_bit(run, tmp_path: Path):
    run.model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits_of(again, run.inputs), run.logits)
        assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.verb("save_pretrained")
def test_saved_is_everything_that_contributes_and_nothing_else(run, tmp_path: Path):
    run.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    added = {
        name.replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in run.model.state_dict().items()
        if (f".{TUNERS[run.tuner].prefix}" in name or ".modules_to_save." in name) and p.numel()
    }
    assert saved.keys() == added.keys()
    assert all(torch.equal(saved[name], added[name]) for name in saved)
    assert all(value.any() for value in saved.values() if value.is_floating_point())


@pytest.mark.verb("PeftModel.from_pretrained(is_trainable=True)")
def test_adapter_loaded_for_training_goes_on_in_its_last_phase(run, tmp_path: Path):
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
def test_merged_agrees_to_1e_5_and_is_the_plain_model(run):
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
def test_merge_and_unmerge_in_place(run):
    if refuses_to_merge(run.tuner, run.model):
        assert torch.equal(logits_of(run.model, run.inputs), run.logits)
        return
    run.model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits_of(run.model, run.inputs), run.logits, rtol=1e-5, atol=1e-5)
    run.model.unmerge_adapter()
    torch.testing.assert_close(logits_of(run.model, run.inputs), run.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.verb("unload")
def test_unload_gives_the_original_back_bit_for_bit(run):
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
def test_two_adapters_live_on_one_base_and_switch(run, tmp_path: Path):
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
def test_in_place_reload_of_another_adapters_weights(run, tmp_path: Path):
    run.model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    settings = {"task_type": zoo.ZOO[run.arch].task_type, "init_weights": False}
    model = get_peft_model(copy.deepcopy(run.base), TUNERS[run.tuner].config(**settings))
    assert not torch.allclose(logits_of(model, run.inputs), run.logits, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits_of(model, run.inputs), run.logits)
