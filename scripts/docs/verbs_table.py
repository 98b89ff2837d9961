#!/usr/bin/env python
"""Write docs/verbs.md: PEFT's verbs against this package's tuners, as the tests' markers tell it.

    python -m scripts.docs.verbs_table           # writes the table
    python -m scripts.docs.verbs_table --check   # exits with 1 if it is not what the tests tell

A test says what it stands for by `@pytest.mark.verb(name, limit=None, no=None, tuners=None)`:

- `name`: one of VERBS below;
- `limit`, `no`: why the verb works with limits, or not at all: a sentence, or `{tuner: sentence}`;
- `tuners`: names of COLUMNS; by default those of its parameter `tuner` (or `run`), or, without one, all.

Tests are collected, not run: that they pass is the test-suite's own business.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import pandas as pd
import pytest

from peft_learners.registry import methods

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "verbs.md"
#: Names of tuners in parameters of tests, by their beginnings.
COLUMNS = {config.display_name: method.partition("_")[0] for method, config in methods().items()}

VERBS: dict[str, tuple[str, ...]] = {
    "Adapters on a model": (
        "get_peft_model",
        "add_adapter",
        "set_adapter",
        "base_model.set_adapter([...])",
        "delete_adapter",
        "disable_adapter",
        "set_requires_grad",
        "inject_adapter_in_model",
        "low_cpu_mem_usage=True",
        "add_weighted_adapter",
        "adapter_names=",
        "get_model_status, get_layer_status",
        "get_peft_model(mixed=True)",
    ),
    "Files": (
        "save_pretrained",
        "PeftModel.from_pretrained",
        "PeftModel.from_pretrained(is_trainable=True)",
        "AutoPeftModelFor*.from_pretrained",
        "load_adapter",
        "load_adapter in place",
        "get_peft_model_state_dict, set_peft_model_state_dict",
        "push_to_hub",
        "convert_to_lora",
        "hotswap_adapter",
        "copy.deepcopy, torch.save",
        "pickle of configs",
    ),
    "Merging": ("merge_adapter, unmerge_adapter", "merge_and_unload", "unload", "tied embeddings"),
    "Speed and memory": (
        "torch.compile, inference",
        "torch.compile, training",
        "torch.compile, then set_adapter",
        "torch.compile, then load_adapter in place",
        "torch.compile, adapter_names=",
        "torch.autocast",
        "gradient_checkpointing_enable",
        "device_map, offloading",
    ),
    "transformers' own": (
        "model.add_adapter, set_adapter, delete_adapter, active_adapters (transformers)",
        "model.load_adapter (transformers)",
        "model.get_adapter_state_dict, save_pretrained (transformers)",
        "model.disable_adapters, enable_adapters (transformers)",
        "model.add_adapter of a LoRA beside ours (transformers)",
    ),
}
INTRODUCTION = """\
# PEFT's verbs and our tuners

This page says which calls of PEFT and transformers work with which method. `python -m scripts.docs.verbs_table` writes
it from the markers of the tests that are named. Do not edit it.

## PEFT's own test-suite

PEFT's test-suite passes on all four methods, unedited. NAS-LoRA runs with `init="lora"`, since the suite wants a fresh
adapter to change nothing. Skipped are

- tests of PEFT's own tuners, or of fields that ours do not have;
- three functions that need the Hub;
- one that wants no gradient at the embeddings' output, where FAR trains the embeddings;
- those that want no change of a pruned NAS-LoRA adapter;
- FAR on a whole `nn.MultiheadAttention` under FSDP, which is refused.

[tests/peft_suite/peft_cases.py](../tests/peft_suite/peft_cases.py) has the list,
[tests/peft_suite/skips.py](../tests/peft_suite/skips.py) PEFT's own skips.
"""


@dataclass(frozen=True)
class Mark:
    """One marker of one test, for one tuner."""

    verb: str
    column: str
    test: str
    limit: str | None = None
    no: str | None = None


def columns_of(parameters: Mapping[str, Any]) -> list[str]:
    """The tuners that a test's parameters speak of; none: it has no such parameter."""
    value = parameters.get("tuner", parameters.get("run"))
    name = value[0] if isinstance(value, tuple) else value
    return [column for column, start in COLUMNS.items() if isinstance(name, str) and name.startswith(start)]


