"""The Hub: what is pushed can be loaded from there, its card is right, and nothing half remains of a failed push.

Real pushes to a real server on loopback (hub_server.py), in processes of their own (runs/hub_run.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zoo
from console import refused
from hub_server import DROP, DROP_AFTER, HANG, HubServer, Repo
from huggingface_hub import EvalResult, ModelCard
from training import learner

from peft_learners.hub import PushError, Results, push, write_card
from peft_learners.hub.full_card import read_adapter
from peft_learners.hub.push import card_to_push

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "runs" / "hub_run.py"
FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
#: The console command, as an installed one runs it.
COMMAND = ("-m", "peft_learners_cli")
OWN_README = b"---\nlicense: mit\ntags:\n- by-hand\n---\n\n# Mine\n\nWords of my own.\n"


def start(hub: HubServer, home: Path, *command: object) -> subprocess.Popen:
    environment = {**os.environ, **hub.environment(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-4000:]
    return said


@dataclass
class Pushed:
    hub: HubServer
    report: dict
    same: dict[str, bool]
    folder: Path

    def card(self, repo_id: str, branch: str = "main") -> ModelCard:
        return ModelCard(self.hub.repos[repo_id].branches[branch]["README.md"].decode())

    def commits(self, repo_id: str) -> int:
        """Number of commits by the server's record of requests, and by its own count."""
        asked = [r for r in self.hub.asked("POST", f"^/api/models/{repo_id}/commit/") if r.status == 200]
        assert len(asked) == len(self.hub.repos[repo_id].commits)
        return len(asked)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    out = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("base", "version 9")):
        zoo.build("distilbert", seed).distilbert.save_pretrained(out / name)
    base, version = ({f.name: f.read_bytes() for f in (out / name).iterdir()} for name in ("base", "version 9"))
    with HubServer() as hub:
        hub.add_repo("me/tiny-base", base)
        hub.repos["me/versions"] = Repo(branches={"main": base, "v9": version})
        hub.add_repo("me/damaged-card", {"README.md": b"---\nlicense: mit\ntags: [a\n---\n"})
        hub.add_repo("me/old", {})
        hub.add_repo("me/written", {"README.md": OWN_README})
        hub.add_repo("me/written-by-peft", {"README.md": OWN_README})
        hub.add_repo("me/filled", {"README.md": OWN_README, "adapter_model.safetensors": b"old"})
        hub.add_repo("me/updated", {"README.md": OWN_README, "adapter_model.safetensors": b"old"})
        hub.add_repo("me/empty", {})
        hub.fail("POST", "/api/repos/create .*create-502", 502)
        for status in (403, 500, 503):
            hub.fail("POST", f"/me/branch-{status}/branch/", status)
            hub.fail("GET", f"/api/models/me/base-{status}", status)
        hub.fail("POST", "/me/old/branch/", 500)
        hub.fail("PUT", "/lfs/me/put-403/", 403)
        hub.fail("PUT", "/lfs/me/put-503/", 503)
        hub.fail("PUT", "/lfs/me/put-drop/", DROP)
        hub.fail("PUT", "/lfs/me/put-flaky/", 503, times=1)
        hub.fail("POST", "/me/(commit-500|left-empty)/commit/", 500)
        hub.fail("DELETE", "left-empty", 503)
        hub.fail("POST", "/me/commit-drop/commit/", DROP)
        hub.fail("POST", "/me/commit-lost-answer/commit/", DROP_AFTER)
        finish(start(hub, out / "home", RUN, "push", out))
        finish(start(hub, out / "another home", RUN, "load", out))
        reports = [json.loads((out / f"{name}.json").read_text()) for name in ("push", "load")]
        yield Pushed(hub, *reports, out)


pytestmark = pytest.mark.timeout(600)


# -- the round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.verb("push_to_hub")
@pytest.mark.slow
def test_pushed_adapter_loads(pushed):
    """What is pushed loads by its id, and by the code of its card, with the same logits bit for bit."""
    assert pushed.report["learner"] == "pushed"
    by_card = ("learner", "far", "written", "bottleneck", "second", "by-transformers", "local", "local-model", "nas")
    assert set(pushed.same) > {
        *("me/learner", "me/learner, by the auto class", "me/local, by the auto class", "me/branch", "me/updated"),
        *("me/far-by-peft", "me/nas-by-trainer", *(f"me/{name}, by its card" for name in by_card)),
        *("me/of-v9, by its card", "me/of-v9-by-script, by its card", "me/of-v9, exported"),
        *("me/far, shown", "me/nowhere, refused", "me/tiny-base, refused"),
    }
    assert all(pushed.same.values()), pushed.same


