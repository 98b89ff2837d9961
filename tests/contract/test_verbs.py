"""PEFT's verbs that its own test-suite does not call on transformers models, for every tuner."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import zoo
from forks import Warm
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from training import adapted, adapter_values, arguments, trainer
from tuners import TUNERS, refuses_to_merge
from verb_cases import PHASES, config_of, gradients, in_phase, switched, trained
from zoo import logits_of

AUTO = {
    "bert": AutoPeftModelForSequenceClassification,
    "llama": AutoPeftModelForCausalLM,
    "t5": AutoPeftModelForSeq2SeqLM,
}
all_tuners = pytest.mark.parametrize("tuner", list(TUNERS))
one_of_each = pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured", "bottleneck-parallel"])


# -- mixed batches ------------------------------------------------------------------------------------------------


@pytest.mark.verb("adapter_names=")
@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
@all_tuners
def test_mixed_batch(tuner, arch):
    """Rows of a mixed batch have their own adapters."""
    run = trained(tuner, arch)
    model, inputs = run.model, run.inputs
    torch.manual_seed(3)
    model.add_adapter("other", config_of(tuner, arch, r=2))
    expected = {"default": run.logits, "__base__": run.base_logits, "other": switched(model, "other", inputs)}
    for names in (["default", "__base__", "other"], ["other", "other", "__base__"]):
        mixed = logits_of(model, {**inputs, "adapter_names": names})
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
            assert name == "__base__" or not torch.allclose(mixed[row], expected["__base__"][row], atol=1e-3)
    assert torch.equal(logits_of(model, inputs), expected["other"])  # no trace in the next batch
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        logits_of(model, {**inputs, "adapter_names": ["default", "nobody", "other"]})
    with pytest.raises(ValueError, match="same as the number of inputs"):
        logits_of(model, {**inputs, "adapter_names": ["default"]})
    if refuses_to_merge(tuner, model):
        return
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits_of(model, {**inputs, "adapter_names": ["default", "__base__", "other"]})


@pytest.mark.verb("adapter_names=")
@pytest.mark.parametrize("beams", [1, 2])
@one_of_each
def test_mixed_batch_generates(tuner, beams):
    """A mixed batch generates."""
    run = trained(tuner, "llama")
    model, ids = run.model.eval(), run.inputs["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": 63}
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **settings)
    adapted = model.generate(input_ids=ids, **settings)
    assert not torch.equal(plain, adapted)
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__", "default"], **settings)
    assert torch.equal(mixed, torch.stack([adapted[0], plain[1], adapted[2]]))


# -- other ways to an adapter ---------------------------------------------------------------------------------------


@pytest.mark.verb("AutoPeftModelFor*.from_pretrained")
@pytest.mark.parametrize("arch", list(AUTO))
@all_tuners
def test_auto_classes(tuner, arch, tmp_path: Path):
    """PEFT's auto classes load base and adapter."""
    run = trained(tuner, arch)
    copy.deepcopy(run.base).save_pretrained(tmp_path / "base")
    run.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    run.model.save_pretrained(tmp_path / "adapter")
    again = AUTO[arch].from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(again, run.inputs), run.logits)


@pytest.mark.verb("inject_adapter_in_model")
@pytest.mark.verb("get_peft_model_state_dict, set_peft_model_state_dict")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@all_tuners
def test_injection(tuner, low_cpu_mem_usage):
    """Injection and state dicts work without a `PeftModel`."""
    run = trained(tuner, "bert")
    state = {n.removeprefix("base_model.model."): v for n, v in get_peft_model_state_dict(run.model).items()}
    config = copy.deepcopy(run.model.peft_config["default"])
    bare = inject_adapter_in_model(config, copy.deepcopy(run.base), low_cpu_mem_usage=low_cpu_mem_usage)
    set_peft_model_state_dict(bare, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits_of(bare, run.inputs), run.logits)
    again = get_peft_model_state_dict(bare)
    assert again.keys() == state.keys() and all(torch.equal(again[n], v) for n, v in state.items())


@pytest.mark.verb("low_cpu_mem_usage=True")
@all_tuners
def test_low_cpu_mem_usage(tuner, tmp_path: Path):
    """A second adapter is loaded without memory for random values."""
    run = trained(tuner, "bert")
    run.model.save_pretrained(tmp_path)
    model = get_peft_model(copy.deepcopy(run.base), config_of(tuner, "bert"))
    model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=True)
    assert not any(value.is_meta for value in model.state_dict().values())
    assert torch.equal(switched(model, "loaded", run.inputs), run.logits)
    empty = get_peft_model(copy.deepcopy(run.base), config_of(tuner, "bert"), low_cpu_mem_usage=True)
    added = [p for name, p in empty.named_parameters() if f".{TUNERS[tuner].prefix}" in name]
    assert added and all(p.is_meta for p in added)


