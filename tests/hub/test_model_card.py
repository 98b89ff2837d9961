"""Whole cards (`peft-learners card`, `scripts.glue.card`): they parse and say what the files say, their code loads."""

import json
import re
from pathlib import Path

import pytest
import torch
import zoo
from archive import single_run
from console import refused, said
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from training import sgd
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.hub.full_card import read_adapter
from scripts.glue.card import main as write_glue_card
from scripts.glue.card import metrics_of
from scripts.glue.methods import METHODS as METHOD_ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "far": lambda **more: FARConfig(**{"priming_steps": 1, "retention_ratio": 0.25, "task_type": "SEQ_CLS", **more}),
    "learner": lambda **more: LearnerConfig(**{"r": 4, "priming_steps": 1, "task_type": "SEQ_CLS", **more}),
    "nas_lora": lambda **more: NASLoRAConfig(
        **{"r": 4, "search_steps": 1, "criterion": "random", "task_type": "SEQ_CLS", **more}
    ),
    "bottleneck": lambda **more: BottleneckConfig(**{"bottleneck_dim": 4, "task_type": "SEQ_CLS", **more}),
}
METHODS = list(CONFIGS)
RECORD = single_run("mrpc-learner-r64-minilm-seed0")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: it holds the base model, tiny-bert, which has no head."""
    monkeypatch.chdir(tmp_path)
    zoo.build("bert").bert.save_pretrained("tiny-bert")
    return tmp_path


def saved(method: str, *, steps: int = 1, classes: int = 2, config=None, **settings) -> torch.nn.Module:
    """An adapter with noise in all its weights, in `my-adapter` beside its base model."""
    base = AutoModelForSequenceClassification.from_pretrained(Path("tiny-bert").resolve(), num_labels=classes)
    model = get_peft_model(base, config or CONFIGS[method](**settings))
    model.base_model.set_schedule(total_steps=5, optimizer=sgd(model))
    torch.manual_seed(0)
    add_noise(model)
    for step in range(1, steps + 1):
        model.base_model.update_and_allocate(step)
    add_noise(model)  # NAS-LoRA has gone back to its initial values
    model.save_pretrained("my-adapter")
    return model.eval()


def add_noise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def results(method: str, **config) -> dict:
    """A record as `scripts.glue.train` writes it, of the tiny adapters above."""
    arguments = METHOD_ARGUMENTS[method].arguments
    kept = {k: v for k, v in RECORD["config"].items() if k not in ("r", "priming_epochs", "priming_lr_scale")}
    fields = CONFIGS[method]().to_dict()
    given = {k: fields[k.removeprefix("nas_")] for k in arguments if k.removeprefix("nas_") in fields}
    return {**RECORD, "method": method, "model": "tiny-bert", "config": {**kept, **given, **config}}


def write(value: dict) -> str:
    Path("results.json").write_text(json.dumps(value))
    return "results.json"


def card_of(*arguments: str) -> ModelCard:
    """The card that `peft-learners card` writes."""
    said("card", "my-adapter", *arguments)
    return ModelCard.load("my-adapter/README.md")


def glue_card_of(record: dict) -> ModelCard:
    """The card that `scripts.glue.card` writes, with the results of a run."""
    write_glue_card(["my-adapter", write(record)])
    return ModelCard.load("my-adapter/README.md")


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_card_code_loads(method, classes):
    """The code of the card gives the same logits."""
    model = saved(method, classes=classes)
    (code,) = re.findall(r"```python\n(.*?)```", card_of().content, re.S)
    assert code.startswith("import peft_learners")
    names: dict = {}
    exec(code, names)  # merges last, so that what is looked at is both loaded and merged
    inputs = {k: v for k, v in zoo.inputs_of("bert", model).items() if k != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert expected.shape == (zoo.ROWS, classes)
        assert ("merged" in names) == (method != "bottleneck")
        if "merged" in names:
            torch.testing.assert_close(names["merged"](**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        exec(code.partition("merged =")[0], names)
        assert torch.equal(names["model"](**inputs).logits, expected)


def test_base_beside_adapter(folder, monkeypatch):
    """A base model that lies beside the adapter is no id on the Hub."""
    (folder / "here/models").mkdir(parents=True)
    (folder / "tiny-bert").rename(folder / "here/models/tiny-local")
    monkeypatch.chdir(folder / "here")
    base = AutoModelForSequenceClassification.from_pretrained("models/tiny-local")
    get_peft_model(base, CONFIGS["learner"]()).save_pretrained("ad")
    monkeypatch.chdir(folder)
    (folder / "models").mkdir()  # what is above may hold anything
    adapter = read_adapter(Path("here/ad"))
    assert (adapter.base, adapter.base_id) == ("tiny-local", None)
    assert read_adapter(Path("here/ad"), "models/tiny-local").base_id == "models/tiny-local"
    (folder / "here/models/tiny-local/config.json").unlink()
    assert read_adapter(Path("here/ad")).base_id == "models/tiny-local"


@pytest.mark.parametrize("method", METHODS)
def test_card_header(method):
    saved(method)
    data = card_of().data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-classification"
    # "transformers" is PEFT's, of the README.md that saving wrote
    assert data["tags"] == sorted(["peft", "peft-learners", method, "transformers"]) and "model-index" not in data
    assert "base_model" not in data and "base_model_relation" not in data  # it is a local folder
    data = card_of("--base-model", "somebody/tiny-bert").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("somebody/tiny-bert", "adapter")
    assert data["tags"] == sorted([*card_tags(method), "base_model:adapter:somebody/tiny-bert"])


def card_tags(method: str) -> list[str]:
    return ["peft", "peft-learners", method, "transformers"]


def test_header_is_kept():
    """What saving and the user wrote into the header stays; results go with the text that told of them."""
    saved("far")
    readme = Path("my-adapter/README.md")
    mine = {"license": "mit", "language": "de", "pipeline_tag": "text-ranking", "datasets": ["me/data"], "by": "me"}
    card = ModelCard.load(readme)
    for key, value in {**mine, "tags": [*card.data.tags, "by-hand"], "metrics": ["accuracy"]}.items():
        card.data[key] = value
    card.save(readme)
    found = glue_card_of(results("far")).data
    assert found.metrics == ["accuracy", "f1"] and found.datasets == ["nyu-mll/glue"] and found.eval_results
    data = card_of().data.to_dict()
    assert {key: data[key] for key in mine} == {**mine, "datasets": ["nyu-mll/glue"]} and "by-hand" in data["tags"]
    assert "metrics" not in data and "model-index" not in data
    readme.write_text("---\ntags: [a\n---\n")
    assert card_of().data.pipeline_tag == "text-classification"  # of a header that can't be read nothing is kept


def test_card_pipeline_of_task():
    """PEFT writes `pipeline_tag` for causal models alone: it stays, and other tasks get theirs."""
    zoo.build("llama").save_pretrained("tiny-llama")
    base = AutoModelForCausalLM.from_pretrained(Path("tiny-llama").resolve())
    get_peft_model(base, CONFIGS["learner"](task_type="CAUSAL_LM")).save_pretrained("my-adapter")
    before = ModelCard.load("my-adapter/README.md").data
    assert before.pipeline_tag == card_of().data.pipeline_tag == "text-generation"
    vectors = get_peft_model(zoo.build("bert").bert, CONFIGS["learner"](task_type="FEATURE_EXTRACTION"))
    vectors.save_pretrained("vectors")
    said("card", "vectors", "--base-model", "somebody/tiny-bert")
    assert ModelCard.load("vectors/README.md").data.pipeline_tag == "feature-extraction"


def test_base_not_an_id():
    saved("far")
    for name in ("./tiny-bert", "/models/tiny-bert", "tiny-bert"):
        sentence = f"--base-model must be the id of a model on the Hub (OWNER/NAME), got {name!r}."
        assert refused("card", "my-adapter", "--base-model", name) == sentence


@pytest.mark.parametrize("method", METHODS)
def test_card_results(method, folder):
    """Results are in header and body."""
    saved(method)
    card = glue_card_of(results(method))
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found == {"accuracy": RECORD["final"]["eval_accuracy"], "f1": RECORD["final"]["eval_f1"]}
    (dataset,) = {(r.dataset_type, r.dataset_config, r.dataset_split, r.task_type) for r in card.data.eval_results}
    assert dataset == ("nyu-mll/glue", "mrpc", "validation", "text-classification")
    assert card.data.model_name == "my-adapter"
    assert (card.data.datasets, card.data.metrics) == (["nyu-mll/glue"], ["accuracy", "f1"])
    # 75.0 / 83.6 in the README
    assert "| validation | 408 | accuracy | 75.0 |" in card.content
    assert "| validation | 408 | f1 | 83.6 |" in card.content
    assert "0: not_equivalent, 1: equivalent" in card.content
    assert "one seed (0)" in card.content and str(folder) not in card.content


def test_far_counts_from_file():
    d, h, layers, kept = 16, 32, 2, 8
    model = saved("far")
    total = sum(p.numel() for p in zoo.build("bert").parameters())
    after = total - layers * (h - kept) * (d + 1 + d)
    assert after == model.get_nb_trainable_parameters()[0]
    text = card_of().content
    assert f"| priming | 0 to 1 | {total:,} |" in text and f"| reconfigured | from 1 | {after:,} |" in text
    saved("far", discard_unkept=True)
    text = card_of().content
    assert "| priming | 0 to 1 | not in the file |" in text and f"| reconfigured | from 1 | {after:,} |" in text
    with pytest.warns(UserWarning, match="never driven"):
        saved("far", steps=0)
    text = card_of().content
    assert f"| priming | 0 to 1 | {total:,} |" in text and "saved before its last phase began" in text


def test_learner_counts_from_file():
    d, layers = 16, 2
    after = saved("learner").get_nb_trainable_parameters()[0]
    text = card_of().content
    # four linear layers of the attention, d x d each
    assert f"| priming | 0 to 1 | {after + layers * 4 * d * d:,} |" in text
    assert f"| learning | from 1 | {after:,} |" in text


#: Of NAS-LoRA's search space on the tiny model with rank 4. Low-rank: query, key and the attention's output (16 + 16),
#: both of the FFN (16 + 32), in two layers. Biases: of all linear layers and norms, those outside the blocks too.
LOW_RANK = 4 * 2 * (3 * (16 + 16) + 2 * (16 + 32))
BIASES = 2 * (4 * 16 + 32 + 16 + 2 * 16) + 16 + 16
SPACE, HEAD = LOW_RANK + BIASES, 2 * 16 + 2


@pytest.mark.parametrize("granularity", ["unstructured", "structured"])
def test_nas_lora_kept(granularity):
    model = saved("nas_lora", granularity=granularity, parameter_budget=300)
    rows = model.base_model.architecture().rows()
    kept = model.get_nb_trainable_parameters()[0] - HEAD
    assert SPACE == 1856 and (kept == 300 if granularity == "unstructured" else 300 - 48 < kept <= 300)
    text = card_of().content
    assert "[Lawton et al., 2023](https://arxiv.org/abs/2305.16597)" in text
    assert f"| search | 0 to 1 | {SPACE + HEAD:,} |" in text and f"| retraining | from 1 | {kept + HEAD:,} |" in text
    for kind, name, number, space in (
        ("low_rank", "low-rank updates", 10, LOW_RANK),
        ("bias", "biases", 18, BIASES),
    ):
        own = [row["parameters"] for row in rows if row["kind"] == kind]
        left, part = sum(size > 0 for size in own), sum(own)
        assert f"| {name} | {left} of {number} | {part:,} | {space:,} | {part / space:.1%} |" in text
    assert f"| all |  | {kept:,} | {SPACE:,} | {kept / SPACE:.1%} |" in text
    assert "The budget is 300 parameters. The head's 34 parameters are trained besides, and not counted" in text
    assert "found before" not in text


def test_nas_lora_kept_biases():
    saved("nas_lora", r=0, parameter_budget=0.25)
    text = card_of().content
    assert f"| {BIASES // 4} | {BIASES} | 25.0% |" in text and "low-rank updates |" not in text


def test_nas_lora_in_search():
    with pytest.warns(UserWarning, match="never driven"):
        saved("nas_lora", steps=0, rounds=2)
    text = card_of().content
    assert f"| search_1 | 0 to 1 | {SPACE + HEAD:,} |" in text and "| search_2 | 1 to 2 | not in the file |" in text
    assert "saved before its last phase began" in text and "## What is kept" not in text
    pruned = saved("nas_lora", rounds=2).get_nb_trainable_parameters()[0]
    text = card_of().content
    assert f"| search_1 | 0 to 1 | {SPACE + HEAD:,} |" in text and f"| search_2 | 1 to 2 | {pruned:,} |" in text
    assert "| retraining | from 2 | not in the file |" in text and "## What is kept" not in text


def test_nas_lora_found_before():
    """The card of an architecture that another search had found tells of the retraining alone."""
    first = saved("nas_lora", parameter_budget=300)
    saved("nas_lora", steps=0, config=NASLoRAConfig.from_architecture(first, task_type="SEQ_CLS"))
    text = card_of().content
    assert f"| retraining | from 0 | {300 + HEAD:,} |" in text and "| search |" not in text
    assert "not searched in this training, but found before" in text and "saved before its last" not in text


@pytest.mark.parametrize("method", METHODS)
def test_card_settings(method):
    """Settings that differ from the defaults are in a table, the method's own others below it."""
    saved(method, save_dtype="bfloat16")
    text = card_of().content
    own = {
        "far": ("`retention_ratio` | `0.25`", "`priming_steps` | `1`"),
        "learner": ("`r` | `4`", "`priming_steps` | `1`"),
        "nas_lora": ("`r` | `4`", "`search_steps` | `1`", "`criterion` | `'random'`"),
        "bottleneck": ("`bottleneck_dim` | `4`",),
    }[method]
    for row in (*own, "`save_dtype` | `'bfloat16'`"):
        assert f"| {row} |" in text
    assert "have their defaults, among them" in text
    for name in ("init_weights", "task_type", "completed_phases", "inference_mode", "reconfigured", "scaling"):
        assert f"`{name}`" not in text
    assert "`architecture`" not in text and "`pruned_rounds`" not in text
    assert ("`granularity='unstructured'`" in text) == (method == "nas_lora")


