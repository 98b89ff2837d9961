"""Files: half precision, truncated and foreign ones; other ways of PEFT and transformers to load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training import adapter_values, arguments, learner, trainer
from tuners import TUNERS
from zoo import logits_of

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained")
    model = learner()
    trainer(model, arguments(out)).train()
    model.save_pretrained(out / "adapter")
    inputs = zoo.inputs_of("distilbert", model)
    return model, out / "adapter", inputs, logits_of(model, inputs)


def load(path: Path, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(zoo.build("distilbert"), path, **kwargs)


def test_save_dtype(trained, tmp_path: Path):
    """An adapter is saved in half precision on request."""
    model, path, inputs, logits = trained
    config = model.peft_config["default"]
    config.save_dtype = "bfloat16"
    model.save_pretrained(tmp_path)
    config.save_dtype = None
    full, half = load_file(path / FILE), load_file(tmp_path / FILE)
    adapter = [name for name in full if ".learner_" in name]
    assert adapter and all(torch.equal(half[n], full[n].to(torch.bfloat16)) for n in adapter)
    again = load(tmp_path)
    assert all(p.dtype == torch.float32 for n, p in again.named_parameters() if "learner_" in n)
    torch.testing.assert_close(logits_of(again, inputs), logits, rtol=0, atol=0.02)


def test_checkpoint_dtype(tmp_path: Path):
    """Checkpoints of a running training keep full precision, so that a resume is exact; what is saved after training
    is cast."""
    model = learner(save_dtype="bfloat16")
    run = trainer(model, arguments(tmp_path, save_strategy="steps", save_steps=1))
    run.train()
    for step in (1, 5):
        saved = load_file(tmp_path / f"checkpoint-{step}" / FILE)
        assert {v.dtype for v in saved.values()} == {torch.float32}
    run.save_model(tmp_path / "end")
    saved = load_file(tmp_path / "end" / FILE)
    assert {v.dtype for n, v in saved.items() if "learner_" in n} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["in-place", "second"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "unknown", "shape", "foreign"])
def test_damaged_file(trained, tmp_path: Path, damage, how):
    """A damaged file is refused, and leaves the model as it was."""
    _, path, inputs, _ = trained
    values = load_file(path / FILE)
    name = next(n for n in values if "learner_P2" in n)
    (tmp_path / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    if damage == "missing":
        del values[name]
    elif damage == "unknown":
        values[name.replace(".learner_P2", ".other.learner_P2")] = values[name].clone()
    elif damage == "shape":
        values[name] = values[name][:, :1].contiguous()
    elif damage == "foreign":
        values = {n.replace("learner_P1", "lora_A").replace("learner_P2", "lora_B"): v for n, v in values.items()}
    save_file(values, tmp_path / FILE)
    if damage == "truncated":
        data = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(data[: len(data) // 2])

    model = learner(seed=0)
    before, logits = adapter_values(model), logits_of(model, inputs)
    with pytest.raises((ValueError, SafetensorError)) as error:
        model.load_adapter(tmp_path, "default" if how == "in-place" else "second")
    if damage != "truncated":
        assert "does not fit the adapter" in str(error.value) and "Nothing was loaded" in str(error.value)
    after = adapter_values(model)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert torch.equal(logits_of(model, inputs), logits)


@pytest.mark.parametrize("adapter", ["layer", "attention"])
def test_adapter_named_as_module(trained, tmp_path: Path, adapter):
    """An adapter may be called as a module is."""
    _, path, inputs, logits = trained
    model = learner()
    model.load_adapter(path, adapter)
    model.set_adapter(adapter)
    assert torch.equal(logits_of(model, inputs), logits)
    model.load_adapter(path, "default")
    model.set_adapter("default")
    assert torch.equal(logits_of(model, inputs), logits)


@pytest.mark.parametrize("tuner", ["learner-unprimed", "far", "nas-unstructured", "bottleneck-sequential"])
def test_adapter_named_as_parameter(tuner, tmp_path: Path):
    """An adapter's name may begin as its tuner's parameters do, in a model with a head, whose values have the
    adapter's name in theirs."""
    config = TUNERS[tuner].config(init_weights=False, task_type="SEQ_CLS")
    name = f"{TUNERS[tuner].prefix}x"
    model = get_peft_model(zoo.build("distilbert"), config, adapter_name=name).eval()
    inputs = zoo.inputs_of("distilbert", model)
    model.save_pretrained(tmp_path)
    for loaded in (load(tmp_path / name, adapter_name=name), load(tmp_path / name)):
        assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_ignore_mismatched_sizes(trained, tmp_path: Path):
    """Sizes that don't fit can be ignored, as in PEFT."""
    _, path, _, _ = trained
    model = learner(r=8)
    with pytest.raises(ValueError, match="shapes differ"):
        model.load_adapter(path, "default")
    with pytest.warns(UserWarning, match="size mismatch|shape"):
        model.load_adapter(path, "default", ignore_mismatched_sizes=True)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("arch", ["distilbert", "roberta"])  # a head of one linear layer, and one of several