def marks_of(test: str, parameters: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Mark]:
    """What one `verb` marker says, tuner by tuner.

    Raises:
        ValueError: the marker has another form, or names an unknown verb or tuner.
    """
    known = [verb for verbs in VERBS.values() for verb in verbs]
    unknown = set(kwargs) - {"limit", "no", "tuners"}
    if len(args) != 1 or unknown:
        raise ValueError(
            f"{test}: @pytest.mark.verb takes one name, limit=, no= and tuners=, got {args} and {kwargs}."
        )
    if args[0] not in known:
        near = difflib.get_close_matches(args[0], known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Add it to VERBS in scripts/docs/verbs_table.py."
        raise ValueError(f"{test}: unknown verb {args[0]!r}. {hint}")
    columns = list(kwargs.get("tuners") or columns_of(parameters))
    if not columns and not {"tuner", "run"} & set(parameters):
        columns = list(COLUMNS)
    reasons: dict[str, Union[str, Mapping[str, str], None]] = {key: kwargs.get(key) for key in ("limit", "no")}
    named = set(columns).union(*(reason for reason in reasons.values() if isinstance(reason, Mapping)))
    if not named <= set(COLUMNS):
        raise ValueError(f"{test}: unknown tuners {sorted(named - set(COLUMNS))}. They are {', '.join(COLUMNS)}.")
    found = []
    for column in columns:
        texts = {key: r.get(column) if isinstance(r, Mapping) else r for key, r in reasons.items()}
        found.append(Mark(args[0], column, test, **texts))
    return found


class Collector:
    """A pytest plugin that notes the markers of all collected tests."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            file = item.path.relative_to(ROOT / "tests").as_posix()
            test = f"{file}::{getattr(item, 'originalname', None) or item.name}"
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            for mark in item.iter_markers("verb"):
                self.marks += marks_of(test, parameters, mark.args, mark.kwargs)


def collect() -> list[Mark]:
    """The markers of all tests.

    Raises:
        RuntimeError: a test file can't be collected.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.verb(" in path.read_text()]
    collector, out = Collector(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
        code = pytest.main([*options, *files], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"The tests can't be collected:\n{out.getvalue()}")
    return collector.marks


def table(marks: Iterable[Mark]) -> str:
    """The document."""
    found = pd.DataFrame(map(vars, marks))
    notes: list[str] = []
    tests: list[str] = []
    lines = [INTRODUCTION]

    def number(text: str, of: list[str]) -> int:
        if text not in of:
            of.append(text)
        return of.index(text) + 1

    def said(cell: pd.DataFrame) -> str:
        if cell.empty:
            return "not tested"
        refusals, limits = ([*cell[name].dropna().unique()] for name in ("no", "limit"))
        words = "no" if refusals else "with limits" if limits else "yes"
        reasons = ", ".join(f"[{number(text, notes)}]" for text in refusals + limits)
        return f"{words}: {reasons}" if reasons else words

    for group, verbs in VERBS.items():
        lines += [f"## {group}\n", f"| | {' | '.join(COLUMNS)} | tests |", "|---" * (len(COLUMNS) + 2) + "|"]
        for verb in verbs:
            own = found[found.verb == verb]
            cells = " | ".join(said(own[own.column == column]) for column in COLUMNS)
            refs = ", ".join(f"t{number(name, tests)}" for name in sorted({*own.test}))
            code = verb.removesuffix(" (transformers)")
            lines.append(f"| `{code}` | {cells} | {refs} |")
        lines.append("")
    lines += ["## Limits and reasons\n", *(f"{i}. {text}." for i, text in enumerate(notes, start=1)), ""]
    lines += ["## Tests\n", *(f"- t{i}: `tests/{name}`" for i, name in enumerate(tests, start=1)), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    text = table(collect())
    if not options.check:
        TABLE.write_text(text)
        return 0
    committed = TABLE.read_text() if TABLE.exists() else ""
    difference = difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "collected", lineterm="")
    print("\n".join(difference))
    return int(committed != text)


if __name__ == "__main__":
    sys.exit(main())
