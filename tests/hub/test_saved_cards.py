"""Cards that are written beside saved adapters: what PEFT's and Trainer's lack, and copies of the models that save."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import zoo
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from training import arguments, far, learner, nas, trainer
from transformers import AutoModelForSequenceClassification
from tuners import TUNERS
from zoo import logits_of

from peft_learners import LearnerConfig
from peft_learners.hub.card import is_boilerplate, is_hub_id, short_name

OWN_README = b"---\nlicense: mit\ntags:\n- by-hand\n---\n\n# Mine\n\nWords of my own.\n"


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("arch", ["distilbert", "vit", "llama"])
def test_a_saved_adapter_has_a_card_that_loads_it(tuner, arch, tmp_path: Path):
    base = zoo.build(arch)
    base.name_or_path = base.config._name_or_path = "somebody/base"
    config = TUNERS[tuner].config(task_type=zoo.ZOO[arch].task_type, init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "mine")
    card = card_in(tmp_path / "mine")
    data = card.data.to_dict()
    method = {"nas": "nas_lora"}.get(tuner.partition("-")[0], tuner.partition("-")[0])
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (
        *("peft", "somebody/base", "adapter"),
    )
    assert set(data["tags"]) == {method, "peft-learners", "transformers", "base_model:adapter:somebody/base"}
    classes = {
        "distilbert": "AutoModelForSequenceClassification",
        "vit": "ViTForImageClassification",
        "llama": "AutoModelForCausalLM",
    }
    labels = ", num_labels=2, ignore_mismatched_sizes=True" if arch != "llama" else ""
    assert (
        "import peft_learners  # first: it makes the adapter's type known to PEFT\n"
        "from peft import PeftModel\n"
        f"from transformers import {classes[arch]}\n\n"
        f'base = {classes[arch]}.from_pretrained("somebody/base"{labels})\n'
        'model = PeftModel.from_pretrained(base, "mine")  # this folder, or its id on the Hub\n'
    ) in card.text
    assert not is_boilerplate(card.text) and "- PEFT 0." in card.text


@pytest.mark.parametrize("make", [learner, far, nas])
def test_copies_of_a_saved_model_save_themselves(make, tmp_path: Path):
    model = make(init_weights=False)
    model.save_pretrained(tmp_path / "first")
    before = logits_of(model, zoo.inputs_of("distilbert", model))
    copies = {"deep": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model))}
    torch.save(model, tmp_path / "model.pt")
    copies["saved"] = torch.load(tmp_path / "model.pt", weights_only=False)
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None, "something holds the model: its memory is not freed when it is deleted"
    finally:
        gc.enable()
    for name, twin in copies.items():
        twin.peft_config["default"].base_model_name_or_path = f"somebody/{name}"
        twin.save_pretrained(tmp_path / name)
        assert card_in(tmp_path / name).data.base_model == f"somebody/{name}"
        again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / name)
        assert torch.equal(logits_of(again, zoo.inputs_of("distilbert", again)), before)


def test_a_shallow_copy_whose_model_is_gone_says_so(tmp_path: Path):
    model = learner(init_weights=False)
    model.save_pretrained(tmp_path)
    twin = copy.copy(model)
    copy.copy(model).save_pretrained(tmp_path)  # as long as the model lives
    del model
    with pytest.raises(ReferenceError, match=r"shallow copy of a PeftModel that is gone: make it with copy\.deepcopy"):
        twin.save_pretrained(tmp_path)


@pytest.mark.parametrize("make", [learner, far, nas])
def test_a_merged_model_has_no_trace(make, tmp_path: Path):
    plain = set(vars(zoo.build("distilbert")))
    model = make(init_weights=False)
    model.save_pretrained(tmp_path)
    assert set(vars(model.merge_and_unload())) == plain


def test_a_card_of_ones_own_in_the_folder_keeps_its_text_and_tags(tmp_path: Path):
    model = learner(init_weights=False)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "README.md").write_bytes(OWN_README)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = card_in(tmp_path)
        assert card.text.startswith("\n# Mine\n\nWords of my own.") and card.text.count("import peft_learners") == 1
        assert card.data.license == "mit" and {"by-hand", "learner", "peft-learners"} <= set(card.data.tags)


def test_the_template_of_the_hub_is_filled_in_where_it_asks_for_code(tmp_path: Path):
    model = learner(init_weights=False)
    text = ModelCard.from_template(ModelCard("---\n{}\n---\n").data, model_description="About it.").content
    (tmp_path / "README.md").write_text(text)
    model.save_pretrained(tmp_path)
    text = card_in(tmp_path).text
    start = text.index("## How to Get Started with the Model")
    assert "About it." in text and start < text.index("import peft_learners") < text.index("## Training Details")


def on_local_base(tmp_path: Path) -> tuple[PeftModel, Path]:
    zoo.build("distilbert").save_pretrained(tmp_path / "local-base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "local-base")
    return get_peft_model(base, LearnerConfig(r=2, task_type="SEQ_CLS", init_weights=False)), tmp_path / "local-base"


def test_a_card_on_disk_keeps_a_local_base_model_as_peft_has_it(tmp_path: Path):
    model, base = on_local_base(tmp_path)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        card = card_in(folder)
        assert card.data.base_model == str(base) and str(base) not in card.text
        assert set(card.data.tags) == {"learner", "peft-learners", "transformers"}
        assert 'from_pretrained("local-base", num_labels=2, ignore_mismatched_sizes=True)' in card.text


@pytest.mark.parametrize("gone", [False, True])
def test_trainers_card_names_no_local_folder(tmp_path: Path, gone):
    model, base = on_local_base(tmp_path)
    run = trainer(model, arguments(tmp_path / "run"))
    run.save_model()
    if gone:  # then Trainer takes its name for an id
        base.rename(tmp_path / "moved")
    run.create_model_card(tags="mine", dataset_tags="somebody/data")
    card = card_in(tmp_path / "run")
    assert str(tmp_path) not in card.content and "base_model" not in card.data.to_dict()
    assert {"mine", "generated_from_trainer", "learner", "peft-learners"} <= set(card.data.tags)
    assert card.data.datasets == ["somebody/data"] and card.data.library_name == "peft"
    assert ("fine-tuned version of `local-base`" in card.text) == gone
    with pytest.warns(UserWarning, match=r"names the local folder .*base_model_name_or_path = \"OWNER/NAME\""):
        run.callback_handler.on_push_begin(run.args, run.state, run.control)
    assert str(tmp_path) not in card_in(tmp_path / "run").content


def test_a_second_adapter_is_shown_with_its_folder(tmp_path: Path):
    model = learner(init_weights=False)
    model.add_adapter("second", LearnerConfig(r=2, init_weights=False, task_type="SEQ_CLS"))
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert 'subfolder="second")' in card_in(tmp_path).text
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, subfolder="second")
    inputs = zoo.inputs_of("distilbert", again)
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_a_model_that_is_none_of_transformers(tmp_path: Path):
    base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = LearnerConfig(r=2, priming_epochs=0, target_modules=["0"], init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert "base_model" not in card.data.to_dict() and "base = ...  # the model it was made for" in card.text
    assert set(card.data.tags) == {"learner", "peft-learners"}


def test_names_of_models(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased", "a/b.c_d-e"):
        assert is_hub_id(name) and short_name(name) == name
    for name in (
        "/a/b",
        "./b",
        "~/b",
        "../b",
        "a/./b",
        r"C:\models\b",
        "C:/b",
        "here/model",
        "x/y/b",
        str(tmp_path / "b"),
    ):
        assert not is_hub_id(name)
        assert short_name(name) == ("model" if name == "here/model" else "b")
    assert not is_hub_id("") and not is_hub_id(None)
