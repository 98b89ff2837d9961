"""Push a saved adapter of this package to the Hub, with its model card, in one commit.

    python -m scripts.push ADAPTER_FOLDER OWNER/NAME [--base_model OWNER/NAME] [--results results.json]
        [--picture nodes.png] [--private] [--update] [--revision BRANCH] [--create_pr] [--commit_message TEXT]

Only what belongs to the adapter is uploaded: its weights, its config (with the base model's id on the Hub), its card,
and the pictures that the card shows. The card is made anew from the files and the results, but one of your own, in the
folder or in the repository, keeps its text (give --results or --picture to replace it).

A repository that holds files already is refused, unless with --update or --create_pr. If the upload fails, a
repository that was made for it is removed again; if the process is killed, the repository is left empty, and the same
command goes on there.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

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
from safetensors import SafetensorError

from peft_learners.hub.card import CARD, is_automatic, with_usage
from scripts import model_card
from scripts.glue import run_record

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: What the Hub puts into a new repository.
INITIAL = {".gitattributes"}
AGAIN = "Run the same command again to go on."
UNCHANGED = "The repository is as it was."


class PushError(Exception):
    """A sentence on what went wrong, what was and was not done, and what to do."""


@dataclass
class PushArguments:
    base_model: Optional[str] = field(
        default=None, metadata={"help": "the base model's id on the Hub (default: as in the adapter's config)"}
    )
    results: Optional[str] = field(
        default=None, metadata={"help": "results file of the run of train_glue.py that made it"}
    )
    picture: Optional[str] = field(default=None, metadata={"help": "a picture, uploaded and shown in the card"})
    private: bool = field(default=False, metadata={"help": "make the new repository private"})
    update: bool = field(default=False, metadata={"help": "add a commit to a repository that holds files already"})
    revision: Optional[str] = field(default=None, metadata={"help": "branch to commit to; made if it does not exist"})
    create_pr: bool = field(
        default=False, metadata={"help": "open a pull request in an existing repository instead of committing"}
    )
    commit_message: Optional[str] = field(default=None, metadata={"help": "default: Upload ... adapter"})


def push(folder: Path, repo_id: str, options: PushArguments, api: HfApi) -> str:
    """Push an adapter.

    Args:
        folder: of the saved adapter.
        repo_id: OWNER/NAME, or a name in the token's own account.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        PushError: nothing was changed on the Hub, or the sentence says what was.
    """
    if options.create_pr and options.revision:
        raise PushError("--create_pr opens a pull request against the main branch: leave --revision out.")
    adapter = read(folder, repo_id, options)
    try:
        validate_repo_id(repo_id)
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        api.whoami()  # a token that is missing or refused, said before anything is made
    except (HTTPError, OSError, HFValidationError) as error:
        raise PushError(f"{explain(error, api, repo_id)} Nothing was pushed.") from error

    check_base(api, adapter)
    new = not options.create_pr and open_repository(api, repo_id, options)
    try:
        if options.revision:
            api.create_branch(repo_id, branch=options.revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            files_to_commit(adapter, repo_id, options, api, new),
            commit_message=options.commit_message or f"Upload {adapter.method} adapter",
            revision=options.revision,
            create_pr=options.create_pr,
        )
    except BaseException as raised:
        # huggingface_hub hides what stopped the upload of a large file behind a RuntimeError.
        error = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
        again = AGAIN if may_go_on(error) else ""
        left = clean_up(api, repo_id, options.revision, again) if new else left_in_existing(options.revision)
        if isinstance(error, (HTTPError, OSError, ValueError)):
            raise PushError(f"{explain(error, api, repo_id)} {left}".strip()) from error
        print(left, file=sys.stderr)
        raise
    return str(commit.pr_url or commit.commit_url)


def read(folder: Path, repo_id: str, options: PushArguments) -> model_card.Adapter:
    """The adapter, if it is whole, can be loaded from the Hub, and its card can be made."""
    try:
        adapter = model_card.read_adapter(folder, options.base_model)
        for option in ("results", "picture"):
            path = getattr(options, option)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"--{option} must be a file, got {path!r}.")
        card_to_push(adapter, repo_id, options, None)
    except SafetensorError as error:
        raise PushError(f"{folder / WEIGHTS} is damaged ({error}). Nothing was pushed.") from error
    except ValueError as error:
        raise PushError(f"{error} Nothing was pushed.") from error
    if adapter.base_id is None:
        raise PushError(
            f"The adapter was trained on the local folder {adapter.config.base_model_name_or_path!r}, which nobody "
            "else has. Give the id of that model on the Hub: --base_model OWNER/NAME. Nothing was pushed."
        )
    return adapter


def check_base(api: HfApi, adapter: model_card.Adapter) -> None:
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
                "--base_model OWNER/NAME. Nothing was pushed."
            ) from error


def open_repository(api: HfApi, repo_id: str, options: PushArguments) -> bool:
    """Make the repository, or see that it may be used.

    Returns:
        Whether it was made here.
    """
    try:
        api.create_repo(repo_id, private=options.private or None)
        return True
    except (HTTPError, OSError) as error:
        if status_of(error) != 409:
            raise PushError(f"{explain(error, api, repo_id)} Nothing was pushed.") from error
    try:
        filled = set(api.list_repo_files(repo_id)) - INITIAL
    except (HTTPError, OSError) as error:
        raise PushError(f"{explain(error, api, repo_id)} Nothing was pushed.") from error
    if filled and not options.update:
        raise PushError(
            f"The repository {repo_id} exists already and holds {', '.join(sorted(filled))}. Give --update to add a "
            "commit to it, or --create_pr to open a pull request, or take another name. Nothing was pushed."
        )
    return False


def clean_up(api: HfApi, repo_id: str, revision: Optional[str], again: str) -> str:
    """Remove the repository that was made for a commit which failed; a sentence on what is left."""
    try:
        try:
            files = api.list_repo_files(repo_id, revision=revision)
        except RevisionNotFoundError:  # it failed before the branch was made
            files = []
        if WEIGHTS in files:
            return f"But the commit had arrived: {repo_id} holds the adapter."
        api.delete_repo(repo_id)
    except (HTTPError, OSError):
        return f"{repo_id} may be left, empty. {again}"
    return f"Nothing is left: {repo_id}, made for this, was removed again. {again}"


def left_in_existing(revision: Optional[str]) -> str:
    """A sentence on what a commit that failed leaves in a repository which was there before."""
    return f"No file of the repository was changed; the branch {revision} may be new." if revision else UNCHANGED


def may_go_on(error: BaseException) -> bool:
    """Whether the same command can do better a second time: not where the Hub, or a check, refuses what is pushed."""
    status = status_of(error)
    if status is None:
        return not isinstance(error, ValueError)
    return status in (401, 403, 408, 429) or status >= 500


def files_to_commit(
    adapter: model_card.Adapter, repo_id: str, options: PushArguments, api: HfApi, new: bool
) -> list[CommitOperationAdd]:
    """The adapter's files and nothing else of its folder."""
    config: dict[str, Any] = run_record.read_json(adapter.folder / CONFIG) or {}
    config["base_model_name_or_path"] = adapter.base_id
    card = card_to_push(adapter, repo_id, options, None if new else remote_card(api, repo_id, options.revision))
    files: dict[str, Any] = {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS: str(adapter.folder / WEIGHTS),
        CARD: str(card).encode(),
    }
    for name in re.findall(r"!\[[^\]]*\]\(([^()/\\:]+)\)", card.text):
        if (adapter.folder / name).is_file():
            files[name] = str(adapter.folder / name)
    if options.picture:
        files[Path(options.picture).name] = options.picture
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]