def test_card_cut_data():
    saved("far")
    text = glue_card_of(results("far", max_train_samples=1000)).content
    assert "only the first 1,000 rows of the training set" in text


@pytest.mark.parametrize(
    "change,said",
    [
        ({"method": "lora"}, "method: 'lora' there, 'far' here"),
        ({"config": {**RECORD["config"], "retention_ratio": 0.1}}, "retention_ratio: 0.1 there, 0.25 here"),
        ({"model": "another"}, "a run on another, the adapter's base model is tiny-bert"),
        ({"finished": False}, "must be the results file of a finished run"),
    ],
)
def test_results_of_other_run(change, said):
    saved("far")
    before = Path("my-adapter/README.md").read_text()
    with pytest.raises(SystemExit, match=re.escape(said)):
        glue_card_of({**results("far"), **change})
    assert Path("my-adapter/README.md").read_text() == before


@pytest.mark.parametrize(
    "change,said",
    [
        ({"nas_granularity": "structured"}, "granularity: 'structured' there, 'unstructured' here"),
        ({"parameter_budget": 0.25}, "parameter_budget: 0.25 there, 300 here"),
        ({"parameter_budget": 301.0}, "parameter_budget: 301 there, 300 here"),
        ({"r": 16}, "r: 16 there, 4 here"),
        ({"rounds": 2}, "rounds: 2 there, 1 here"),
        ({"search_epochs": 2.0}, "search_epochs: 2.0 there, None here"),
    ],
    ids=str,
)
def test_results_of_other_nas_run(change, said):
    saved("nas_lora", parameter_budget=300)
    right = {"parameter_budget": 300.0}  # a float, as the command line reads it
    assert "## Results" in glue_card_of(results("nas_lora", **right)).content
    with pytest.raises(SystemExit, match=re.escape(f"is of another adapter than my-adapter ({said})")):
        glue_card_of(results("nas_lora", **{**right, **change}))


