"""transformers' own verbs for adapters (`model.add_adapter` and its kin), for every tuner, and beside a stock LoRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from tuners import TUNERS
from verb_cases import config_of, trained
from zoo import logits_of

all_tuners = pytest.mark.parametrize("tuner", list(TUNERS))
#: `check_peft_version` in each of these verbs. tests/conftest.py skips the tests that meet it.
NEEDS_NEWER_PEFT = "transformers 5.24.0 refuses PEFT below 0.22.0 here, with stock LoRA too; 5.23.0 does not"
one_of_each = pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured", "bottleneck-parallel"])


def lora(arch: str) -> LoraConfig:
    names = {"llama": ["q_proj", "up_proj"], "bert": ["query", "intermediate.dense"]}
    saved = list(zoo.ZOO[arch].head) or None
    return LoraConfig(r=2, target_modules=names[arch], modules_to_save=saved, init_lora_weights=False, lora_alpha=8)


def trains(model: torch.nn.Module, adapter: str) -> bool:
    return any(p.requires_grad for n, p in model.named_parameters() if f".{adapter}." in n and "_to_save." not in n)


@pytest.mark.verb("model.load_adapter (transformers)")
@pytest.mark.verb(
    "model.add_adapter, set_adapter, delete_adapter, active_adapters (transformers)", limit=NEEDS_NEWER_PEFT
)
@pytest.mark.verb("model.get_adapter_state_dict, save_pretrained (transformers)", limit=NEEDS_NEWER_PEFT)
@pytest.mark.parametrize("arch", ["bert", "llama"])
@all_tuners
def test_all_verbs(tuner, arch, tmp_path: Path):
    """Load, add, switch, delete and save work on transformers' own model."""
    run = trained(tuner, arch)
    run.model.save_pretrained(tmp_path / "given")
    model = copy.deepcopy(run.base)
    model.load_adapter(str(tmp_path / "given"), adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    assert torch.equal(logits_of(model, run.inputs), run.logits)
    torch.manual_seed(3)
    model.add_adapter(config_of(tuner, arch, r=2), "other")
    assert model.active_adapters() == ["other"] and trains(model, "other") and not trains(model, "mine")
    other = logits_of(model, run.inputs)
    assert not torch.allclose(other, run.logits, atol=1e-3)
    for name, expected in (("mine", run.logits), ("other", other), ("mine", run.logits)):
        model.set_adapter(name)
        assert torch.equal(logits_of(model, run.inputs), expected)
    # What a phase froze stays frozen.
    added = f".{TUNERS[tuner].prefix}"
    flags = {n: p.requires_grad for n, p in run.model.named_parameters() if added in n and p.numel()}
    assert {n: p.requires_grad for n, p in model.named_parameters() if added in n and ".mine." in n} == {
        n.removeprefix("base_model.model.").replace(".default.", ".mine."): flag for n, flag in flags.items()
    }

    kept = model.get_adapter_state_dict("mine")
    theirs = run.model.state_dict()
    own = {n for n in theirs if added in n and ".default" in n}
    assert {n for n in kept if f".{TUNERS[tuner].prefix}" in n} == {
        n.removeprefix("base_model.model.").replace(".default", "") for n in own
    }
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path / "saved")
    assert torch.equal(logits_of(again, run.inputs), run.logits)

    model.delete_adapter("other")
    assert list(model.peft_config) == ["mine"]
    assert torch.equal(logits_of(model, run.inputs), run.logits)
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")


@pytest.mark.verb("model.disable_adapters, enable_adapters (transformers)", limit=NEEDS_NEWER_PEFT)
@all_tuners
def test_disable_enable(tuner):
    """Disable and enable."""
    run = trained(tuner, "llama")
    model = copy.deepcopy(run.base)
    model.add_adapter(config_of(tuner, "llama"))
    adapted = logits_of(model, run.inputs)
    model.disable_adapters()
    assert torch.equal(logits_of(model, run.inputs), run.base_logits)
    model.enable_adapters()
    assert torch.equal(logits_of(model, run.inputs), adapted)
    assert not torch.allclose(adapted, run.base_logits, atol=1e-3)


