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

sys.path.extend(str(f) for f in Path(__file__).resolve().parents[1].iterdir() if f.is_dir())
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import zoo
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import http_backoff
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from test_model_card import results
from training import arguments, sgd, trainer
from transformers import AutoModelForSequenceClassification
from zoo import logits_of

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig, cli
from peft_learners.cli import push as push_command
from peft_learners.cli import show, source
from peft_learners.hub import PushError, push
from peft_learners_cli import main, parse
from scripts.glue.card import main as write_glue_card

# huggingface_hub has no setting for its waits between tries (1 s, 2 s, 4 s, 8 s, 8 s). It tries as often as ever.
assert {"base_wait_time", "max_wait_time"} <= http_backoff.__kwdefaults__.keys()
http_backoff.__kwdefaults__.update(base_wait_time=0.1, max_wait_time=0.2)

BASE, LABELS = "me/tiny-base", 3
LEARNER = {"r": 4, "priming_epochs": 1, "task_type": "SEQ_CLS"}


def base(name: str = BASE, revision: str = "main") -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=LABELS, revision=revision)


def trained(config, name: str = BASE) -> PeftModel:
    """An adapter that has gone through its phases, with noise in its weights."""
    torch.manual_seed(1)
    model = get_peft_model(base(name), config)
    starts = model.base_model.set_schedule(total_steps=2, steps_per_epoch=1, optimizer=sgd(model))
    for step in (0, 1, 2):
        starts += model.base_model.update_and_allocate(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert len(starts) == len(config.outline().phases)
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


def train_and_push_on_local(out: Path, local: str) -> dict[str, object]:
    """What is said of an adapter on a local folder, by Trainer's push and by one of what that leaves."""
    said: dict[str, object] = {}
    model = get_peft_model(base(local), LearnerConfig(**LEARNER))
    settings = {"push_to_hub": True, "hub_model_id": "me/local-by-trainer", "hub_strategy": "end"}
    run = trainer(model, arguments(out / "local-by-trainer", **settings))
    run.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run.push_to_hub()
        except ValueError as error:
            said["refused"] = str(error)
    said["warnings"] = [str(w.message) for w in caught if "adapter_config" in str(w.message)]
    said["folder"] = attempt([str(out / "local-by-trainer"), "me/local-after-trainer", "--base_model", BASE])
    return said


def attempt(arguments: list[str], **api) -> str:
    """What `peft-learners push` says as it fails, in a thread of its own; with `api` what `push` says."""
    _, given = parse(["push", *arguments])
    try:
        if api:
            push(given["folder"], given["repo_id"], api=HfApi(**api))
        else:
            push_command.run(**given)
    except (cli.CommandError, PushError) as error:
        return cli.with_options(str(error), given)
    return "pushed"


#: Repositories with which something goes wrong on the server (test_hub.py says what).
BY_NAME = (
    *("create-502", "put-403", "put-503", "put-drop", "put-flaky", "commit-500", "commit-drop", "commit-lost-answer"),
    *("left-empty", "empty"),
)
#: The same, with a branch to commit to.
BRANCHES = ("branch-500", "branch-403")


def push_with_results(out: Path, folder: Path) -> list[str]:
    """Push with a card that `scripts.glue.card` had written before, and with a picture."""
    (out / "results.json").write_text(json.dumps({**results("learner", priming_epochs=1.0), "model": BASE}))
    (out / "nodes.png").write_bytes(b"a picture")
    shutil.copytree(folder, out / "with-card")
    write_glue_card([str(out / "with-card"), str(out / "results.json"), "--picture", str(out / "nodes.png")])
    shown = [str(folder), "me/with-picture", "--picture", str(out / "nodes.png")]
    return [attempt([str(out / "with-card"), "me/with-card"]), attempt(shown)]


def attempts(folder: str) -> dict[str, str]:
    token = os.environ.pop("HF_TOKEN")
    said = {"no-token": attempt([folder, "me/no-token"])}
    os.environ["HF_TOKEN"] = token
    calls = {
        "wrong-token": ([folder, "me/wrong-token"], {"token": "hf_wrong"}),
        "refused": ([folder, "me/refused"], {"endpoint": "http://127.0.0.1:9"}),
        "other-owner": ([folder, "other/adapter"], {}),
        "no-id": ([folder, "a/b/c"], {}),
        "bare-name": (["--private", folder, "bare-name"], {}),
        "existing": ([folder, "me/filled"], {}),
        "updated": ([folder, "me/updated", "--update"], {}),
        "branch": ([folder, "me/branch", "--revision", "v2"], {}),
        "pull-request": ([folder, "me/filled", "--create_pr"], {}),
        "no-pull-request": ([folder, "me/missing", "--create_pr"], {}),
        **{name: ([folder, f"me/{name}"], {}) for name in BY_NAME},
        **{name: ([folder, f"me/{name}", "--revision", "v2"], {}) for name in BRANCHES},
        "branch-of-old": ([folder, "--update", "--revision", "v2", "me/old"], {}),
        "damaged-card": ([folder, "me/damaged-card", "--update"], {}),
        "no-base": (["--base_model", "me/nowhere", folder, "me/no-base"], {}),
        "no-revision": ([f"{folder}-of-v9", "me/no-revision", "--base_model", BASE], {}),
        "gated-base": ([folder, "me/gated-base", "--base_model", "me/base-403"], {}),
        "silent-base": ([folder, "me/silent-base", "--base_model", "me/base-503"], {}),
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        results = {name: pool.submit(attempt, args, **api) for name, (args, api) in calls.items()}
    return {**said, **{name: result.result() for name, result in results.items()}}


def push_of_revision(out: Path) -> torch.Tensor:
    """Push an adapter of a revision of its base model, as a model and from a folder; its logits."""
    torch.manual_seed(1)
    config = LearnerConfig(r=4, priming_epochs=0, init_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(base("me/versions", "v9"), config, revision="v9")
    push(model, "me/of-v9")
    model.save_pretrained(out / "learner-of-v9")
    assert attempt([str(out / "learner-of-v9"), "me/of-v9-by-script"]) == "pushed"
    return logits_of(model, inputs())


def push_other_models() -> tuple[torch.Tensor, torch.Tensor]:
    """Push the second adapter of a model, and one that was added to a model of transformers; their logits."""
    model = trained(LearnerConfig(**LEARNER))
    model.add_adapter("second", LearnerConfig(r=2, init_weights=False, task_type="SEQ_CLS"))
    model.set_adapter("second")
    push(model, "me/second")
    torch.manual_seed(1)
    plain = base()
    plain.add_adapter(LearnerConfig(r=4, priming_epochs=0, init_weights=False, task_type="SEQ_CLS"), "mine")
    push(plain.eval(), "me/by-transformers")
    return logits_of(model.eval(), inputs()), logits_of(plain, inputs())


def push_with_relative_base(out: Path) -> list[str]:
    """Push an adapter whose base model lies beside it, by a relative name; and again, when that is gone."""
    here, before = out / "here", Path.cwd()
    shutil.copytree(out / "base", here / "models" / "tiny-local")
    os.chdir(here)
    try:
        trained(LearnerConfig(**LEARNER), "models/tiny-local").save_pretrained("ad")
    finally:
        os.chdir(before)
    said = [attempt([str(here / "ad"), "me/relative"])]
    (here / "models").rename(out / "moved")
    return [*said, attempt([str(here / "ad"), "me/relative"])]


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
    push(far, "me/far")
    far.save_pretrained(out / "far")
    (out / "far-rows.json").write_text(json.dumps(show.summary(source.read(str(out / "far")), "far")["modules"]))
    push(far, "me/written", update=True)
    far.push_to_hub("me/far-by-peft", tags=["mine"])
    far.push_to_hub("me/written-by-peft")
    logits |= dict.fromkeys(("me/far", "me/written", "me/far-by-peft"), logits_of(far, inputs()))

    bottleneck = trained(BottleneckConfig(mode="parallel", bottleneck_dim=4, task_type="SEQ_CLS"))
    push(bottleneck, "me/bottleneck", commit_message="Mine")
    logits["me/bottleneck"] = logits_of(bottleneck, inputs())
    logits["me/second"], logits["me/by-transformers"] = push_other_models()

    local = str(out / "local-base")
    base().save_pretrained(local)
    adapted = trained(LearnerConfig(**LEARNER), local)
    try:
        push(adapted, "me/local")
    except PushError as error:
        report["local"] = str(error)
    adapted.save_pretrained(out / "from-folder")
    report["local, folder"] = attempt([str(out / "from-folder"), "me/local"])
    report["local, named"] = attempt([str(out / "from-folder"), "me/local", "--base_model", BASE])
    push(adapted, "me/local-model", base_model=BASE)
    logits |= dict.fromkeys(("me/local", "me/local-model"), logits_of(adapted, inputs()))
    report["local, by trainer"] = train_and_push_on_local(out, local)

    nas = NASLoRAConfig(r=2, parameter_budget=0.5, task_type="SEQ_CLS")
    card = {"dataset_tags": "me/parity", "dataset": "parity", "tasks": "text-classification", "tags": ["mine"]}
    logits["me/nas-by-trainer"] = logits_of(train_and_push(out, nas, "me/nas-by-trainer", "end", **card), inputs())
    report["after trainer"] = attempt([str(out / "me-nas-by-trainer"), "me/nas"])
    logits["me/nas"] = logits["me/nas-by-trainer"]
    train_and_push(out, LearnerConfig(**LEARNER), "me/every-save", "every_save")

    report["relative"] = push_with_relative_base(out)
    logits["me/of-v9"] = logits["me/of-v9-by-script"] = push_of_revision(out)
    report["attempts"] = attempts(str(folder))
    logits["me/branch"] = logits["me/updated"] = logits["me/put-flaky"] = logits["me/learner"]
    torch.save(logits, out / "logits.pt")
    return report


# -- loading ----------------------------------------------------------------------------------------------------------


def refusal(repo_id: str) -> str:
    """What the command says of what is no adapter on the Hub."""
    try:
        source.read(repo_id)
    except cli.CommandError as error:
        return str(error)
    return ""


def load_all(out: Path) -> dict:
    logits = torch.load(out / "logits.pt")
    same = {}
    for repo_id, expected in logits.items():
        its_base = base("me/versions", "v9") if "v9" in repo_id else base()
        model = PeftModel.from_pretrained(its_base, repo_id, revision="v2" if repo_id == "me/branch" else None)
        same[repo_id] = torch.equal(logits_of(model, inputs()), expected)
    by_card = {*logits} - {"me/branch", "me/put-flaky", "me/far-by-peft", "me/nas-by-trainer"}
    for repo_id in sorted(by_card):
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
    main(["export", "me/of-v9", str(out / "as-lora")])
    lora = logits_of(PeftModel.from_pretrained(base("me/versions", "v9"), out / "as-lora"), inputs())
    same["me/of-v9, exported"] = torch.allclose(lora, logits["me/of-v9"], rtol=1e-5, atol=1e-6)
    same["me/far, shown"] = show.summary(source.read("me/far"), "far")["modules"] == json.loads(
        (out / "far-rows.json").read_text()
    )
    for repo_id, reason in (("me/nowhere", "no such repository"), ("me/tiny-base", "it holds no adapter_")):
        same[f"{repo_id}, refused"] = reason in refusal(repo_id)
    return same


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, folder = sys.argv[1], Path(sys.argv[2])
    result = push_all(folder) if command == "push" else load_all(folder)
    (folder / f"{command}.json").write_text(json.dumps(result, indent=1))