def test_card_two_splits():
    final = {"eval_matched_loss": 1.0, "eval_matched_accuracy": 0.5, "eval_mismatched_accuracy": 0.25}
    found = metrics_of({"task": "mnli", "final": final})
    assert found == [("validation_matched", "accuracy", 0.5), ("validation_mismatched", "accuracy", 0.25)]
    saved("far")
    record = {**results("far"), "task": "mnli", "final": final, "rows": {"train": 9, "dev_matched": 4}}
    assert "| validation_matched | 4 | accuracy | 50.0 |" in glue_card_of(record).content


@pytest.mark.parametrize("method", METHODS)
def test_card_picture(method):
    """A picture is copied into the folder and shown."""
    saved(method)
    Path("nodes.png").write_bytes(b"picture")
    for picture in ("nodes.png", "my-adapter/nodes.png"):  # the second is there already
        assert "![Picture of the adapter](nodes.png)" in card_of("--picture", picture).content
        assert Path("my-adapter/nodes.png").read_bytes() == b"picture"


def test_card_title_of_run():
    """A folder that is called "adapter" takes the name of the run around it."""
    saved("far")
    Path("runs").mkdir()
    Path("my-adapter").rename("runs/adapter")
    said("card", "runs/adapter")
    text = Path("runs/adapter/README.md").read_text()
    assert "# runs\n" in text and 'from_pretrained(base, "adapter")' in text


