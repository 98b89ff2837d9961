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
from hub_server import DROP, DROP_AFTER, HANG, HubServer, Repo
from huggingface_hub import HfApi, ModelCard
from training import learner

from scripts import push

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "runs" / "hub_run.py"
FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
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
def test_what_is_pushed_loads_by_its_id_with_the_same_logits_bit_for_bit(pushed):
    assert pushed.report["learner"] == "pushed"
    assert set(pushed.same) > {
        *("me/learner", "me/learner, by its card", "me/learner, by the auto class", "me/local, by the auto class"),
        *("me/far, by its card", "me/nas, by its card", "me/every-save, by its card", "me/branch", "me/updated"),
        "me/bottleneck, by its card",
        *("me/of-v9, by its card", "me/of-v9-by-script, by its card", "me/of-v9, exported"),
    }
    assert all(pushed.same.values()), pushed.same


@pytest.mark.slow
def test_a_push_is_one_commit_of_the_files_that_belong(pushed):
    for repo_id in ("me/learner", "me/far", "me/from-folder", "me/branch", "me/local", "me/put-flaky"):
        assert pushed.commits(repo_id) == 1
        (commit,) = pushed.hub.repos[repo_id].commits
        assert set(commit.files) == FILES
    assert pushed.commits("me/nas") == 1
    assert [commit.message for commit in pushed.hub.repos["me/learner"].commits] == ["Upload learner adapter"]
    assert {"optimizer.pt", "notes.txt"} <= {f.name for f in (pushed.folder / "learner").iterdir()}


@pytest.mark.slow
def test_every_card_on_the_hub_says_what_the_adapter_is(pushed):
    for repo_id, method in {
        **{"me/learner": "learner", "me/far": "far", "me/nas": "nas_lora", "me/every-save": "learner"},
        **{
            "me/bottleneck": "bottleneck",
            "me/written": "far",
            "me/from-folder-named": "learner",
            "me/local": "learner",
            "me/updated": "learner",
        },
    }.items():
        card = pushed.card(repo_id)
        data = card.data.to_dict()
        assert data["library_name"] == "peft"
        assert (data["base_model"], data["base_model_relation"]) == ("me/tiny-base", "adapter")
        assert {"peft-learners", method} <= set(data["tags"])
        assert "```python\nimport peft_learners" in card.text and f'from_pretrained(base, "{repo_id}")' in card.text
        assert 'from_pretrained("me/tiny-base", num_labels=3, ignore_mismatched_sizes=True)' in card.text
        assert str(pushed.folder) not in card.content and "[More Information Needed]" not in card.text


@pytest.mark.slow
def test_tags_that_the_user_gives_stay(pushed):
    data = pushed.card("me/far").data
    assert set(data.tags) == {"mine", "far", "peft-learners", "transformers", "base_model:adapter:me/tiny-base"}
    assert {"mine", "generated_from_trainer", "nas_lora"} <= set(pushed.card("me/nas").data.tags)


@pytest.mark.slow
def test_a_card_written_by_hand_keeps_its_text(pushed):
    assert not pushed.report["warnings"]
    for repo_id in ("me/written", "me/updated"):
        card = pushed.card(repo_id)
        assert card.text.startswith("\n# Mine\n\nWords of my own.\n\n## Use\n")
        assert card.data.license == "mit" and "by-hand" in card.data.tags
        assert "Framework versions" not in card.text and "## Settings" not in card.text


@pytest.mark.slow
def test_results_and_picture_are_in_the_pushed_card(pushed):
    assert pushed.report["results"] == ["pushed", "pushed"]
    for repo_id in ("me/results", "me/with-card"):
        assert pushed.hub.repos[repo_id].branches["main"].keys() == {*FILES, "nodes.png"}
        card = pushed.card(repo_id)
        assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == (
            [("accuracy", 0.75), ("f1", 0.8360128617363344)]  # results/glue/mrpc-learner-r64-minilm-seed0.json
        )
        assert (
            "| validation | 408 | accuracy | 75.0 |" in card.text
            and "![Picture of the adapter](nodes.png)" in card.text
        )
        assert f'PeftModel.from_pretrained(base, "{repo_id}")' in card.text
    assert pushed.card("me/results").data.model_name == "results"


@pytest.mark.slow
def test_trainers_card_keeps_its_text_and_metrics(pushed):
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
def test_commits_of_a_running_training_hold_a_card_too(pushed):
    commits = pushed.hub.repos["me/every-save"].commits
    assert commits[0].message.startswith("Training in progress, step") and commits[-1].message == "End of training"
    for commit in commits:
        card = ModelCard(commit.files["README.md"].decode())
        assert set(commit.files) >= FILES and card.data.to_dict()["base_model"] == "me/tiny-base"
        assert 'model = PeftModel.from_pretrained(base, "me/every-save")' in card.text
    assert "## Training procedure" not in ModelCard(commits[0].files["README.md"].decode()).text


