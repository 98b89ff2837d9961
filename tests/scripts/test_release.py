"""What a release is made with: the README's program, and dependencies that are newer than their ranges."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from scripts.release import newer, program

PEFT = Requirement("peft>=0.21.2,<0.22")


@pytest.mark.parametrize("version", ["0.21.2", "0.21.9"])
def test_allowed(version):
    """A release within the range is nothing to tell."""
    assert newer.outside(PEFT, version) is None


def test_newer(monkeypatch, capsys):
    """A release above the range is told, by name, and the script fails."""
    sentence = "peft 0.22.0 is out, and pyproject.toml allows <0.22,>=0.21.2."
    assert newer.outside(PEFT, "0.22.0") == sentence
    pytest.importorskip("tomllib", reason="since Python 3.11")
    monkeypatch.setattr(newer, "newest", lambda name: "0.22.0")
    with pytest.raises(SystemExit, match="1"):
        newer.main()
    assert "peft 0.22.0 is out, and pyproject.toml allows <0.22" in capsys.readouterr().out


def test_program():
    """A page's blocks under the mark are one program."""
    block = "<!-- {} -->\n```python\n{}\n```\n"
    page = "text\n".join(block.format(*of) for of in (("program", "a = 1"), ("run", "b"), ("program", "print(a)")))
    assert program.program(page) == "a = 1\n\nprint(a)\n"
    with pytest.raises(ValueError, match="no Python block under <!-- program -->"):
        program.program("text")