@pytest.mark.slow
def test_push_is_one_commit(pushed):
    """A push is one commit of the files that belong, of a folder and of a model alike."""
    of_models = ("far", "second", "by-transformers", "local-model", "of-v9")
    for name in ("learner", "branch", "local", "put-flaky", "nas", "local-after-trainer", *of_models):
        assert pushed.commits(f"me/{name}") == 1
        (commit,) = pushed.hub.repos[f"me/{name}"].commits
        assert set(commit.files) == FILES
    for name, message in {
        "learner": "Upload learner adapter",
        "nas": "Upload nas_lora adapter",
        "bottleneck": "Mine",
    }.items():
        assert [commit.message for commit in pushed.hub.repos[f"me/{name}"].commits] == [message]
    assert {"optimizer.pt", "notes.txt"} <= {f.name for f in (pushed.folder / "learner").iterdir()}


@pytest.mark.slow
def test_pushed_card(pushed):
    """Every card that is pushed says what the adapter is, and how it is loaded."""
    for name, method in {
        **{"learner": "learner", "far": "far", "nas": "nas_lora", "bottleneck": "bottleneck", "written": "far"},
        **{"second": "learner", "by-transformers": "learner", "local": "learner", "local-model": "learner"},
        **{"updated": "learner", "local-after-trainer": "learner"},
    }.items():
        card = pushed.card(f"me/{name}")
        data = card.data.to_dict()
        assert data["library_name"] == "peft"
        assert (data["base_model"], data["base_model_relation"]) == ("me/tiny-base", "adapter")
        assert {"peft-learners", method} <= set(data["tags"])
        assert "```python\nimport peft_learners" in card.text and f'from_pretrained(base, "me/{name}")' in card.text
        assert 'from_pretrained("me/tiny-base", num_labels=3, ignore_mismatched_sizes=True)' in card.text
        assert str(pushed.folder) not in card.content and "[More Information Needed]" not in card.text


@pytest.mark.slow
def test_own_card_keeps_text(pushed):
    """A card written by hand keeps its text, its header and its tags."""
    for repo_id in ("me/written", "me/updated"):
        card = pushed.card(repo_id)
        assert card.text.startswith("\n# Mine\n\nWords of my own.\n\n## Use\n")
        assert card.data.license == "mit" and "by-hand" in card.data.tags
        assert "Framework versions" not in card.text and "## Settings" not in card.text


@pytest.mark.slow
def test_pushed_results_and_picture(pushed):
    """Results and picture of a card are pushed with it, and so is a picture that is given."""
    assert pushed.report["results"] == ["pushed", "pushed"]
    for repo_id in ("me/with-card", "me/with-picture"):
        assert pushed.hub.repos[repo_id].branches["main"].keys() == {*FILES, "nodes.png"}
        card = pushed.card(repo_id)
        assert "![Picture of the adapter](nodes.png)" in card.text
        assert f'PeftModel.from_pretrained(base, "{repo_id}")' in card.text
    card = pushed.card("me/with-card")
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == (
        [("accuracy", 0.75), ("f1", 0.8360128617363344)]  # mrpc-learner-r64 of results/archive.jsonl
    )
    assert "| validation | 408 | accuracy | 75.0 |" in card.text


@pytest.mark.slow
def test_push_after_trainer(pushed):
    """A push of Trainer's folder keeps the text and metrics of Trainer's card."""
    assert pushed.report["after trainer"] == "pushed"
    card = pushed.card("me/nas")
    data = card.data.to_dict()
    assert data["metrics"] == ["accuracy"] and data["datasets"] == ["me/parity"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type, result.task_type) == (
        *("accuracy", "me/parity", "text-classification"),
    )
    assert 0 <= result.metric_value <= 1
    text = card.text
    assert text.index("## Use") < text.index("## Model description") < text.index("### Training hyperparameters")
    assert "- learning_rate: 0.01" in text and "- PEFT 0." in text and text.count("import peft_learners") == 1