@pytest.mark.parametrize("name", ["attention", "model"])
@all_tuners
def test_saved_beside_module_name(tuner, name, tmp_path: Path):
    """An adapter is saved whole beside one that is called as a module. PEFT drops what has another adapter's name
    anywhere in its key: of LoRA, silently, all that lies there."""
    run = trained(tuner, "bert")
    run.model.add_adapter(name, config_of(tuner, "bert"))
    run.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path)
    assert torch.equal(logits_of(again, run.inputs), run.logits)
    other = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path / name)
    assert torch.equal(logits_of(other, run.inputs), switched(run.model, name, run.inputs))


# -- what a model says of itself ------------------------------------------------------------------------------------


@pytest.mark.verb("get_model_status, get_layer_status")
@all_tuners
def test_status(tuner, tmp_path: Path):
    """The status tells what is there."""
    run = trained(tuner, "bert")
    fresh = get_peft_model(copy.deepcopy(run.base), TUNERS[tuner].config(task_type="SEQ_CLS"))
    status = fresh.get_model_status()
    assert status.peft_types == {"default": TUNERS[tuner].prefix[:-1].upper()}
    assert status.requires_grad == {"default": True} and status.enabled and not status.merged_adapters
    assert (status.trainable_params, status.total_params) == fresh.get_nb_trainable_parameters()

    model = run.model
    model.add_adapter("other", config_of(tuner, "bert"))
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "other": False}  # what is frozen is no parameter
    assert len(model.get_layer_status()) == status.num_adapter_layers

    model.delete_adapter("other")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(run.base), tmp_path, is_trainable=True)
    assert again.get_model_status().requires_grad == {"default": True}
    with again.disable_adapter():
        assert not again.get_model_status().enabled
    if refuses_to_merge(tuner, again):
        return
    again.merge_adapter()
    # The model's own line says "irregular" wherever there is a head beside the merged layers, with LoRA too.
    merged = {s.module_type: s.merged_adapters for s in again.get_layer_status()}
    assert merged.pop("ModulesToSaveWrapper") == [] and merged and all(m == ["default"] for m in merged.values())


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.verb("copy.deepcopy, torch.save")
@pytest.mark.parametrize("phase", PHASES)
@all_tuners
def test_deepcopy(tuner, phase, tmp_path: Path):
    """A copy stands alone."""
    model, inputs = in_phase(tuner, "bert", phase)
    logits = logits_of(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits_of(twin, inputs), logits)
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == flags
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2.0)
        assert not torch.allclose(logits_of(twin, inputs), logits, atol=1e-3)
        assert torch.equal(logits_of(model, inputs), logits)
        twin.unload()


@pytest.mark.slow
@pytest.mark.verb("pickle of configs")
@pytest.mark.verb("copy.deepcopy, torch.save")
def test_pickle(warm: Warm, tmp_path: Path):
    """Configs and models are unpickled where the plugin wasn't imported."""
    configs = {name: tuner.config(target_modules=["query"]) for name, tuner in TUNERS.items()}
    chosen = ("learner", "far", "nas-structured", "bottleneck-parallel")
    models = {name: in_phase(name, "bert", "last")[0] for name in chosen}
    (tmp_path / "configs.pkl").write_bytes(pickle.dumps(configs))
    torch.save(models, tmp_path / "models.pt")
    code = (
        "import pickle, sys, torch\n"
        f"configs = pickle.load(open({str(tmp_path / 'configs.pkl')!r}, 'rb'))\n"
        f"models = torch.load({str(tmp_path / 'models.pt')!r}, weights_only=False)\n"
        "ids = torch.arange(3, 9).view(1, 6)\n"
        "out = {n: m.eval()(input_ids=ids).logits.tolist() for n, m in models.items()}\n"
        "print({n: repr(c) for n, c in configs.items()}, out, sep='\\n')\n"
    )
    read, logits = (eval(line) for line in warm.python(code, log=tmp_path / "log").splitlines()[-2:])
    assert read == {name: repr(config) for name, config in configs.items()}
    ids = torch.arange(3, 9).view(1, 6)
    for name, model in models.items():
        assert torch.equal(torch.tensor(logits[name]), logits_of(model, {"input_ids": ids}))


