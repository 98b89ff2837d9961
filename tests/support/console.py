"""The command `peft-learners`, called as a user would call it, in this process."""

from __future__ import annotations

import contextlib
import io

import pytest

from peft_learners_cli import main


def said(*words: object) -> str:
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(word) for word in words])
    return out.getvalue()


def refused(*words: object) -> str:
    """The line with which it ends, with status 2 and without a traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    *before, line = err.getvalue().splitlines()
    start, _, sentence = line.partition(": error: ")
    assert start.startswith("peft-learners") and not any("Traceback" in other for other in before)
    return sentence