@pytest.mark.slow
def test_local_base_is_refused(pushed):
    """A local base model is not told to the world: its id on the Hub has to be given."""
    path = str(pushed.folder / "local-base")
    for case, option in (("local", '`base_model="OWNER/NAME"`'), ("local, folder", "--base-model OWNER/NAME")):
        assert pushed.report[case] == (
            f"The adapter was trained on the local folder {path!r}, which nobody else has. Give the id of that model "
            f"on the Hub: {option}. Nothing was pushed."
        )
    assert pushed.report["local, named"] == pushed.report["local, by trainer"]["folder"] == "pushed"
    for repo_id in ("me/local", "me/local-model", "me/local-after-trainer"):
        files = pushed.hub.repos[repo_id].branches["main"]
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/tiny-base"
        assert str(pushed.folder).encode() not in files["README.md"] + files["adapter_config.json"]


# -- what docs/hub.md says of the pushes of others --------------------------------------------------------------------


@pytest.mark.slow
def test_peft_push_to_hub(pushed):
    """`model.push_to_hub` uploads transformers' empty template, or the card that the repository has already."""
    (commit,) = pushed.hub.repos["me/far-by-peft"].commits
    card = pushed.card("me/far-by-peft")
    assert set(commit.files) == FILES
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["mine"]}
    assert "# Model Card for Model ID" in card.text and "import peft_learners" not in card.text
    assert pushed.hub.repos["me/written-by-peft"].branches["main"]["README.md"] == OWN_README


@pytest.mark.slow
def test_trainer_push_to_hub(pushed):
    """Trainer's card comes with the last commit; PEFT takes its tags, and it has no loading lines."""
    for repo_id in ("me/nas-by-trainer", "me/every-save"):
        *running, last = pushed.hub.repos[repo_id].commits
        assert last.message == "End of training" and set(last.files) == {*FILES, "training_args.bin"}
        assert all(set(commit.files) == {*FILES, "training_args.bin"} - {"README.md"} for commit in running)
        assert bool(running) == (repo_id == "me/every-save")
        card = pushed.card(repo_id)
        data = card.data.to_dict()
        assert (data["library_name"], data["base_model"]) == ("peft", "me/tiny-base")
        assert set(data["tags"]) == {"transformers", "base_model:adapter:me/tiny-base"}
        assert "## Training procedure" in card.text and "import peft_learners" not in card.text


@pytest.mark.slow
def test_trainer_push_on_local_base(pushed):
    """The Hub refuses the path that PEFT writes into Trainer's card; the callback has warned before."""
    said = pushed.report["local, by trainer"]
    assert said["refused"].startswith("Invalid metadata in README.md.")
    assert f'"base_model" with value "{pushed.folder / "local-base"}" is not valid' in said["refused"]
    (warning,) = said["warnings"]
    assert f"names the local folder {str(pushed.folder / 'local-base')!r}" in warning
    assert "model.peft_config['default'].base_model_name_or_path = \"OWNER/NAME\"" in warning
    assert not pushed.hub.repos["me/local-by-trainer"].commits


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "case,said",
    [
        ("no-token", ["no token", "`hf auth login`", "HF_TOKEN", "Nothing was pushed"]),
        ("wrong-token", ["does not accept the token (401)", "HF_TOKEN", "Nothing was pushed"]),
        ("refused", ["The connection to http://127.0.0.1:9 failed", "Nothing was pushed"]),
        ("other-owner", ["may not write to other/adapter (403)", "Nothing was pushed"]),
        ("no-id", ["must have the form OWNER/NAME, got 'a/b/c'", "Nothing was pushed"]),
        ("create-502", ["The Hub failed (502)", "Nothing was pushed"]),
        ("put-403", ["(403)", "me/put-403, made for this, was removed again. Run the same command again"]),
        ("put-503", ["The Hub failed (503)", "me/put-503, made for this, was removed again"]),
        ("put-drop", ["failed", "me/put-drop, made for this, was removed again"]),
        ("commit-500", ["The Hub failed (500)", "me/commit-500, made for this, was removed again"]),
        ("commit-drop", ["failed", "me/commit-drop, made for this, was removed again"]),
        ("no-pull-request", ["me/missing does not exist"]),
        ("branch-500", ["The Hub failed (500)", "me/branch-500, made for this, was removed again. Run the same"]),
        ("branch-403", ["(403)", "me/branch-403, made for this, was removed again. Run the same"]),
        ("no-base", ["The base model me/nowhere is not on the Hub", "--base-model OWNER/NAME. Nothing was pushed"]),
        ("no-revision", ["The base model me/tiny-base has no revision 'v9'", "`revision` in", "Nothing was pushed"]),
    ],
)
def test_failed_push(pushed, case, said):
    """A push that fails says why and leaves nothing."""
    message = pushed.report["attempts"][case]
    for part in said:
        assert part in message
    assert f"me/{case}" not in pushed.hub.repos and "\n" not in message and ".." not in message


