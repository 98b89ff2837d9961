"""The README.md that saving an adapter leaves: short and right, never over a text of the user's own."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch
import zoo
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from training import arguments, far, learner, nas, trainer
from transformers import AutoModelForSequenceClassification
from tuners import TUNERS
from zoo import logits_of

from peft_learners import LearnerConfig, NASLoRAConfig
from peft_learners.hub import write_card
from peft_learners.hub.short_card import is_hub_id, is_untouched, short_name

OWN_README = b"---\nlicense: mit\ntags:\n- by-hand\n---\n\n# Mine\n\nWords of my own.\n"


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("arch", ["distilbert", "vit", "llama"])
def test_saved_readme(tuner, arch, tmp_path: Path):
    """It says what the adapter is, and how it is loaded."""
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
    assert is_untouched(card.text) and "- PEFT 0." in card.text and "[More Information Needed]" not in card.text


@pytest.mark.parametrize("make", [learner, far, nas])
def test_copies_save_themselves(make, tmp_path: Path):
    """Copies of a model that has been saved save what they are, and nothing holds the model itself."""
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
        card = card_in(tmp_path / name)
        assert (
            card.data.base_model == f"somebody/{name}"
            and f'from_pretrained("somebody/{name}", num_labels=2' in card.text
        )
        again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / name)
        assert torch.equal(logits_of(again, zoo.inputs_of("distilbert", again)), before)


def test_shallow_copy_saves(tmp_path: Path):
    """A shallow copy saves, also when the model that it was made from is gone."""
    model = learner(init_weights=False)
    model.save_pretrained(tmp_path / "one")
    twin = copy.copy(model)
    del model
    gc.collect()
    twin.save_pretrained(tmp_path / "two")
    one, two = (card_in(tmp_path / name).text.splitlines() for name in ("one", "two"))
    changed = [line for line, other in zip(one, two, strict=True) if line != other]
    assert len(changed) == 3 and all("Written by" in line or "one" in line for line in changed)


@pytest.mark.parametrize("make", [learner, far, nas])
def test_saving_sets_no_attribute(make, tmp_path: Path):
    """Neither the model nor its parts have more attributes when they have been saved and Trainer began a push."""
    model = make(init_weights=False)
    run = trainer(model, arguments(tmp_path / "run"))
    before = {name: set(vars(part)) for name, part in [("", model), *model.named_modules()]}
    model.save_pretrained(tmp_path)
    run.callback_handler.on_push_begin(run.args, run.state, run.control)
    assert {name: set(vars(part)) for name, part in [("", model), *model.named_modules()]} == before


@pytest.mark.parametrize("make", [learner, far, nas])
def test_merged_model_has_no_trace(make, tmp_path: Path):
    plain = set(vars(zoo.build("distilbert")))
    model = make(init_weights=False)
    model.save_pretrained(tmp_path)
    assert set(vars(model.merge_and_unload())) == plain


def test_own_readme_stays(tmp_path: Path):
    """A README.md of the user's is as PEFT leaves it for any adapter."""
    lora = get_peft_model(zoo.build("distilbert"), LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"]))
    for name, model in (("lora", lora), ("ours", learner(init_weights=False))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_bytes(OWN_README)
        for _ in range(2):
            model.save_pretrained(tmp_path / name)
    assert card_in(tmp_path / "ours").text == card_in(tmp_path / "lora").text
    assert card_in(tmp_path / "ours").text.startswith("\n# Mine\n\nWords of my own.\n")


@pytest.mark.parametrize("line", ["- PEFT 0.21", "# this folder", "## Use", "# first"])
def test_changed_readme_stays(line, tmp_path: Path):
    """A word of the user's anywhere in what was written keeps the next save from writing it again."""
    model, readme = learner(init_weights=False), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    changed = readme.read_text().replace(line, f"My own word. {line}")
    readme.write_text(changed)
    model.peft_config["default"].base_model_name_or_path = "somebody/else"
    model.save_pretrained(tmp_path)
    assert "My own word." in readme.read_text() and "somebody/else" not in readme.read_text()


def test_untouched_readme_is_renewed(tmp_path: Path):
    """What nobody changed tells of the last save; PEFT's template is replaced, one that says something is not."""
    model, readme = learner(init_weights=False), tmp_path / "README.md"
    for name in ("somebody/base", "somebody/else"):
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(tmp_path)
        assert card_in(tmp_path).data.base_model == name and f'from_pretrained("{name}", ' in readme.read_text()
    assert "somebody/base" not in readme.read_text()
    header = ModelCard("---\n{}\n---\n").data
    readme.write_text(ModelCard.from_template(header).content)
    model.save_pretrained(tmp_path)
    assert "import peft_learners" in readme.read_text()
    readme.write_text(ModelCard.from_template(header, model_description="About it.").content)
    model.save_pretrained(tmp_path)
    assert "About it." in readme.read_text() and "import peft_learners" not in readme.read_text()


def test_readme_after_add_adapter(tmp_path: Path):
    """transformers' `save_pretrained` writes no card, and the weights last: older ones tell of another head."""
    zoo.build("distilbert").save_pretrained(tmp_path / "base")
    for classes in (3, 5):
        base = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=classes, ignore_mismatched_sizes=True
        )
        base.add_adapter(LearnerConfig(r=2, priming_epochs=0, init_weights=False, task_type="SEQ_CLS"), "mine")
        base.save_pretrained(tmp_path / "adapter")
    card = card_in(tmp_path / "adapter")
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["learner", "peft-learners"]}
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names: dict = {}
    exec(
        code.replace('"base"', repr(str(tmp_path / "base"))).replace('"adapter"', repr(str(tmp_path / "adapter"))),
        names,
    )
    inputs = zoo.inputs_of("distilbert", base)
    assert torch.equal(logits_of(names["model"].eval(), inputs), logits_of(base.eval(), inputs))


