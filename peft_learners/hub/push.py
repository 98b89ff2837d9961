"""Push an adapter of this package to the Hub, with its model card, in one commit."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel

from .full_card import Adapter, Results, check_picture, header_in, make_card, read_adapter, usage
from .short_card import CARD, CONFIG, HERE, WEIGHTS, fill_header, is_untouched

#: What the Hub puts into a new repository.
INITIAL = {".gitattributes"}
_UNFILLED_START = re.compile(r"(## How to Get Started with the Model\n[^#]*?)\[More Information Needed\]")


class PushError(Exception):
    """A sentence on what went wrong, what was and was not done, and what to do."""


def push(
    adapter: Any,
    repo_id: str,
    *,
    base_model: Optional[str] = None,
    results: Optional[Results] = None,
    picture: Union[str, Path, None] = None,
    private: bool = False,
    update: bool = False,
    revision: Optional[str] = None,
    create_pr: bool = False,
    commit_message: Optional[str] = None,
    api: Optional[HfApi] = None,
) -> str:
    """Push an adapter to the Hub: its weights, its config and its card, in one commit.

    Nothing else of its folder is uploaded but the pictures that the card shows. The config and the card name the base
    model by its id on the Hub. The card is made anew, but one of your own, in the folder or in the repository, keeps
    its text (give `results` or `picture` to replace it). If the upload fails, a repository that was made for it is
    removed again; if the process is killed, the repository is left empty, and the same call goes on there.

    Args:
        adapter: folder of a saved adapter, or a model, of which the active adapter is pushed.
        repo_id: OWNER/NAME, or a name in the token's own account.
        base_model: the base model's id on the Hub; None: as in the adapter's config.
        results: what the card tells of the training.
        picture: is uploaded and shown in the card.
        private: make the new repository private.
        update: add a commit to a repository that holds files already, which is refused otherwise.
        revision: branch to commit to; made if it does not exist.
        create_pr: open a pull request in an existing repository instead of committing.
        commit_message: None: "Upload ... adapter".
        api: talks to the Hub; None: one with the token that is stored on this machine.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        PushError: nothing was changed on the Hub, or the sentence says what was.
    """
    if create_pr and revision:
        raise PushError("`create_pr=` opens a pull request against the main branch: leave `revision=` out.")
    api = api or HfApi(library_name="peft-learners")
    with tempfile.TemporaryDirectory() as saved:
        folder = Path(adapter) if isinstance(adapter, (str, Path)) else save_active(adapter, Path(saved))
        found = read(folder, repo_id, base_model, results, picture)
        try:
            validate_repo_id(repo_id)
            owner = api.whoami()["name"]  # a token that is missing or refused, said before anything is made
            repo_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
            check_base(api, found)
            new = not create_pr and open_repository(api, repo_id, private, update)
        except (HTTPError, OSError, HFValidationError) as error:
            raise PushError(f"{explain(error, api, repo_id)} Nothing was pushed.") from error
        try:
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            remote = None if new else remote_card(api, repo_id, revision)
            commit = api.create_commit(
                repo_id,
                files_to_commit(found, card_to_push(found, repo_id, results, picture, remote), picture),
                commit_message=commit_message or f"Upload {found.config.method} adapter",
                revision=revision,
                create_pr=create_pr,
            )
        except BaseException as raised:
            # huggingface_hub hides what stopped the upload of a large file behind a RuntimeError.
            cause = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
            again = "Run the same command again to go on." if may_go_on(cause) else ""
            if new:
                left = clean_up(api, repo_id, revision, again)
            elif revision:
                left = f"No file of the repository was changed; the branch {revision} may be new."
            else:
                left = "The repository is as it was."
            if isinstance(cause, (HTTPError, OSError, ValueError)):
                raise PushError(f"{explain(cause, api, repo_id)} {left}".strip()) from cause
            print(left, file=sys.stderr)
            raise
    return str(commit.pr_url or commit.commit_url)


def save_active(model: Any, folder: Path) -> Path:
    """Save a model's active adapter, and nothing else; the folder that holds it."""
    if not isinstance(model, PeftModel):  # one of transformers, after `model.add_adapter`
        model.save_pretrained(folder)
        return folder
    name = model.active_adapter
    model.save_pretrained(str(folder), selected_adapters=[name])
    return folder if name == "default" else folder / name