@pytest.mark.slow
def test_existing_repo_refused(pushed):
    """An existing repository is refused and left as it is."""
    message = pushed.report["attempts"]["existing"]
    assert "me/filled exists already and holds README.md, adapter_model.safetensors" in message
    assert "Give --update" in message and "Nothing was pushed" in message
    files = pushed.hub.repos["me/filled"].branches["main"]
    assert files["README.md"] == OWN_README and files["adapter_model.safetensors"] == b"old"
    assert pushed.report["attempts"]["updated"] == "pushed"


@pytest.mark.slow
def test_failed_push_to_existing(pushed):
    """A failure in an existing repository says what is left."""
    said, repos = pushed.report["attempts"], pushed.hub.repos
    assert said["branch-of-old"].endswith("No file of the repository was changed; the branch v2 may be new.")
    assert set(repos["me/old"].branches["main"]) == {".gitattributes"}
    assert said["damaged-card"] == (
        "The header of README.md in me/damaged-card is not that of a model card (line 3: expected ',' or ']', but got "
        "'<stream end>'): correct it, or delete that file. The repository is as it was."
    )
    assert not repos["me/damaged-card"].commits


@pytest.mark.slow
def test_silent_base_passes(pushed):
    """A base model that the Hub does not answer about is let pass."""
    for name, base in (("gated-base", "me/base-403"), ("silent-base", "me/base-503")):
        assert pushed.report["attempts"][name] == "pushed"
        assert pushed.card(f"me/{name}").data.base_model == base


@pytest.mark.slow
def test_relative_base(pushed):
    """A relative folder is not taken for an id."""
    while_it_is_there, when_it_is_gone = pushed.report["relative"]
    assert "was trained on the local folder 'models/tiny-local', which nobody else has" in while_it_is_there
    assert "The base model models/tiny-local is not on the Hub" in when_it_is_gone
    assert "me/relative" not in pushed.hub.repos


@pytest.mark.slow
def test_other_ways_to_push(pushed):
    said, repos = pushed.report["attempts"], pushed.hub.repos
    assert (
        said["pull-request"] == said["branch"] == said["bare-name"] == said["empty"] == said["put-flaky"] == "pushed"
    )
    assert set(repos["me/filled"].branches["refs/pr/1"]) == FILES
    assert set(repos["me/branch"].branches["main"]) == {".gitattributes"}
    assert repos["me/bare-name"].private and not repos["me/learner"].private
    assert set(repos["me/empty"].branches["main"]) == FILES


@pytest.mark.slow
def test_lost_answer(pushed):
    """What the Hub did is found out when its answer is lost."""
    assert (
        "But the commit had arrived: me/commit-lost-answer holds the adapter"
        in (pushed.report["attempts"]["commit-lost-answer"])
    )
    assert set(pushed.hub.repos["me/commit-lost-answer"].branches["main"]) == FILES
    assert "me/left-empty may be left, empty. Run the same command again" in pushed.report["attempts"]["left-empty"]
    assert set(pushed.hub.repos["me/left-empty"].branches["main"]) == {".gitattributes"}


@pytest.mark.slow
def test_killed_push_goes_on(pushed):
    """A push that is killed leaves an empty repository, and the same command goes on there."""
    command = (*COMMAND, "push", pushed.folder / "learner", "me/killed")
    pushed.hub.fail("PUT", "/lfs/me/killed/", HANG)
    process = start(pushed.hub, pushed.folder / "home", *command)
    pushed.hub.wait_for("PUT", "/lfs/me/killed/")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert set(pushed.hub.repos["me/killed"].branches["main"]) == {".gitattributes"}
    pushed.hub.failures.clear()
    assert "/me/killed/commit/" in finish(start(pushed.hub, pushed.folder / "home", *command))
    assert pushed.commits("me/killed") == 1 and set(pushed.hub.repos["me/killed"].branches["main"]) == FILES
    before, after = (pushed.hub.repos[name].branches["main"] for name in ("me/learner", "me/killed"))
    assert before["adapter_model.safetensors"] == after["adapter_model.safetensors"]