@pytest.mark.slow
def test_a_local_base_model_is_not_told_to_the_world(pushed):
    (warning,) = pushed.report["local warnings"]  # of the first of two pushes
    assert f"names the local folder {str(pushed.folder / 'local-base')!r}" in warning
    assert "model.peft_config['default'].base_model_name_or_path = \"OWNER/NAME\"" in warning
    card = pushed.card("me/from-folder")
    assert "base_model" not in card.data.to_dict() and str(pushed.folder) not in card.content
    assert 'from_pretrained("local-base", num_labels=3, ignore_mismatched_sizes=True)' in card.text
    assert (
        "Give the id of that model on the Hub: --base_model OWNER/NAME. Nothing was pushed." in pushed.report["local"]
    )
    assert pushed.report["local, named"] == "pushed"
    for repo_id in ("me/local", "me/from-folder-named"):
        config = json.loads(pushed.hub.repos[repo_id].branches["main"]["adapter_config.json"])
        assert config["base_model_name_or_path"] == "me/tiny-base"


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
        ("no-base", ["The base model me/nowhere is not on the Hub", "--base_model OWNER/NAME. Nothing was pushed"]),
        ("no-revision", ["The base model me/tiny-base has no revision 'v9'", "`revision` in", "Nothing was pushed"]),
    ],
)
def test_a_push_that_fails_says_why_and_leaves_nothing(pushed, case, said):
    message = pushed.report["attempts"][case]
    for part in said:
        assert part in message
    assert f"me/{case}" not in pushed.hub.repos and "\n" not in message and ".." not in message


@pytest.mark.slow
def test_an_existing_repository_is_refused_and_untouched(pushed):
    message = pushed.report["attempts"]["existing"]
    assert "me/filled exists already and holds README.md, adapter_model.safetensors" in message
    assert "Give --update" in message and "Nothing was pushed" in message
    files = pushed.hub.repos["me/filled"].branches["main"]
    assert files["README.md"] == OWN_README and files["adapter_model.safetensors"] == b"old"
    assert pushed.report["attempts"]["updated"] == "pushed"


@pytest.mark.slow
def test_a_failure_in_an_existing_repository_says_what_is_left(pushed):
    said, repos = pushed.report["attempts"], pushed.hub.repos
    assert said["branch-of-old"].endswith("No file of the repository was changed; the branch v2 may be new.")
    assert set(repos["me/old"].branches["main"]) == {".gitattributes"}
    assert said["damaged-card"] == (
        "The header of README.md in me/damaged-card is not that of a model card (line 3: expected ',' or ']', but got "
        "'<stream end>'): correct it, or give --results or --picture to replace the file. The repository is as it was."
    )
    assert not repos["me/damaged-card"].commits


@pytest.mark.slow
def test_a_base_model_that_the_hub_does_not_answer_about_is_let_pass(pushed):
    for name, base in (("gated-base", "me/base-403"), ("silent-base", "me/base-503")):
        assert pushed.report["attempts"][name] == "pushed"
        assert pushed.card(f"me/{name}").data.base_model == base


@pytest.mark.slow
def test_a_relative_folder_is_not_taken_for_an_id(pushed):
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
def test_what_the_hub_did_is_found_out_when_its_answer_is_lost(pushed):
    assert (
        "But the commit had arrived: me/commit-lost-answer holds the adapter"
        in (pushed.report["attempts"]["commit-lost-answer"])
    )
    assert set(pushed.hub.repos["me/commit-lost-answer"].branches["main"]) == FILES
    assert "me/left-empty may be left, empty. Run the same command again" in pushed.report["attempts"]["left-empty"]
    assert set(pushed.hub.repos["me/left-empty"].branches["main"]) == {".gitattributes"}


@pytest.mark.slow
def test_a_push_that_is_killed_leaves_an_empty_repository_and_goes_on(pushed):
    command = ("-m", "scripts.push", pushed.folder / "learner", "me/killed")
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
    with pytest.raises(SystemExit) as exit:
        push.main([str(folder), "me/adapter"], HfApi(endpoint="http://127.0.0.1:9", token="hf_test"))
    return str(exit.value.code)


@pytest.mark.parametrize(
    "header,said",
    [
        ("license: mit\ntags: [a\n", "line 3: expected ',' or ']', but got '<stream end>'"),
        ("model-index:\n- name: mine\n", "Invalid `model_index` in metadata cannot be parsed: <class 'KeyError'>"),
        ("- a\n", "repo card metadata block should be a dict"),
    ],
)
def test_a_readme_whose_header_can_not_be_read_is_refused_before_anything_is_made(header, said, tmp_path: Path):
    model = learner(init_weights=False)
    model.peft_config["default"].base_model_name_or_path = "me/tiny-base"
    model.save_pretrained(tmp_path)
    assert "HF_HUB_OFFLINE" in refusal(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{header}---\n\n# Mine\n")
    message = refusal(tmp_path)
    assert f"The header of {tmp_path / 'README.md'} is not that of a model card ({said}" in message
    assert message.endswith("Nothing was pushed.") and "Run the same command again" not in message


def test_what_is_no_adapters_folder_is_refused(tmp_path: Path):
    model = learner(init_weights=False)
    model.peft_config["default"].base_model_name_or_path = "me/tiny-base"
    model.save_pretrained(tmp_path)
    assert "adapter, but it is a file. Nothing was pushed." in refusal(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "FAR",')
    assert "adapter, but its adapter_config.json is damaged. Nothing was pushed." in refusal(tmp_path)
