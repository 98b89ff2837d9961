"""Base models that transformers or accelerate placed: `device_map` on a CPU, offloaded weights, the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from training import take_steps
from transformers import set_seed
from tuners import TUNERS, refuses_to_merge
from zoo import logits_of

from peft_learners import FARConfig, LearnerConfig
from peft_learners.structure.weights import base_of, is_offloaded

CPU = torch.device("cpu")
OFFLOADABLE = (
    "learner",
    "learner-unprimed",
    "nas-unstructured",
    "nas-structured",
    "bottleneck-sequential",
    "bottleneck-parallel",
)
STEPS = 4


def adapted(model: nn.Module, tuner: str, arch: str = "bert", **settings: Any) -> PeftModel:
    set_seed(1)
    return get_peft_model(model, TUNERS[tuner].config(**{"task_type": zoo.ZOO[arch].task_type, **settings}))


def to_cpu(model: Any, folder: Path) -> nn.Module:
    """Weights of the backbone are kept aside, and put in place for each call. The head stays, as it is trained."""
    cpu_offload(getattr(model, model.base_model_prefix), execution_device=CPU)
    return model


def to_disk(model: Any, folder: Path) -> nn.Module:
    disk_offload(getattr(model, model.base_model_prefix), folder / "weights", execution_device=CPU)
    return model


def in_part(model: Any, folder: Path) -> nn.Module:
    """Every other block on disk."""
    places = {name: "cpu" for name, _ in model.named_children() if name != "bert"}
    places |= {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu"}
    places |= {"bert.pooler": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder / "weights", force_hooks=True)


@pytest.fixture(params=[to_cpu, to_disk, in_part], ids=lambda place: place.__name__)
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], nn.Module]:
    """Makes a BERT of whose backbone at least a block is offloaded."""

    def make() -> nn.Module:
        model = request.param(zoo.build("bert"), tmp_path)
        assert model.bert.encoder.layer[0].attention.self.query.weight.is_meta
        return model

    return make


@pytest.mark.verb("device_map, offloading")
@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, "auto"], ids=str)
@pytest.mark.parametrize("tuner", TUNERS)
def test_cpu_device_map(tuner, place, tmp_path: Path):
    """Adapters work on models that transformers places on a CPU."""
    plain = zoo.build("distilbert")
    plain.save_pretrained(tmp_path / "base")
    batch = zoo.inputs_of("distilbert", plain)
    expected = logits_of(adapted(plain, tuner, "distilbert", init_weights=False), batch)

    def load() -> nn.Module:
        return type(plain).from_pretrained(tmp_path / "base", device_map=place)

    model = adapted(load(), tuner, "distilbert", init_weights=False)
    assert torch.equal(logits_of(model, batch), expected)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits_of(again, batch), expected)
    if not refuses_to_merge(tuner, again):
        torch.testing.assert_close(logits_of(again.merge_and_unload(), batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.verb("device_map, offloading")
@pytest.mark.parametrize("tuner", OFFLOADABLE)
def test_offloaded_inference(tuner, offloaded):
    """An adapter on an offloaded base gives what it gives on an ordinary one. PEFT itself puts the adapter where the
    weight seems to be, on meta, and its values are lost."""
    batch = zoo.inputs_of("bert", zoo.build("bert"))
    reference, model = (adapted(base, tuner, init_weights=False) for base in (zoo.build("bert"), offloaded()))
    ours = {n: p for n, p in model.named_parameters() if f".{TUNERS[tuner].prefix}" in n}
    theirs = dict(reference.named_parameters())
    assert ours and all(torch.equal(p, theirs[n]) for n, p in ours.items())
    torch.testing.assert_close(logits_of(model, batch), logits_of(reference, batch), rtol=1e-5, atol=1e-6)
    layer = model.base_model.model.bert.encoder.layer[0].attention
    assert base_of(layer.self.query).weight.is_meta  # put away again
    base = logits_of(zoo.build("bert"), batch)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), base)
    assert torch.equal(logits_of(model.unload(), batch), base)


@pytest.mark.parametrize("tuner", OFFLOADABLE)
def test_offloaded_training(tuner, offloaded, tmp_path: Path):
    """Training on an offloaded base is that on an ordinary one."""
    batch = zoo.inputs_of("bert", zoo.build("bert"))
    reference, model = (adapted(base, tuner) for base in (zoo.build("bert"), offloaded()))
    expected = take_steps(reference, batch, STEPS)[0]
    assert expected[-1] < expected[0]
    assert take_steps(model, batch, STEPS)[0] == pytest.approx(expected, rel=1e-4)
    saved = []
    for name, one in (("ours", model), ("theirs", reference)):
        one.save_pretrained(tmp_path / name)
        saved.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[0].items():
        torch.testing.assert_close(value, saved[1][key], rtol=1e-3, atol=1e-4, msg=key)
    again = PeftModel.from_pretrained(offloaded(), tmp_path / "ours")
    torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tuner", OFFLOADABLE)
def test_offloaded_norms(tuner):
    """Norms that are computed again in backward have their offloaded weights then."""
    base = zoo.build("llama")
    batch = zoo.inputs_of("llama", base)
    cpu_offload(base.model, execution_device=CPU)
    reference, model = (adapted(one, tuner, task_type="CAUSAL_LM") for one in (zoo.build("llama"), base))
    expected = take_steps(reference, batch, STEPS)[0]
    assert take_steps(model, batch, STEPS)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tuner", OFFLOADABLE)
def test_offloaded_merge(tuner, offloaded):
    """Merging writes to offloaded weights, and unmerging gives them back."""
    batch = zoo.inputs_of("bert", zoo.build("bert"))
    model, base = adapted(offloaded(), tuner, init_weights=False), logits_of(zoo.build("bert"), batch)
    logits = logits_of(model, batch)
    assert not torch.allclose(logits, base, atol=1e-3)
    if refuses_to_merge(tuner, model):
        assert torch.equal(logits_of(model, batch), logits)
        return
    model.merge_adapter(safe_merge=True)
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert query.merged and query.base_layer.weight.is_meta
    torch.testing.assert_close(logits_of(model, batch), logits, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model, batch), logits, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges where it is called
        torch.testing.assert_close(logits_of(model, batch), base, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged) is type(zoo.build("bert"))
    torch.testing.assert_close(logits_of(merged, batch), logits, rtol=1e-5, atol=1e-5)


def test_offloaded_unload(offloaded):
    """Unloading a merged adapter gives offloaded weights back."""
    batch = zoo.inputs_of("bert", zoo.build("bert"))
    model = adapted(offloaded(), "learner", init_weights=False)
    model.merge_adapter()
    base = logits_of(zoo.build("bert"), batch)
    torch.testing.assert_close(logits_of(model.unload(), batch), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize(
    "tuner", ["learner", "far", "nas-unstructured", "bottleneck-sequential", "bottleneck-parallel"]
)
def test_offload_adapted_model(tuner, arch):
    """An adapted model can be offloaded as a whole, the adapters' own weights too; ViT has convolutions and
    composites, GPT-2 Conv1D."""
    batch = zoo.inputs_of(arch, zoo.build(arch))
    model = adapted(zoo.build(arch), tuner, arch, init_weights=False)
    logits, base = logits_of(model, batch), logits_of(zoo.build(arch), batch)
    cpu_offload(model, execution_device=CPU)
    assert all(p.is_meta for p in model.parameters()) and any(is_offloaded(m) for m in model.modules())
    torch.testing.assert_close(logits_of(model, batch), logits, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, batch), base, rtol=1e-5, atol=1e-6)
    if not TUNERS[tuner].merges:
        return
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, batch), logits, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, batch), base, rtol=1e-5, atol=1e-5)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.verb("device_map, offloading", tuners=["FAR"], limit="a base whose weights are offloaded is refused")
def test_offloaded_far_refused(offloaded):
    """FAR on an offloaded base is refused."""
    with pytest.raises(ValueError, match="are offloaded. FAR's deltas are as large as the weights"):
        get_peft_model(offloaded(), FARConfig(task_type="SEQ_CLS"))


@pytest.mark.verb("device_map, offloading", limit="a head that is offloaded is refused, since it is trained")
@pytest.mark.parametrize("tuner", OFFLOADABLE)
def test_offloaded_head_refused(tuner):
    """An offloaded head is refused: it would be trained nowhere: accelerate puts the old values in place for each
    call."""
    model = zoo.build("bert")
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(ValueError, match=r"classifier is trained whole .* offloaded. Keep it on a device"):
        adapted(model, tuner)


@pytest.mark.parametrize("arch", ["bert", "llama", "vit"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_meta_counts(tuner, arch):
    """Adapters on the meta device count as real ones do and, once the values are there, compute the same."""
    real = adapted(zoo.build(arch), tuner, arch, init_weights=False)
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in real.named_parameters()}
    with torch.device("meta"):
        bare = type(zoo.build(arch))(zoo.build(arch).config)
    with init_empty_weights():
        empty = type(zoo.build(arch))(zoo.build(arch).config)
    for model in (
        adapted(bare, tuner, arch, init_weights=False),
        get_peft_model(
            empty, TUNERS[tuner].config(task_type=zoo.ZOO[arch].task_type, init_weights=False), low_cpu_mem_usage=True
        ),
    ):
        assert all(p.is_meta for p in model.parameters())
        assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == shapes
        assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    model.to_empty(device=CPU)
    # What is computed and not saved (positions, inverse frequencies) comes from the real model too.
    for name, value in real.named_buffers():
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = value.clone()
    model.load_state_dict(real.state_dict())
    batch = zoo.inputs_of(arch, real)
    assert torch.equal(logits_of(model, batch), logits_of(real, batch))


@pytest.mark.parametrize("tuner", TUNERS)
def test_meta_load(tuner, tmp_path: Path):
    """An adapter is loaded onto a base on the meta device. Its shapes are checked there too; as with LoRA, its values
    are not kept."""
    real = adapted(zoo.build("bert"), tuner, init_weights=False)
    real.save_pretrained(tmp_path)

    def empty() -> nn.Module:
        with init_empty_weights():
            return type(zoo.build("bert"))(zoo.build("bert").config)

    model = PeftModel.from_pretrained(empty(), tmp_path, low_cpu_mem_usage=True)
    shapes = {name: tuple(p.shape) for name, p in real.named_parameters()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert all(p.is_meta for n, p in model.named_parameters() if f".{TUNERS[tuner].prefix}" in n)


def test_meta_schedule():
    """Priming is planned on the meta device, so that a run can be sized before its model exists."""
    with torch.device("meta"):
        bare = type(zoo.build("bert"))(zoo.build("bert").config)
    model = get_peft_model(bare, LearnerConfig(r=4, task_type="SEQ_CLS"))
    primed, _ = model.get_nb_trainable_parameters()
    model.base_model.set_schedule(total_steps=8, steps_per_epoch=2)
    assert [start.phase for start in model.base_model.update_and_allocate(4)] == ["learning"]
    dense = 8 * 16 * 16  # four linear layers of two blocks
    assert primed - model.get_nb_trainable_parameters()[0] == dense