@pytest.mark.verb(
    "model.disable_adapters, enable_adapters (transformers)",
    limit="a new head stays disabled after `enable_adapters`, as with LoRA (PEFT's `disable_adapter()` is no such "
    "one-way road)",
)
@pytest.mark.parametrize("tuner", ["lora", "learner", "far", "nas-unstructured", "bottleneck-parallel"])
def test_head_stays_disabled(tuner):
    """A new head stays disabled after `enable_adapters`."""
    run = trained("learner", "bert")
    model = copy.deepcopy(run.base)
    model.add_adapter(lora("bert") if tuner == "lora" else config_of(tuner, "bert"), "mine")
    with torch.no_grad():
        model.classifier.modules_to_save["mine"].weight.mul_(3.0)
    adapted = logits_of(model, run.inputs)
    model.disable_adapters()
    assert torch.equal(logits_of(model, run.inputs), run.base_logits)
    model.enable_adapters()
    assert not torch.allclose(logits_of(model, run.inputs), adapted, atol=1e-3)
    model.classifier.enable_adapters(True)  # what transformers does not do: the rest is back
    assert torch.equal(logits_of(model, run.inputs), adapted)


@pytest.mark.verb(
    "model.load_adapter (transformers)",
    tuners=["NAS-LoRA"],
    limit="without the scores of an adapter that was saved in its search: resume that with PEFT's",
)
def test_search_not_resumed(tmp_path: Path):
    """transformers' `load_adapter` brings no scores, so that a search can't be resumed from it."""
    base = zoo.build("bert")
    inputs = zoo.inputs_of("bert", base)
    model = get_peft_model(copy.deepcopy(base), TUNERS["nas-unstructured"].config(task_type="SEQ_CLS"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.base_model.set_schedule(total_steps=4, steps_per_epoch=2, optimizer=optimizer)
    model(**inputs).loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(1)
    model.save_pretrained(tmp_path)

    def scored(module: torch.nn.Module) -> bool:
        return any(found for m in module.modules() for found in getattr(m, "nas_lora_scores", {}).values())

    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    base.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(logits_of(base, inputs), logits_of(model, inputs))
    assert scored(model) and scored(ours) and not scored(base)


# -- beside a stock LoRA --------------------------------------------------------------------------------------------


@pytest.mark.verb(
    "model.add_adapter of a LoRA beside ours (transformers)",
    limit="both at once only where neither has a head, as with two LoRAs; save each before the other is added, since "
    "PEFT writes the place within the other's layers into the file",
)
@pytest.mark.parametrize("order", ["lora-first", "lora-second"])
@pytest.mark.parametrize("arch", ["llama", "bert"])
@one_of_each
def test_beside_lora(tuner, arch, order, tmp_path: Path):
    """A stock LoRA and ours live beside each other, from files, as `PeftMixedModel` would have it; each alone gives
    what it gives on a model of its own."""
    base = zoo.build(arch)
    inputs = zoo.inputs_of(arch, base)
    alone, models = {}, {}
    for seed, (name, config) in enumerate((("low", lora(arch)), ("ours", config_of(tuner, arch)))):
        torch.manual_seed(seed)
        models[name] = get_peft_model(copy.deepcopy(base), config)
        alone[name] = logits_of(models[name], inputs)
        models[name].save_pretrained(tmp_path / name)
    model = copy.deepcopy(base)
    for name in ("low", "ours") if order == "lora-first" else ("ours", "low"):
        model.load_adapter(str(tmp_path / name), adapter_name=name, is_trainable=True)
    for name in ("low", "ours", "low"):
        model.set_adapter(name)
        torch.testing.assert_close(logits_of(model, inputs), alone[name], rtol=1e-5, atol=1e-6)
        assert trains(model, "ours") == (name == "ours")
    if arch == "llama":
        model.set_adapter(["low", "ours"])
        merged = models["low"].merge_and_unload()
        merged.load_adapter(str(tmp_path / "ours"))
        torch.testing.assert_close(logits_of(model, inputs), logits_of(merged, inputs), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="multiple .* adapters at once for modules_to_save"):
            model.set_adapter(["low", "ours"])
    model.delete_adapter("low")
    model.set_adapter("ours")
    torch.testing.assert_close(logits_of(model, inputs), alone["ours"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured"])
def test_saved_within_lora(tuner, tmp_path: Path):
    """An adapter saved from within a LoRA is refused."""
    model = zoo.build("llama")
    model.add_adapter(config_of(tuner, "llama"), "ours")
    model.add_adapter(lora("llama"), "low")
    model.set_adapter("ours")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the adapter"):
        PeftModel.from_pretrained(zoo.build("llama"), tmp_path)
