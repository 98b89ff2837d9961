"""The wheel: the package with its marker of types and its metadata, and nothing else."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

from peft_learners import __version__

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel of this checkout, built in a copy of it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("peft_learners", "scripts", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "peft_learners_cli.py"):
        shutil.copy(ROOT / name, copy)
    build = subprocess.run([sys.executable, "-c", BUILD, "dist"], cwd=copy, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    (path,) = (copy / "dist").glob("*.whl")
    assert path.name == f"peft_learners-{__version__}-py3-none-any.whl"
    return ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: ZipFile) -> Message:
    text = wheel.read(f"peft_learners-{__version__}.dist-info/METADATA").decode()
    return email.message_from_string(text)


def test_contents(wheel):
    """The wheel holds every module of the package, py.typed and the command: no tests, no scripts."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "peft_learners").rglob("*.py")}
    assert names == modules | {"peft_learners/py.typed", "peft_learners_cli.py"}


def test_license(wheel):
    """The wheel holds the licence's text."""
    text = wheel.read(f"peft_learners-{__version__}.dist-info/licenses/LICENSE")
    assert text == (ROOT / "LICENSE").read_bytes()


def test_metadata(metadata):
    """The index page shows README, licence and links."""
    assert metadata["Name"] == "peft-learners" and metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(links)


def test_version_told(metadata):
    """The changelog's newest version and the citation's are the package's."""
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [0"))
    assert newest.startswith(f"## [{__version__}] - ")
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
