"""`peft-learners push`."""

from __future__ import annotations

from typing import Any

from ..hub import PushError
from ..hub import push as push_adapter
from . import CommandError


def run(folder: str, repo_id: str, **options: Any) -> None:
    """Push the adapter in a folder."""
    try:
        print(f"Pushed to {push_adapter(folder, repo_id, **options)}")
    except PushError as error:
        raise CommandError(str(error)) from error
