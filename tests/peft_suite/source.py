"""Where PEFT's test-suite comes from: the source distribution of the installed release, cached by version."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

RELEASE = importlib.metadata.version("peft")


class SuiteUnavailable(Exception):
    """There is neither a cached copy nor a package registry that has the release."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-learners"


def fetch(release: str = RELEASE, cache: Path | None = None) -> Path:
    """The folder whose package `tests` is the suite of a PEFT release; downloaded by pip if it is not there yet.

    Raises:
        SuiteUnavailable: pip could not get it.
    """
    cache = cache_folder() if cache is None else cache
    suite = cache / f"peft-{release}"
    if suite.is_dir():
        return suite
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpacking-") as folder:
        _unpack(_download(release, Path(folder)), Path(folder) / "tests")
        fresh = Path(folder) / "suite"
        fresh.mkdir()
        shutil.move(Path(folder) / "tests", fresh / "tests")
        try:
            fresh.rename(suite)
        except OSError:  # another process was first
            if not suite.is_dir():
                raise
    return suite


def _download(release: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    command += ["--no-build-isolation", "--retries", "1", "--timeout", "30", "--dest", str(folder), f"peft=={release}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("peft-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        raise SuiteUnavailable(
            f"the source distribution of peft {release} could not be downloaded ({said[-1]}) -- runs where pip "
            f"reaches a package registry that has this release, or where {cache_folder()} holds a copy"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "__init__.py").touch()  # the distribution leaves it out, but its modules import relatively
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if member.isfile() and path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                content = files.extractfile(member)
                assert content is not None
                (folder / path.name).write_bytes(content.read())


def fetch_or_skip() -> Path:
    """`fetch` for tests. On GitHub a suite that can't be had is a failure, so that it is not missed in silence; but a
    development version of PEFT has no source distribution."""
    try:
        return fetch()
    except SuiteUnavailable as error:
        if os.environ.get("GITHUB_ACTIONS") == "true" and "dev" not in RELEASE:
            pytest.fail(str(error))
        pytest.skip(str(error))