def refusal(folder: str = "my-adapter") -> str:
    return refused("card", folder)


def test_card_of_other_folders():
    Path("my-adapter").mkdir()
    message = refusal()
    assert re.match("my-adapter must be the folder of a saved .* adapter, but it holds", message)
    assert {"Learner", "FAR", "NAS-LoRA", "bottleneck"} <= set(re.findall(r"[\w-]+", message))
    get_peft_model(zoo.build("bert"), LoraConfig(target_modules=["query"])).save_pretrained("my-adapter")
    assert refusal().endswith("but it holds an adapter of type LORA.")
    saved("far")
    assert refusal("my-adapter/README.md").endswith("adapter, but it is a file.")
    assert re.match("nowhere must be the folder of .* adapter, but there is no such folder.$", refusal("nowhere"))
    assert refused("card", "my-adapter", "--picture", "none.png") == "--picture must be a file, got 'none.png'."
    Path("my-adapter/adapter_model.safetensors").unlink()
    assert refusal().endswith("but it holds no adapter_model.safetensors.")
    Path("my-adapter/adapter_config.json").write_text('{"peft_type": "FAR",')
    assert refusal().endswith("but its adapter_config.json is damaged.")
    Path("my-adapter/adapter_config.json").unlink()
    assert refusal().endswith("but it holds no adapter_config.json.")


