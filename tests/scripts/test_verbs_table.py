"""docs/verbs.md is what the tests' markers tell, and the markers are read as meant."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.docs import verbs_table
from scripts.docs.verbs_table import Mark, marks_of, table


@pytest.mark.slow
def test_committed_table():
    """The committed table is what the tests tell."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.docs.verbs_table", "--check"],
        cwd=verbs_table.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"Run `python -m scripts.docs.verbs_table`.\n{done.stdout}\n{done.stderr}"


def test_every_verb():
    """Every verb is tested for every tuner."""
    assert "not tested" not in verbs_table.TABLE.read_text()


@pytest.mark.parametrize(
    ("parameters", "columns"),
    [
        ({"tuner": "learner-unprimed"}, ["Learner"]),
        ({"tuner": "far-discard", "arch": "bert"}, ["FAR"]),
        ({"run": ("nas-structured", "bert")}, ["NAS-LoRA"]),
        ({"tuner": "lora"}, []),
        ({"tuner": "bottleneck-parallel"}, ["bottleneck"]),
        ({"arch": "bert"}, ["Learner", "FAR", "NAS-LoRA", "bottleneck"]),
        ({}, ["Learner", "FAR", "NAS-LoRA", "bottleneck"]),
    ],
)
def test_column_of_parameters(parameters, columns):
    """The tuner is that of the parameters."""
    assert [mark.column for mark in marks_of("t", parameters, ("unload",), {})] == columns


def test_reasons():
    """Reasons go to the tuners they are for."""
    found = marks_of("t", {}, ("unload",), {"limit": {"FAR": "slow"}, "no": {"NAS-LoRA": "never"}})
    assert [(mark.column, mark.limit, mark.no) for mark in found] == [
        ("Learner", None, None),
        ("FAR", "slow", None),
        ("NAS-LoRA", None, "never"),
        ("bottleneck", None, None),
    ]
    assert [mark.column for mark in marks_of("t", {}, ("unload",), {"tuners": ["FAR"]})] == ["FAR"]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("merge_and_unlod",), {}, "Did you mean 'merge_and_unload'"),
        (("xyzzy",), {}, "Add it to VERBS"),
        ((), {}, "takes one name"),
        (("unload",), {"limits": "slow"}, "takes one name"),
        (("unload",), {"limit": {"LoRA": "slow"}}, r"unknown tuners \['LoRA'\]"),
        (("unload",), {"tuners": ["far"]}, r"unknown tuners \['far'\]"),
    ],
)
def test_a_wrong_marker_is_named(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^some test: .*{message}"):
        marks_of("some test", {}, args, kwargs)


def test_cells():
    """Cells say what all their tests say."""
    marks = [
        Mark("unload", "Learner", "a.py::one"),
        Mark("unload", "Learner", "a.py::two", limit="slow"),
        Mark("unload", "Learner", "a.py::two", limit="slow"),
        Mark("unload", "FAR", "a.py::one"),
        Mark("merge_and_unload", "FAR", "b.py::three", no="never", limit="slow"),
    ]
    lines = table(marks).splitlines()
    assert "| `unload` | with limits: [2] | yes | not tested | not tested | t2, t3 |" in lines
    assert "| `merge_and_unload` | not tested | no: [1], [2] | not tested | not tested | t1 |" in lines
    assert "1. never." in lines and "2. slow." in lines
    assert "- t1: `tests/b.py::three`" in lines and "- t2: `tests/a.py::one`" in lines
    assert "| `add_adapter` | not tested | not tested | not tested | not tested |  |" in lines