def card_to_push(
    adapter: model_card.Adapter, repo_id: str, options: PushArguments, remote: Optional[ModelCard]
) -> ModelCard:
    """A card made anew, or one that was written by hand with all that it lacks."""
    results = model_card.read_results(Path(options.results), adapter) if options.results else None
    picture = Path(options.picture).name if options.picture else None
    made = model_card.card(adapter, results, picture, repo_id)
    if results is not None or picture is not None:
        return made
    local = adapter.folder / CARD
    cards = [load_card(local, str(local))] if local.is_file() else []
    written = [card for card in (*cards, remote) if card is not None and not is_automatic(card.text)]
    if not written:
        return made
    kept = written[0]
    for key, value in made.data.to_dict().items():
        if key == "tags":
            kept.data.tags = [*(kept.data.tags or ()), *(tag for tag in value if tag not in (kept.data.tags or ()))]
        elif key in ("library_name", "base_model", "base_model_relation") or not kept.data.get(key):
            kept.data[key] = value
    here = f'"{adapter.folder_name}")  # {model_card.HERE}'
    kept.text = with_usage(kept.text.replace(here, f'"{repo_id}")'), model_card.usage(adapter, repo_id))
    return kept


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
    raise ValueError(
        f"The header of {where} is not that of a model card ({said}): correct it, or give --results or --picture to "
        "replace the file."
    )


def status_of(error: BaseException) -> Optional[int]:
    """The HTTP status of a refusal."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def explain(error: BaseException, api: HfApi, repo_id: str) -> str:
    """What went wrong and what to do, in one or two sentences."""
    status = status_of(error)
    said = next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, HFValidationError):
        return f"REPO_ID must have the form OWNER/NAME, got {repo_id!r}."
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


def main(argv: Optional[list[str]] = None, api: Optional[HfApi] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_FOLDER", help="folder of a saved adapter")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME of the repository on the Hub")
    for entry in fields(PushArguments):
        flag: dict[str, Any] = {"action": "store_true"} if entry.default is False else {"default": entry.default}
        names = dict.fromkeys((f"--{entry.name}", f"--{entry.name.replace('_', '-')}"))
        parser.add_argument(*names, dest=entry.name, help=entry.metadata["help"], **flag)
    given = vars(parser.parse_args(argv))
    folder, repo_id = given.pop("adapter"), given.pop("repo_id")
    try:
        print(f"-> {push(folder, repo_id, PushArguments(**given), api or HfApi(library_name='peft-learners'))}")
    except PushError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