def test_card_without_task_type():
    """Without a task type the class is the model's own."""
    model = get_peft_model(zoo.build("vit"), LearnerConfig(r=4, priming_epochs=0))
    model.save_pretrained("my-adapter")
    assert refusal().endswith("names no base model: give it with --base-model.")
    card = card_of("--base-model", "somebody/vit")
    assert 'ViTForImageClassification.from_pretrained("somebody/vit", num_labels=2, ' in card.content
    assert card.data.pipeline_tag is None


COMMITTED = {
    "far10-mrpc-minilm": ("far", "mrpc-far10-minilm-seed0"),
    "learner-r64-mrpc-minilm": ("learner", "mrpc-learner-r64-minilm-seed0"),
    "u-bitfit10-mrpc-minilm": ("nas_lora", "mrpc-u-bitfit10-minilm-seed0"),
}


def test_committed_card_per_method():
    assert {f.stem for f in (ROOT / "model_cards").glob("*.md")} == set(COMMITTED)
    assert {method for method, _ in COMMITTED.values()} == set(METHODS) - {
        "bottleneck"
    }  # a peer, of which none is kept


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_cards_tell_results(name):
    """Cards in the repository tell committed results."""
    method, run = COMMITTED[name]
    record = single_run(run)
    card = ModelCard.load(ROOT / f"model_cards/{name}.md")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2" and method in card.data.tags
    found = {f"eval_{r.metric_type}": r.metric_value for r in card.data.eval_results}
    assert found == {key: record["final"][key] for key in found} and set(found) == {"eval_accuracy", "eval_f1"}
    for phase in record["phases"]:
        assert f"| {phase['name']} | {phase['steps']:,} | {phase['trained_parameters']:,} |" in card.text
    assert "/tmp" not in card.content and "/home" not in card.content
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (ROOT / "model_cards" / picture).is_file()
    headings = ["Use", "Results", "Training", "What is kept", "Settings", "Picture", "What this is not", "Versions"]
    in_card = re.findall(r"^## (.*)", card.text, re.M)
    assert in_card == [heading for heading in headings if heading in in_card]
    assert {"Use", "Results", "Training", "Settings", "What this is not"} <= set(in_card)
