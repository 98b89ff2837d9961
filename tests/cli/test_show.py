"""`peft-learners show`: an adapter of any method, in any of its phases, told from its files alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from console import refused, said
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training import sgd

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.cli import show

QUERY, OUTPUT = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"


def saved(folder: Path, config: Any, steps: int) -> PeftModel:
    """An adapter that has made so many steps, with noise after each, saved to `folder`."""
    torch.manual_seed(0)
    model = get_peft_model(zoo.build("bert"), config)
    model.peft_config["default"].base_model_name_or_path = "somebody/bert"
    model.base_model.set_schedule(total_steps=5, optimizer=sgd(model))
    for step in range(steps + 1):
        if step:
            model.base_model.update_and_allocate(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def shown(folder: Path) -> dict[str, Any]:
    return json.loads(said("show", folder, "--json"))


def row_of(found: dict[str, Any], module: str, **more: str) -> dict[str, Any]:
    (row,) = [row for row in found["modules"] if {"module": module, **more}.items() <= row.items()]
    return row


def learner(**more: Any) -> LearnerConfig:
    return LearnerConfig(**{"r": 4, "priming_steps": 1, "task_type": "SEQ_CLS", **more})


def far(**more: Any) -> FARConfig:
    return FARConfig(**{"priming_steps": 1, "retention_ratio": 0.25, "task_type": "SEQ_CLS", **more})


def nas(**more: Any) -> NASLoRAConfig:
    return NASLoRAConfig(**{"r": 4, "search_steps": 1, "criterion": "random", "task_type": "SEQ_CLS", **more})


#: Configs, steps, and the states of their phases then.
STATES: dict[str, tuple[Any, int, dict[str, str]]] = {
    "learner-priming": (learner, 0, {"priming": "current", "learning": "to come"}),
    "learner-primed": (learner, 1, {"priming": "done", "learning": "current"}),
    "learner-unprimed": (lambda: learner(priming_steps=0), 1, {"learning": "current"}),
    "learner-folded": (lambda: learner(after_priming="fold"), 1, {"priming": "done", "learning": "current"}),
    "far-priming": (far, 0, {"priming": "current", "reconfigured": "to come"}),
    "far": (far, 1, {"priming": "done", "reconfigured": "current"}),
    "far-discard": (lambda: far(discard_unkept=True), 1, {"priming": "done", "reconfigured": "current"}),
    "nas-search": (nas, 0, {"search": "current", "retraining": "to come"}),
    "nas-round": (
        lambda: nas(rounds=2),
        1,
        {"search_1": "done", "search_2": "current", "retraining": "to come"},
    ),
    "nas": (nas, 1, {"search": "done", "retraining": "current"}),
    "nas-structured": (lambda: nas(granularity="structured"), 1, {"search": "done", "retraining": "current"}),
    "bottleneck": (lambda: BottleneckConfig(bottleneck_dim=4, task_type="SEQ_CLS"), 1, {"training": "current"}),
}


@pytest.mark.filterwarnings("ignore:Folding the adapter")
@pytest.mark.parametrize("name", STATES)
def test_every_state(name, tmp_path: Path):
    """What is shown is what the files hold and what the model counts, without the base model."""
    make, steps, states = STATES[name]
    model = saved(tmp_path, make(), steps)
    found = shown(tmp_path)
    assert found["method"] == model.peft_config["default"].method
    assert {phase["name"]: phase["state"] for phase in found["phases"]} == states
    (current,) = [phase for phase in found["phases"] if phase["state"] == "current"]
    assert current["trained_parameters"] == model.get_nb_trainable_parameters()[0]
    assert found["base_model"] == {
        "name": "somebody/bert",
        "revision": None,
        "class": "AutoModelForSequenceClassification",
        "num_labels": 2,
    }
    weights = load_file(tmp_path / "adapter_model.safetensors")
    floats = sum(value.numel() for value in weights.values() if value.is_floating_point())
    assert found["file"]["values"]["float32"] == floats
    assert found["file"]["bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found["trained_whole"] == {"classifier": 2 * 16 + 2}
    text = said("show", tmp_path)
    for phase, state in states.items():
        assert re.search(rf"^{phase} +{state} ", text, re.M)
    assert "somebody/bert" in text and "AutoModelForSequenceClassification, num_labels=2" in text


def test_learner_rows(tmp_path: Path):
    """Ranks by module and, of a folded Learner, the energy that its layers kept."""
    model = saved(tmp_path / "primed", learner(rank_pattern={"output.dense": 3}), 1)
    found = shown(tmp_path / "primed")
    # 16 x 16, and 4 ranks of 16 + 16, and 16 biases
    assert row_of(found, QUERY) == {"module": QUERY, "parameters": 256 + 128 + 16, "rank": 4, "primed": True}
    assert row_of(found, OUTPUT) == {"module": OUTPUT, "parameters": 3 * (32 + 16) + 16, "rank": 3, "primed": False}
    assert found["kept_energy"] is None and "kept energy" not in said("show", tmp_path / "primed")

    with pytest.warns(UserWarning, match="Folding the adapter"):
        fields = {"priming_lr_scale": 1.0, "after_priming": "fold", "rank_pattern": {"0.attention.self.value": 2}}
        model = saved(tmp_path / "folded", learner(**fields), 1)
    found, config = shown(tmp_path / "folded"), model.peft_config["default"]
    assert {
        row["module"]: row["kept_energy"] for row in found["modules"] if "kept_energy" in row
    } == config.kept_energy
    for row in found["modules"]:
        layer = model.base_model.model.get_submodule(row["module"])
        assert row.get("rank") == getattr(layer, "learner_r", {}).get("default")
    least = min(config.kept_energy, key=config.kept_energy.get)
    text = said("show", tmp_path / "folded")
    assert f"least {config.kept_energy[least]:.1%} ({least}), median" in text
    values = [row_of(found, f"bert.encoder.layer.{i}.attention.self.value") for i in (0, 1)]
    assert [row["rank"] for row in values] == [2, 4]
    low, high = sorted(row["kept_energy"] for row in values)
    line = rf"^attention.self.value +2 +2 to 4 +2 of 2 +{low:.1%} to {high:.1%} "
    assert re.search(line, text, re.M)


@pytest.mark.parametrize("granularity,kept,of", [("hidden_unit", (8, 8), (32, 32)), ("output_node", (8, 4), (32, 16))])
def test_far_nodes(granularity, kept, of, tmp_path: Path):
    """Nodes that are kept, of how many; a file without the others does not tell."""
    modules = [f"bert.encoder.layer.0.{name}.dense" for name in ("intermediate", "output")]
    saved(tmp_path, far(granularity=granularity), 1)
    rows = [row_of(shown(tmp_path), module) for module in modules]
    assert tuple(row["nodes"] for row in rows) == kept and tuple(row["of_nodes"] for row in rows) == of
    text = said("show", tmp_path)
    assert re.search(rf"^output.dense +2 +{kept[1]} +{of[1]} ", text, re.M) and "25.0% of the nodes" in text
    saved(tmp_path, far(granularity=granularity, retention_ratio=0.0), 1)
    rows = [row_of(shown(tmp_path), module) for module in modules]
    assert [row["nodes"] for row in rows] == [0, 0] and tuple(row["of_nodes"] for row in rows) == of
    saved(tmp_path, far(granularity=granularity, discard_unkept=True), 1)
    assert [row_of(shown(tmp_path), module)["of_nodes"] for module in modules] == [None, None]
    assert re.search(rf"^output.dense +2 +{kept[1]} +\? ", said("show", tmp_path), re.M)


@pytest.mark.parametrize("granularity", ["structured", "unstructured"])
def test_nas_lora_updates(granularity, tmp_path: Path):
    """Of each update what is kept of the search space, and all together."""
    model = saved(tmp_path, nas(granularity=granularity, parameter_budget=300), 1)
    found, architecture = shown(tmp_path), model.base_model.architecture()
    for row in architecture.rows():
        own = row_of(found, str(row["module"]), kind=str(row["kind"]))
        assert (own["parameters"], own["of_parameters"]) == (row["parameters"], row["of"])
        assert own.get("rank") == row.get("rank")
    assert found["kept"] == {"what": "parameters", "kept": architecture.kept, "of": 1856}
    assert f"{architecture.kept / 1856:.1%} of the parameters ({architecture.kept} of 1,856)" in said("show", tmp_path)


def test_other_methods_and_models(tmp_path: Path):
    """A base model without blocks, or one that is not named, and weights in half."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = learner(priming_steps=0, target_modules=["0"], task_type=None, save_dtype="bfloat16")
    get_peft_model(base, config).save_pretrained(tmp_path)
    found = shown(tmp_path)
    assert found["base_model"] == {"name": None, "revision": None, "class": None, "num_labels": None}
    assert found["file"]["values"] == {"bfloat16": 4 * (4 + 8) + 8}
    assert "not named in the config" in said("show", tmp_path)
    assert [phase["steps"] for phase in found["phases"]] == [None]


