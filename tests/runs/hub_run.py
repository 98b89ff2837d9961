"""What is asked of a Hub in processes of their own: `python hub_run.py push|load OUT`.

The environment names the Hub, which holds the base model me/tiny-base. `push` leaves the logits of what it pushed in
OUT, and a report of warnings and of what it was told when it failed; `load` says whether the loaded adapters give the
same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import model_card
import push
import torch
import zoo
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from test_contract import logits_of
from test_model_card import results
from training import arguments, trainer
from transformers import AutoModelForSequenceClassification

from peft_learners import FARConfig, LearnerConfig, NASLoRAConfig

BASE, LABELS = "me/tiny-base", 3
LEARNER = {"r": 4, "priming_epochs": 1, "task_type": "SEQ_CLS"}


def base(name: str = BASE) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=LABELS)


def trained(config, name: str = BASE) -> PeftModel:
    """An adapter that has gone through its phases, with noise in its weights."""
    torch.manual_seed(1)
    model = get_peft_model(base(name), config)
    starts = model.base_model.set_schedule(total_steps=2, steps_per_epoch=1)
    for step in (0, 1, 2):
        starts += model.base_model.update_and_allocate(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert len(starts) == 2
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    return {name: value for name, value in zoo.inputs_of("distilbert", None).items() if name != "labels"}


# -- pushing ----------------------------------------------------------------------------------------------------------


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_and_push(out: Path, config, repo_id: str, strategy: str, **card) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(base(), config)
    settings = {"push_to_hub": True, "hub_model_id": repo_id, "hub_strategy": strategy, "eval_strategy": "epoch"}
    if strategy == "every_save":
        settings |= {"save_strategy": "steps", "save_steps": 2}
    args = arguments(out / repo_id.replace("/", "-"), **settings)
    run = trainer(model, args, compute_metrics=accuracy)
    run.train()
    run.push_to_hub(**card)
    return model


def attempt(arguments: list[str], **api) -> str:
    """What `push.py` says, to stdout or as it exits."""
    try:
        push.main(arguments, HfApi(**api) if api else None)
    except SystemExit as exit:
        return str(exit.code)
    return "pushed"


#: Repositories with which something goes wrong on the server (test_hub.py says what).
BY_NAME = (
    *("create-502", "put-403", "put-503", "put-drop", "put-flaky", "commit-500", "commit-drop", "commit-lost-answer"),
    *("left-empty", "empty"),
)


def push_with_results(out: Path, folder: Path) -> list[str]:
    """Push with a card that tells results, and with one that `model_card.py` had written before."""
    (out / "results.json").write_text(json.dumps({**results("learner", priming_epochs=1.0), "model": BASE}))
    (out / "nodes.png").write_bytes(b"a picture")
    more = ["--results", str(out / "results.json"), "--picture", str(out / "nodes.png")]
    shutil.copytree(folder, out / "with-card")
    model_card.main([str(out / "with-card"), *more])
    return [attempt([str(folder), "me/results", *more]), attempt([str(out / "with-card"), "me/with-card"])]


def attempts(folder: str) -> dict[str, str]:
    token = os.environ.pop("HF_TOKEN")
    said = {"no-token": attempt([folder, "me/no-token"])}
    os.environ["HF_TOKEN"] = token
    calls = {
        "wrong-token": ([folder, "me/wrong-token"], {"token": "hf_wrong"}),
        "refused": ([folder, "me/refused"], {"endpoint": "http://127.0.0.1:9"}),
        "other-owner": ([folder, "other/adapter"], {}),
        "no-id": ([folder, "a/b/c"], {}),
        "bare-name": ([folder, "bare-name", "--private"], {}),
        "existing": ([folder, "me/filled"], {}),
        "updated": ([folder, "me/updated", "--update"], {}),
        "branch": ([folder, "me/branch", "--revision", "v2"], {}),
        "pull-request": ([folder, "me/filled", "--create_pr"], {}),
        "no-pull-request": ([folder, "me/missing", "--create_pr"], {}),
        **{name: ([folder, f"me/{name}"], {}) for name in BY_NAME},
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        results = {name: pool.submit(attempt, args, **api) for name, (args, api) in calls.items()}
    return {**said, **{name: result.result() for name, result in results.items()}}


def push_all(out: Path) -> dict:
    report: dict = {}
    logits: dict[str, torch.Tensor] = {}
    learner = trained(LearnerConfig(**LEARNER))
    folder = out / "learner"
    learner.save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", "notes.txt"):
        (folder / name).write_text("not for the Hub")
    logits["me/learner"] = logits_of(learner, inputs())
    report["learner"] = attempt([str(folder), "me/learner"])
    report["results"] = push_with_results(out, folder)

    far = trained(FARConfig(priming_steps=1, retention_ratio=0.25, task_type="SEQ_CLS"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        far.push_to_hub("me/far", tags=["mine"])
        far.push_to_hub("me/written")
    report["warnings"] = [str(w.message) for w in caught if "adapter_config" in str(w.message)]
    logits["me/far"] = logits["me/written"] = logits_of(far, inputs())

    local = str(out / "local-base")
    base().save_pretrained(local)
    adapted = trained(LearnerConfig(**LEARNER), local)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.push_to_hub("me/from-folder")
        adapted.peft_config["default"].base_model_name_or_path = BASE
        adapted.push_to_hub("me/from-folder-named")
    report["local warnings"] = [str(w.message) for w in caught if "adapter_config" in str(w.message)]
    adapted.peft_config["default"].base_model_name_or_path = local
    adapted.save_pretrained(out / "from-folder")
    report["local"] = attempt([str(out / "from-folder"), "me/local"])
    report["local, named"] = attempt([str(out / "from-folder"), "me/local", "--base_model", BASE])
    logits["me/from-folder-named"] = logits["me/local"] = logits_of(adapted, inputs())

    nas = NASLoRAConfig(r=2, parameter_budget=0.5, task_type="SEQ_CLS")
    card = {"dataset_tags": "me/parity", "dataset": "parity", "tasks": "text-classification", "tags": ["mine"]}
    logits["me/nas"] = logits_of(train_and_push(out, nas, "me/nas", "end", **card), inputs())
    every = train_and_push(out, LearnerConfig(**LEARNER), "me/every-save", "every_save")
    logits["me/every-save"] = logits_of(every, inputs())

    report["attempts"] = attempts(str(folder))
    logits["me/branch"] = logits["me/updated"] = logits["me/put-flaky"] = logits["me/learner"]
    torch.save(logits, out / "logits.pt")
    return report


# -- loading ----------------------------------------------------------------------------------------------------------


def load_all(out: Path) -> dict:
    logits = torch.load(out / "logits.pt")
    same = {}
    for repo_id, expected in logits.items():
        model = PeftModel.from_pretrained(base(), repo_id, revision="v2" if repo_id == "me/branch" else None)
        same[repo_id] = torch.equal(logits_of(model, inputs()), expected)
    for repo_id in ("me/learner", "me/far", "me/written", "me/nas", "me/every-save", "me/from-folder-named"):
        codes = re.findall(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.S)
        names: dict = {}
        exec("\n".join(codes).partition("merged =")[0], names)
        loaded = names.get("model")
        same[f"{repo_id}, by its card"] = loaded is not None and torch.equal(
            logits_of(loaded, inputs()), logits[repo_id]
        )
    for repo_id in ("me/learner", "me/local"):
        auto = AutoPeftModelForSequenceClassification.from_pretrained(repo_id, num_labels=LABELS)
        same[f"{repo_id}, by the auto class"] = torch.equal(logits_of(auto, inputs()), logits[repo_id])
    return same


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, folder = sys.argv[1], Path(sys.argv[2])
    result = push_all(folder) if command == "push" else load_all(folder)
    (folder / f"{command}.json").write_text(json.dumps(result, indent=1))