def test_unreadable_readme_stays(tmp_path: Path):
    """transformers writes the weights after the config: a README.md with a broken header does not stop it."""
    base = zoo.build("distilbert")
    base.add_adapter(LearnerConfig(r=2, priming_epochs=0, init_weights=False, task_type="SEQ_CLS"))
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\n")
    base.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "---\ntags: [a\n---\n"
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_no_readme_without_adapter(tmp_path: Path):
    """Neither ranks other than the main one nor a config that is no adapter's write anything."""
    learner(init_weights=False).save_pretrained(tmp_path / "rank 1", is_main_process=False)
    LearnerConfig().save_pretrained(tmp_path / "config")
    assert not list(tmp_path.glob("*/README.md")) and not list((tmp_path / "rank 1").iterdir())
    learner(init_weights=False).save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_bytes()
    NASLoRAConfig().save_pretrained(tmp_path / "config")
    assert (tmp_path / "README.md").read_bytes() == before and not (tmp_path / "config" / "README.md").exists()


def test_readme_beside_pickled_weights(tmp_path: Path):
    model = learner(init_weights=False)
    model.peft_config["default"].base_model_name_or_path = "somebody/base"
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "num_labels=2" in card_in(tmp_path).text


def test_readme_of_unnamed_method(tmp_path: Path, monkeypatch):
    """A config class that says nothing for cards is called by its own name."""
    for name in ("display_name", "about", "trained_by_phase", "card_sections"):
        monkeypatch.delattr(NASLoRAConfig, name)
    nas(init_weights=False).save_pretrained(tmp_path)
    assert "A NASLoRA adapter" in card_in(tmp_path).text
    card = write_card(tmp_path, base_model="somebody/base")
    assert "A NASLoRA adapter of `somebody/base`, made with peft-learners, a plugin for PEFT.\n\n## Use" in card.text
    assert "| search | from ? | not in the file |" in card.text and "nas_lora" in card.data.tags


def on_local_base(tmp_path: Path) -> tuple[PeftModel, Path]:
    zoo.build("distilbert").save_pretrained(tmp_path / "local-base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "local-base")
    return get_peft_model(base, LearnerConfig(r=2, task_type="SEQ_CLS", init_weights=False)), tmp_path / "local-base"


def test_readme_names_no_local_folder(tmp_path: Path):
    """Not after a second save either, for which PEFT writes the folder into the header of what is there."""
    model, base = on_local_base(tmp_path)
    for folder in (tmp_path / "first", tmp_path / "second", tmp_path / "second"):
        model.save_pretrained(folder)
        card = card_in(folder)
        assert str(base) not in card.content and "base_model" not in card.data.to_dict()
        assert set(card.data.tags) == {"learner", "peft-learners", "transformers"}
        assert 'from_pretrained("local-base", num_labels=2, ignore_mismatched_sizes=True)' in card.text


def test_own_header_names_no_local_folder(tmp_path: Path):
    """Neither does that of a card which the user or Trainer wrote, into which PEFT writes it."""
    model, base = on_local_base(tmp_path)
    run = trainer(model, arguments(tmp_path / "run"))
    run.save_model()
    run.create_model_card(language="de")
    written = card_in(tmp_path / "run")
    assert written.data.base_model == str(base) and f"base_model:adapter:{base}" in written.data.tags
    run.save_model()
    card = card_in(tmp_path / "run")
    assert str(base) not in card.content and "base_model" not in card.data.to_dict()
    assert card.data.language == ["de"] and card.text == written.text and "transformers" in card.data.tags


def test_push_warns_of_local_base(tmp_path: Path):
    """And writes nothing: the card of a push is Trainer's own (docs/hub.md)."""
    model, _ = on_local_base(tmp_path)
    run = trainer(model, arguments(tmp_path / "run"))
    run.save_model()
    before = (tmp_path / "run" / "README.md").read_bytes()
    with pytest.warns(UserWarning, match=r"names the local folder .*base_model_name_or_path = \"OWNER/NAME\""):
        run.callback_handler.on_push_begin(run.args, run.state, run.control)
    assert (tmp_path / "run" / "README.md").read_bytes() == before
    run.create_model_card(tags="mine")
    trainers = (tmp_path / "run" / "README.md").read_text()
    run.save_model()
    assert card_in(tmp_path / "run").text == ModelCard(trainers).text


def test_readme_of_second_adapter(tmp_path: Path):
    """It is shown with its folder, unless the folder of the README.md holds an adapter of ours itself."""
    model = learner(init_weights=False)
    model.add_adapter("second", LearnerConfig(r=2, init_weights=False, task_type="SEQ_CLS"))
    model.set_adapter("second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert 'subfolder="second")' in card_in(tmp_path).text
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, subfolder="second")
    inputs = zoo.inputs_of("distilbert", again)
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    model.save_pretrained(tmp_path / "both")
    text = card_in(tmp_path / "both").text.rstrip()
    model.base_model.model.name_or_path = model.base_model.model.config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    card = card_in(tmp_path / "both")
    assert card.text.rstrip() == text and "subfolder" not in text and "base_model" not in card.data.to_dict()


def test_readme_of_other_models(tmp_path: Path):
    base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = LearnerConfig(r=2, priming_epochs=0, target_modules=["0"], init_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert "base_model" not in card.data.to_dict() and "base = ...  # the model it was made for" in card.text
    assert set(card.data.tags) == {"learner", "peft-learners"}


def test_model_names(tmp_path: Path, monkeypatch):
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
