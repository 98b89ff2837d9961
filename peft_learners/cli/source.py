"""Where an adapter lies that a user names: a folder, or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..hub.full_card import Adapter, read_adapter
from ..hub.short_card import CONFIG, WEIGHTS, is_hub_id
from . import CommandError


def read(name: str) -> Adapter:
    """The adapter in a folder or on the Hub.

    Raises:
        ValueError: there is no adapter of this package.
    """
    return read_adapter(folder_of(name), base_needed=False)


def folder_of(name: str) -> Path:
    """The folder of an adapter; that of the Hub's cache, after a download, for an id."""
    if Path(name).exists():
        return Path(name)
    if "/" not in name or not is_hub_id(name):
        raise CommandError(f"There is no folder {name}. The id of an adapter on the Hub has the form OWNER/NAME.")
    try:
        hf_hub_download(name, WEIGHTS)
        return Path(hf_hub_download(name, CONFIG)).parent
    except GatedRepoError as error:
        raise CommandError(f"{name} is gated: ask for access on its page, and run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise CommandError(
            f"There is no folder {name} and no such repository on the Hub, or the token may not see it."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CommandError(f"There is no folder {name}, and the Hub can't be reached for it.") from error
    except EntryNotFoundError as error:
        missing = CONFIG if CONFIG in str(error) else WEIGHTS
        raise CommandError(f"{name} on the Hub is no saved adapter: it holds no {missing}.") from error
    except HTTPError as error:
        raise CommandError(f"{name} can't be downloaded: {error}") from error