def read(
    folder: Path,
    repo_id: str,
    base_model: Optional[str],
    results: Optional[Results],
    picture: Union[str, Path, None],
) -> Adapter:
    """The adapter, if it is whole, can be loaded from the Hub, and its card can be made."""
    try:
        adapter = read_adapter(folder, base_model)
        check_picture(picture)
        card_to_push(adapter, repo_id, results, picture, None)
    except ValueError as error:
        raise PushError(f"{error} Nothing was pushed.") from error
    if adapter.base_id is None:
        raise PushError(
            f"The adapter was trained on the local folder {adapter.config.base_model_name_or_path!r}, which nobody "
            'else has. Give the id of that model on the Hub: `base_model="OWNER/NAME"`. Nothing was pushed.'
        )
    return adapter


def check_base(api: HfApi, adapter: Adapter) -> None:
    """Refuse a base model that is not on the Hub; one that the Hub does not answer about is let pass."""
    base, revision = str(adapter.base_id), adapter.config.revision
    try:
        api.model_info(base, revision=revision, timeout=30)
    except RevisionNotFoundError as error:
        raise PushError(
            f"The base model {base} has no revision {revision!r} on the Hub: push it there, or correct `revision` in "
            f"{adapter.folder / CONFIG}. Nothing was pushed."
        ) from error
    except (HTTPError, OSError, HFValidationError) as error:
        missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        if missing and status_of(error) == 404:
            raise PushError(
                f"The base model {base} is not on the Hub, or the token may not see it. Give its id there: "
                '`base_model="OWNER/NAME"`. Nothing was pushed.'
            ) from error


def open_repository(api: HfApi, repo_id: str, private: bool, update: bool) -> bool:
    """Make the repository, or see that it may be used.

    Returns:
        Whether it was made here.
    """
    try:
        api.create_repo(repo_id, private=private or None)
        return True
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
    filled = set(api.list_repo_files(repo_id)) - INITIAL
    if filled and not update:
        raise PushError(
            f"The repository {repo_id} exists already and holds {', '.join(sorted(filled))}. Give `update=True` to "
            "add a commit to it, or `create_pr=True` to open a pull request, or take another name. Nothing was pushed."
        )
    return False


def clean_up(api: HfApi, repo_id: str, revision: Optional[str], again: str) -> str:
    """Remove the repository that was made for a commit which failed; a sentence on what is left."""
    try:
        if api.file_exists(repo_id, WEIGHTS, revision=revision):
            return f"But the commit had arrived: {repo_id} holds the adapter."
        api.delete_repo(repo_id)
    except (HTTPError, OSError):
        return f"{repo_id} may be left, empty. {again}"
    return f"Nothing is left: {repo_id}, made for this, was removed again. {again}"


def may_go_on(error: BaseException) -> bool:
    """Whether the same command can do better a second time: not where the Hub, or a check, refuses what is pushed."""
    status = status_of(error)
    if status is None:
        return not isinstance(error, ValueError)
    return status in (401, 403, 408, 429) or status >= 500


def files_to_commit(adapter: Adapter, card: ModelCard, picture: Union[str, Path, None]) -> list[CommitOperationAdd]:
    """The adapter's files and nothing else of its folder."""
    config: dict[str, Any] = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = adapter.base_id
    files: dict[str, Any] = {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: str(adapter.folder / WEIGHTS),
        CARD: str(card).encode(),
    }
    for name in re.findall(r"!\[[^\]]*\]\(([^()/\\:]+)\)", card.text):
        if (adapter.folder / name).is_file():
            files[name] = str(adapter.folder / name)
    if picture:
        files[Path(picture).name] = str(picture)
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]


