"""Push a saved adapter of this package to the Hub, with its model card, in one commit.

    python -m scripts.hub.push ADAPTER_FOLDER OWNER/NAME [--base_model OWNER/NAME] [--results results.json]
        [--picture nodes.png] [--private] [--update] [--revision BRANCH] [--create_pr] [--commit_message TEXT]

What is uploaded, refused and cleaned up: see `peft_learners.hub.push`.
"""

import argparse
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import HfApi

from peft_learners.hub import PushError, push
from peft_learners.hub.full_card import read_adapter
from scripts.hub.card import fail, read_results

#: Options and their help texts.
FLAGS = {
    "private": "make the new repository private",
    "update": "add a commit to a repository that holds files already",
    "create_pr": "open a pull request in an existing repository instead of committing",
}
VALUES = {
    "base_model": "the base model's id on the Hub (default: as in the adapter's config)",
    "results": "results file of the run of scripts.glue.train that made it",
    "picture": "a picture, uploaded and shown in the card",
    "revision": "branch to commit to; made if it does not exist",
    "commit_message": "default: Upload ... adapter",
}


def main(argv: Optional[list[str]] = None, api: Optional[HfApi] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_FOLDER", help="folder of a saved adapter")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME of the repository on the Hub")
    for name, text in {**VALUES, **FLAGS}.items():
        kind: dict[str, Any] = {"action": "store_true"} if name in FLAGS else {}
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), help=text, **kind)
    given = vars(parser.parse_args(argv))
    folder, repo_id, file = given.pop("adapter"), given.pop("repo_id"), given.pop("results")
    try:
        results = None
        if file is not None:
            if not Path(file).is_file():
                raise ValueError(f"`results=` must be a file, got {file!r}.")
            results = read_results(Path(file), read_adapter(folder, given["base_model"]))
        print(f"-> {push(folder, repo_id, results=results, api=api, **given)}")
    except PushError as error:
        fail(error)
    except ValueError as error:
        fail(ValueError(f"{error} Nothing was pushed."))


if __name__ == "__main__":
    main()