# -- before the Hub is asked ------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """Of an adapter that can't be pushed. This process is offline: to ask the Hub would be refused otherwise."""
    return refused("push", folder, "me/adapter")


@pytest.mark.parametrize(
    "header,said",
    [
        ("license: mit\ntags: [a\n", "line 3: expected ',' or ']', but got '<stream end>'"),
        ("model-index:\n- name: mine\n", "Invalid `model_index` in metadata cannot be parsed: <class 'KeyError'>"),
        ("- a\n", "repo card metadata block should be a dict"),
    ],
)
def test_unreadable_header_refused(header, said, tmp_path: Path, monkeypatch):
    """A README.md whose header can't be read is refused before anything is made."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    adapter_on("me/tiny-base", tmp_path)
    assert "HF_HUB_OFFLINE" in refusal(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{header}---\n\n# Mine\n")
    message = refusal(tmp_path)
    assert f"The header of {tmp_path / 'README.md'} is not that of a model card ({said}" in message
    assert message.endswith("Nothing was pushed.") and "Run the same command again" not in message


def test_no_adapter_refused(tmp_path: Path):
    adapter_on("me/tiny-base", tmp_path)
    assert "adapter, but it is a file. Nothing was pushed." in refusal(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "FAR",')
    assert "adapter, but its adapter_config.json is damaged. Nothing was pushed." in refusal(tmp_path)


def adapter_on(base: str, folder: Path) -> Path:
    model = learner(init_weights=False)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


def test_card_with_local_link(tmp_path: Path):
    """Trainer takes the name of a local folder that is gone for an id: the card that is pushed does not."""
    folder = adapter_on("/models/gone", tmp_path)
    link = "This model is a fine-tuned version of [/models/gone](https://huggingface.co//models/gone) on mrpc.\n"
    (folder / "README.md").write_text(f"---\nbase_model: /models/gone\ntags:\n- mine\n---\n\n{link}")
    card = card_to_push(read_adapter(folder, "me/base"), "me/adapter", None, None, None)
    assert "/models" not in card.content and "a fine-tuned version of `me/base` on mrpc." in card.text
    assert card.data.base_model == "me/base" and "mine" in card.data.tags


def test_filled_template_gets_code(tmp_path: Path):
    """huggingface_hub's template gets the loading lines where it asks for them."""
    folder = adapter_on("me/base", tmp_path)
    header = ModelCard("---\n{}\n---\n").data
    (folder / "README.md").write_text(ModelCard.from_template(header, model_description="About it.").content)
    text = card_to_push(read_adapter(folder), "me/adapter", None, None, None).text
    start = text.index("## How to Get Started with the Model")
    assert "About it." in text and start < text.index("import peft_learners") < text.index("## Training Details")


def test_card_of_plain_results(tmp_path: Path):
    """Whoever has no text for his results gets a table of them."""
    result = EvalResult("text-classification", "me/data", "Mine", "accuracy", 0.5, dataset_split="test")
    card = write_card(adapter_on("me/base", tmp_path), results=Results(evaluations=[result], task="my task"))
    assert (
        "## Results\n\n| split | metric | value |\n| --- | --- | --- |\n| test | accuracy | 0.5 |\n\n## Training"
        in card.text
    )
    assert "A Learner adapter of `me/base` for my task, made with" in card.text and "What this is not" not in card.text
    assert ModelCard.load(tmp_path / "README.md").data.eval_results == [result]
    assert card.data.datasets == ["me/data"] and card.data.model_name == tmp_path.name


def test_missing_picture_refused(tmp_path: Path):
    with pytest.raises(PushError, match=r"^`picture=` must be a file, got 'none.png'. Nothing was pushed.$"):
        push(adapter_on("me/base", tmp_path), "me/adapter", picture="none.png")
    with pytest.raises(PushError, match="^`create_pr=` opens a pull request .* leave `revision=` out"):
        push(tmp_path, "me/adapter", create_pr=True, revision="v2")