def card_to_push(
    adapter: Adapter,
    repo_id: str,
    results: Optional[Results],
    picture: Union[str, Path, None],
    remote: Optional[ModelCard],
) -> ModelCard:
    """A card made anew, or one that was written by hand with all that it lacks."""
    local = adapter.folder / CARD
    header = header_in(local) or (remote.data if remote is not None else None)
    made = make_card(adapter, results, Path(picture).name if picture else None, repo_id, header)
    if results is not None or picture is not None:
        return made
    here = load_card(local, str(local)) if local.is_file() else None
    written = [card for card in (here, remote) if card is not None and not is_untouched(card.text)]
    if not written:
        return made
    kept, own = written[0], adapter.config.base_model_name_or_path
    fill_header(kept.data, adapter.config.method, adapter.base_id)
    for key, value in made.data.to_dict().items():
        if not kept.data.get(key):
            kept.data[key] = value
    text = kept.text.replace(f'"{adapter.folder_name}")  # {HERE}', f'"{repo_id}")')
    if own != adapter.base_id:  # Trainer takes the name of a folder that is gone for an id
        text = text.replace(f"[{own}](https://huggingface.co/{own})", f"`{adapter.base}`")
    kept.text = with_usage(text, usage(adapter, repo_id))
    return kept


def with_usage(text: str, usage: str) -> str:
    """A card's text with the loading lines in their place; as it is if it imports the package already."""
    if "import peft_learners" in text:
        return text
    if _UNFILLED_START.search(text):
        return _UNFILLED_START.sub(lambda match: match[1] + usage, text, count=1)
    section, next_heading = f"## Use\n\n{usage}\n", "\n## Model description\n"
    if "the information the Trainer had access to" in text and next_heading in text:
        return text.replace(next_heading, f"\n{section}{next_heading}", 1)
    return f"{text.rstrip()}\n\n{section}" if text.strip() else f"\n{section}"


def remote_card(api: HfApi, repo_id: str, revision: Optional[str]) -> Optional[ModelCard]:
    """The card that the repository holds now."""
    if CARD not in api.list_repo_files(repo_id, revision=revision):
        return None
    return load_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)), f"{CARD} in {repo_id}")


def load_card(path: Path, where: str) -> ModelCard:
    """A card from its file.

    Raises:
        ValueError: its header is no YAML, or not that of a model card.
    """
    try:
        return ModelCard.load(path)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 2}: " if error.problem_mark is not None else ""  # `---` is line 1
        said = f"{line}{error.problem}"
    except (yaml.YAMLError, ValueError) as error:
        said = str(error).partition(". ")[0]
    raise ValueError(f"The header of {where} is not that of a model card ({said}): correct it, or delete that file.")


def status_of(error: BaseException) -> Optional[int]:
    """The HTTP status of a refusal."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def explain(error: BaseException, api: HfApi, repo_id: str) -> str:
    """What went wrong and what to do, in one or two sentences."""
    status = status_of(error)
    said = next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, HFValidationError):
        return f"`repo_id` must have the form OWNER/NAME, got {repo_id!r}."
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to push."
    if status == 401:
        return f"The Hub does not accept the token (401): run `hf auth login` again, or correct HF_TOKEN. ({said})"
    if status == 403:
        return f"The token may not write to {repo_id} (403): take one with the right to, or another owner. ({said})"
    if status == 404:
        return f"{repo_id} does not exist, or the token may not see it (404)."
    if status is not None and status >= 500:
        return f"The Hub failed ({status}), which is no fault of yours: {said}."
    if status is not None:
        return f"The Hub refused ({status}): {said}."
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"The connection to {api.endpoint} failed: {said}."
    return f"{said}."