# -- precision and memory -------------------------------------------------------------------------------------------


@pytest.mark.verb("torch.autocast")
@pytest.mark.parametrize(
    ("dtype", "base_type"),
    # Not float16 on a bfloat16 base: torch's own norms refuse that on a CPU.
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["bfloat16", "bfloat16-on-bfloat16", "float16"],
)
@pytest.mark.parametrize("phase", PHASES)
@all_tuners
def test_autocast(tuner, phase, dtype, base_type):
    """Forward pass and training step run under autocast."""
    model, inputs = in_phase(tuner, "bert", phase)
    logits = logits_of(model, inputs)
    model.train()
    model(**inputs).loss.backward()
    exact = gradients(model)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        if f".{TUNERS[tuner].prefix}" not in name and ".modules_to_save." not in name:
            parameter.data = parameter.data.to(base_type)
    with torch.autocast("cpu", dtype):
        out = model(**inputs)
    assert out.logits.dtype == dtype
    # bfloat16 has 8 bits: 2^-8 relative per rounding
    scale = 0.01 if dtype == torch.float16 else 0.04
    assert (out.logits.float() - logits).abs().max() < scale * logits.abs().max()
    out.loss.backward()
    found = gradients(model)
    assert found.keys() == exact.keys() and found
    for name, gradient in found.items():
        assert gradient.dtype == dict(model.named_parameters())[name].dtype
        assert (gradient.float() - exact[name]).norm() <= 0.1 * exact[name].norm() + 1e-4, name


@pytest.mark.verb("gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("arch", ["bert", "llama"])
@all_tuners
def test_checkpointing(tuner, arch, phase, reentrant):
    """Gradients with checkpointing are those without."""
    model, inputs = in_phase(tuner, arch, phase)
    model.train()
    model(**inputs).loss.backward()
    exact = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # as Trainer does, since the frozen embeddings' output has no gradient
    model(**inputs).loss.backward()
    found = gradients(model)
    assert found.keys() == exact.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.verb("gradient_checkpointing_enable")
@pytest.mark.parametrize(("tuner", "reentrant"), [("nas-unstructured", True), ("nas-structured", False)])
def test_checkpointing_scores(tuner, reentrant, tmp_path: Path):
    """Checkpointing changes neither the scores nor what is kept. Trainer, through search and pruning: the same
    positions with the same values."""
    kept = []
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for settings in ({}, more):
        model = adapted(TUNERS[tuner].config(task_type="SEQ_CLS"), "bert")
        trainer(model, arguments(tmp_path, **settings)).train()
        assert model.peft_config["default"].completed_phases == ["search"]
        kept.append({n: v for n, v in adapter_values(model).items() if v.numel()})
    assert kept[0].keys() == kept[1].keys() and any(n.endswith("U_positions.default") for n in kept[0])
    for name, value in kept[1].items():
        torch.testing.assert_close(value, kept[0][name], rtol=1e-4, atol=1e-6, msg=name)


# -- what PEFT keeps for its own tuners -----------------------------------------------------------------------------


@pytest.mark.verb(
    "get_peft_model(mixed=True)",
    no="PEFT lists the tuner types that a `PeftMixedModel` takes; "
    "transformers' `model.add_adapter` and `model.load_adapter` put a LoRA beside ours",
)
@one_of_each
def test_mixed_model_refused(tuner):
    """A `PeftMixedModel` takes PEFT's own tuners only."""
    lora = LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`. Compatible types are"):
        get_peft_model(zoo.build("bert"), config_of(tuner, "bert"), mixed=True)
    mixed = get_peft_model(zoo.build("bert"), lora, mixed=True)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`. Compatible types are"):
        mixed.add_adapter("second", config_of(tuner, "bert"))
    model = get_peft_model(zoo.build("bert"), config_of(tuner, "bert"))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", lora)


@pytest.mark.verb(
    "hotswap_adapter", no="PEFT has it for LoRA alone; `load_adapter(path, existing_name)` swaps in place"
)
@one_of_each
def test_hotswap_refused(tuner, tmp_path: Path):
    """Hotswapping is for LoRA alone."""
    run = trained(tuner, "bert")
    run.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="[Hh]otswap"):
        hotswap_adapter(run.model, tmp_path, "default")
    assert torch.equal(logits_of(run.model, run.inputs), run.logits)