def test_other_number_of_labels(tmp_path: Path, arch, tuner):
    """A file with three labels on a base model of two is refused with `num_labels`, which cures it."""
    model = get_peft_model(zoo.with_labels(arch, num_labels=3), TUNERS[tuner].config(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the base model was loaded with 2: load the base model with num_labels=3"):
        PeftModel.from_pretrained(zoo.build(arch), tmp_path)
    PeftModel.from_pretrained(zoo.with_labels(arch, num_labels=3), tmp_path)


def test_not_about_labels(trained):
    """A file of another rank, or of a base model of other sizes, is told without a word of labels."""
    _, path, _, _ = trained
    wide = copy.deepcopy(zoo.build("distilbert").config)
    wide.dim = 32
    for load in (
        lambda: learner(r=8).load_adapter(path, "default"),
        lambda: PeftModel.from_pretrained(type(zoo.build("distilbert"))(wide), path),
    ):
        with pytest.raises(ValueError, match=r"shapes differ.*on the same base model\.$"):
            load()


def test_names_of_labels(tmp_path: Path):
    """An adapter's file has no names of labels, with LoRA either: they are the base model's."""
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    for config in (LoraConfig(target_modules=["q_lin"], task_type="SEQ_CLS"), TUNERS["learner"].config()):
        get_peft_model(zoo.with_labels("distilbert", **names), config).save_pretrained(tmp_path)
        assert PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path).config.id2label[0] == "LABEL_0"
        again = PeftModel.from_pretrained(zoo.with_labels("distilbert", **names), tmp_path)
        assert again.config.id2label == names["id2label"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(trained, dtype):
    """A base in half precision gets an adapter in float32."""
    _, path, inputs, logits = trained
    base = zoo.build("distilbert").to(dtype)
    model = PeftModel.from_pretrained(base, path)
    assert {p.dtype for n, p in model.named_parameters() if "learner_" in n} == {torch.float32}
    out = logits_of(model, inputs)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), logits, rtol=0, atol=0.05)
    merged = model.merge_and_unload(safe_merge=True)
    assert {p.dtype for p in merged.parameters()} <= {dtype, torch.float32}  # the head was saved in float32
    torch.testing.assert_close(logits_of(merged, inputs).float(), logits, rtol=0, atol=0.05)


@pytest.mark.parametrize("arch", ["distilbert", "gpt2"])
def test_merged_rounding(arch):
    """A merged layer rounds as the unmerged one. Where the effective weight is formed (many rows), merging sums in the
    same order: no bit differs."""
    model = learner(arch, init_weights=False).eval()
    layer = next(m for n, m in model.named_modules() if n.endswith(("ffn.lin1", "mlp.c_fc")))
    x = torch.randn(50, 16)
    with torch.no_grad():
        unmerged = layer(x)
        layer.merge()
        assert layer.merged and torch.equal(layer(x), unmerged)