def test_names_as_people_write_them(tmp_path: Path, monkeypatch):
    """A folder may be given in any form, and an adapter that is not the first one of a model by its own folder."""
    monkeypatch.chdir(tmp_path)
    model = saved(Path("mine"), learner(), 1)
    model.add_adapter("second", learner(r=2))
    model.save_pretrained("both")
    assert row_of(shown(Path("both/second")), QUERY)["rank"] == 2
    for name in ("mine", "./mine", "mine/", str(tmp_path / "mine")):
        assert said("show", name).startswith(f"{name}: Learner adapter\n")


def test_refusals(tmp_path: Path, monkeypatch):
    """What is no adapter of ours is one sentence and status 2."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    kinds = "must be the folder of a saved Learner, FAR, NAS-LoRA or bottleneck adapter, but"
    assert refused("show", "nothing") == (
        "There is no folder nothing. The id of an adapter on the Hub has the form OWNER/NAME."
    )
    assert refused("show", "runs/nothing") == "There is no folder runs/nothing, and the Hub can't be reached for it."
    assert refused("show", "empty") == f"empty {kinds} it holds no adapter_config.json."
    get_peft_model(zoo.build("bert"), LoraConfig(target_modules=["query"])).save_pretrained("lora")
    assert refused("show", "lora") == f"lora {kinds} it holds an adapter of type LORA."
    zoo.build("bert").save_pretrained("model")
    assert refused("show", "model") == f"model {kinds} it holds no adapter_config.json."
    saved(Path("mine"), learner(), 1)
    shutil.copytree("mine", "no-weights")
    Path("no-weights/adapter_model.safetensors").unlink()
    assert refused("show", "no-weights") == f"no-weights {kinds} it holds no adapter_model.safetensors."
    Path("mine/adapter_model.safetensors").write_bytes(b"half a file")
    assert refused("show", "mine").startswith("mine/adapter_model.safetensors is damaged (")
    config = Path("mine/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": -1}))
    assert "`r` must be a whole number of at least 1" in refused("show", "mine")


def test_parameters_add_up(tmp_path: Path):
    """Rows and what is trained whole are all that there is."""
    saved(tmp_path, learner(), 0)
    found = shown(tmp_path)
    values = load_file(tmp_path / "adapter_model.safetensors").values()
    rows = sum(row["parameters"] for row in found["modules"])
    assert rows + sum(found["trained_whole"].values()) == sum(math.prod(value.shape) for value in values)


def test_example_in_docs():
    """The example on the page is what the committed JSON is shown as."""
    root = Path(__file__).resolve().parents[2]
    found = json.loads((root / "results/commands/show-my-learner.json").read_text())
    page = (root / "docs/commands.md").read_text()
    assert f"```console\n$ peft-learners show my-learner\n{show.text_of(found)}\n```\n" in page
